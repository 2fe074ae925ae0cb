"""Sparse spectra inside the graph: y += F_Mᵀ S F_N x for every row of the batch with its own S, and no ScatterND.

**What runs.** Per row of the batch and site, n coefficients (row u, column v, value s). With tokens as the last axis,
z = F_N x [in, tokens] is two MatMuls (`TwoStage`), shared by all sites that read x. Then

    w = s · z[v]            Gather of whole token rows, Mul
    t[u] = Σ w over row u   the sparse sum
    y = F_Mᵀ t              two MatMuls, shared by sites of one output width

**The sparse sum.** ScatterND(add) is the obvious operator and loses additions: onnxruntime 1.31 splits its index
tuples over threads without a lock, and two threads adding to one row overwrite each other (measured: 200 of 200
runs wrong at 6,000 tuples on 50 rows with 2 threads). ScatterElements(add) is serial and right, and seven times slower.
So coefficients stand *in descending order of their row*, and the sum over equal neighbours is a difference of prefix
sums: P = CumSum(w), and with c[u] = how many coefficients have a row ≥ u,

    t[u] = P[c[u]] − P[c[u+1]]

The difference is linear, so it lives inside the first factor of the backward transform, which then takes q+1 prefix
rows for q outputs. c itself is a histogram (ScatterElements of ones, serial, single integers) and a CumSum, for all
sites at once. Descending, because a narrower adapter in a wider bank is padded with value 0 at place (0, 0): zeros
at the end stay in order. The cost of the prefix sums is their rounding: about 2⁻²⁴·√n of the largest |w|.

**Never a wrong answer.** Coefficients out of order, or places outside their weight, end in an error of Gather (a
one-element table asked for its second element); so do ids that are negative or beyond the bank.

**Cost.** BERT-base shape, query+value of 12 layers, n = 750, 100 adapters resident, every row its own; CPU time of one
thread on a machine that had other work to do, so to be measured again in quiet: 1.13 of the plain graph at 8×64 and
1×128. Of what an active adapter adds at 8×64, two thirds are the transforms' MatMuls; the rest, in order: adding to
the batch (ScatterND), Mul, Transpose, the two Gathers, Split, CumSum. One transform of 8×64 tokens at 768 is 0.27 ms
beside 1.3 ms of the dense layer; Gather 0.03, Mul and CumSum 0.04 each (2 threads, quiet). What all sites share
(ids, casts, row starts, checks) is 1 ms a run. Not covered: single tokens, where the number of nodes is the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.sites import Call
from ssh_deploy.transforms import get_transform
from ssh_deploy.transforms.base import TwoStage

INT32, INT64, FLOAT = np.int32, np.int64, np.float32


@dataclass(frozen=True, slots=True, eq=False)
class SpectralBank:
    """Optional inputs of one axis kernel, and what the graph makes of them for a batch.

    ``gate`` is true when an adapter is there. ``values`` f32 [batch, sites, n+1, 1], scaled, one zero at the end;
    ``cols`` int32 [batch, sites, n+1], places in the flattened [batch·in] rows of z; ``starts`` by output width:
    int32 [batch, sites, p, q+1], places c[u] in the flattened [batch·group·(n+1)] rows of P.
    """

    axis: str
    gate: ir.Value
    values: ir.Value
    cols: ir.Value
    starts: Mapping[int, ir.Value]


def prepare(
    emitter: Emitter,
    axis: str,
    inputs: Mapping[str, ir.Value],
    ids: ir.Value,
    *,
    shapes: Sequence[tuple[int, int]],
    groups: Sequence[tuple[int, int]],
) -> SpectralBank:
    """Emit what all sites share, once a run: the batch's rows of the bank, places in flat arrays, row starts.

    Args:
        emitter: of the outermost graph.
        axis: name of the axis kernel.
        inputs: ``values``, ``scales``, ``rows``, ``cols``.
        ids: checked rows of the bank, int64 [batch].
        shapes: (out, in) of every site.
        groups: (first, size) in the table of the group that each site belongs to.
    """
    # of the rows, not of the values: ORT's Size knows no float16 on the CPU and would cast the whole bank, every run
    gate = emitter.op("Greater", emitter.op("Size", inputs["rows"]), emitter.const(0, INT64))
    # outside the branch: ids beyond the bank are an error even when nothing is fed
    scales = emitter.op("Gather", inputs["scales"], ids, axis=0)
    then, other = emitter.branch("rows"), emitter.branch("none")
    batch = then.op("Shape", ids)
    values = then.op("Cast", then.op("Gather", inputs["values"], ids, axis=0), to=ir.DataType.FLOAT)
    values = then.op("Mul", values, then.op("Unsqueeze", scales, then.ints(2)))
    ends = then.ints(0, 0, 0, 0, 0, 1)
    values = then.op("Unsqueeze", then.op("Pad", values, ends), then.ints(3))
    rows = then.op("Cast", then.op("Gather", inputs["rows"], ids, axis=0), to=ir.DataType.INT32)
    rows_end = then.op("Pad", rows, ends)
    cols = then.op("Pad", then.op("Cast", then.op("Gather", inputs["cols"], ids, axis=0), to=ir.DataType.INT32), ends)
    zero = _checked(then, rows_end, cols, shapes)
    number = then.op(
        "Range",
        then.const(0, INT32),
        then.op("Cast", then.op("Squeeze", batch), to=ir.DataType.INT32),
        then.const(1, INT32),
    )
    number = then.op("Add", then.op("Reshape", number, then.ints(-1, 1, 1)), zero)
    inner = np.array([shape[1] for shape in shapes], INT32).reshape(1, -1, 1)
    cols = then.op("Add", cols, then.op("Mul", number, then.const(inner, INT32)))
    starts = _row_starts(then, rows, batch, number, shapes=shapes, groups=groups, axis=axis)
    results = [values, cols, *starts.values()]
    none = [other.op("Identity", other.const(np.zeros((0,), d), d)) for d in (FLOAT, *[INT32] * (len(results) - 1))]
    for value, kind in zip(results + none, [FLOAT, *[INT32] * (len(results) - 1)] * 2, strict=True):
        value.dtype = ir.DataType.from_numpy(np.dtype(kind))
    out = emitter.when(gate, then, results, other, none)
    return SpectralBank(axis, gate, out[0], out[1], dict(zip(starts, out[2:], strict=True)))


def _checked(emitter: Emitter, rows_end: ir.Value, cols: ir.Value, shapes: Sequence[tuple[int, int]]) -> ir.Value:
    """An int32 zero [1] that cannot be had when rows ascend or places lie outside their weights."""
    width = len(shapes)
    high_row = emitter.const(np.array([s[0] - 1 for s in shapes]).reshape(1, width, 1), INT32)
    high_col = emitter.const(np.array([s[1] - 1 for s in shapes]).reshape(1, width, 1), INT32)
    steps = emitter.op(
        "Sub",
        emitter.op("Slice", rows_end, emitter.ints(0), emitter.ints(-1), emitter.ints(2)),
        emitter.op("Slice", rows_end, emitter.ints(1), emitter.ints(1 << 40), emitter.ints(2)),
    )
    worst = [steps, emitter.op("Sub", high_row, rows_end), emitter.op("Sub", high_col, cols), rows_end, cols]
    least = emitter.op("Min", *(emitter.op("ReduceMin", value, keepdims=0) for value in worst))
    broken = emitter.op("Cast", emitter.op("Less", least, emitter.const(0, INT32)), to=ir.DataType.INT64)
    return emitter.op("Gather", emitter.const([0], INT32), emitter.op("Reshape", broken, emitter.ints(1)), axis=0)


def _row_starts(
    emitter: Emitter,
    rows: ir.Value,
    batch: ir.Value,
    number: ir.Value,
    *,
    shapes: Sequence[tuple[int, int]],
    groups: Sequence[tuple[int, int]],
    axis: str,
) -> dict[int, ir.Value]:
    highest = max(shape[0] for shape in shapes)
    size = emitter.op("Concat", batch, emitter.ints(len(shapes), highest + 1), axis=0)
    zeros = emitter.op("ConstantOfShape", size, value=ir.tensor(np.zeros(1, INT32)))
    ones = emitter.op("ConstantOfShape", emitter.op("Shape", rows), value=ir.tensor(np.ones(1, INT32)))
    counts = emitter.op("ScatterElements", zeros, rows, ones, axis=2, reduction="add")
    counts = emitter.op("CumSum", counts, emitter.const(2, INT64), reverse=1)  # c[u]: coefficients with a row ≥ u
    length = emitter.op("Cast", emitter.op("Shape", rows, start=2, end=3), to=ir.DataType.INT32)
    length = emitter.op("Add", length, emitter.const([1], INT32))
    index = np.arange(len(shapes))
    sizes = np.array([size for _, size in groups]).reshape(1, -1, 1)
    places = (index - np.array([first for first, _ in groups])).reshape(1, -1, 1)
    block = emitter.op("Add", emitter.op("Mul", number, emitter.const(sizes, INT32)), emitter.const(places, INT32))
    counts = emitter.op("Add", counts, emitter.op("Mul", block, length))
    starts = {}
    for width in sorted({shape[0] for shape in shapes}):
        stages = get_transform(axis).axis.two_stage(width)
        p, q = stages.p, stages.q
        own = emitter.op("Slice", counts, emitter.ints(0), emitter.ints(width), emitter.ints(2))
        own = emitter.op("Reshape", own, emitter.ints(0, 0, p, q))
        after = emitter.op("Slice", counts, emitter.ints(q), emitter.ints(width + 1), emitter.ints(2), emitter.ints(q))
        after = emitter.op("Reshape", after, emitter.ints(0, 0, p, 1))
        starts[width] = emitter.op("Concat", own, after, axis=3)
    return starts


def contribution(
    emitter: Emitter, bank: SpectralBank, calls: Sequence[Call], table: Mapping[str, int]
) -> list[ir.Value]:
    """Emit, into the branch that runs when an adapter is there, what it adds to each of ``calls``.

    Args:
        emitter: of the branch.
        bank: as `prepare` made it.
        calls: of one group: they read the same activation and have consecutive rows in ``table``.
        table: row of each module in the ``sites`` dimension.

    Returns:
        f32 of the shape of each call's result.
    """
    modules = list(dict.fromkeys(call.module for call in calls))
    first, count = table[modules[0]], len(modules)
    activation, tokens, n_in = calls[0].activation, calls[0].tokens, calls[0].inputs
    x = activation if tokens else emitter.op("Unsqueeze", activation, emitter.ints(1))
    if activation.shape is not None and len(activation.shape) == 4:
        x = emitter.op("Reshape", activation, emitter.ints(0, 0, n_in))
    z = _forward(emitter, x, get_transform(bank.axis).axis.two_stage(n_in))
    cols = _sites(emitter, bank.cols, range(first, first + count), len(table))
    values = _sites(emitter, bank.values, range(first, first + count), len(table))
    terms = emitter.op("Mul", emitter.op("Gather", z, cols, axis=0), values)
    sums = emitter.op("Flatten", emitter.op("CumSum", terms, emitter.const(2, INT64), exclusive=1), axis=3)
    answers: dict[str, ir.Value] = {}
    by_width: dict[int, list[str]] = {}
    for call in calls:
        if call.module not in by_width.setdefault(call.outputs, []):
            by_width[call.outputs].append(call.module)
    for width, names in by_width.items():
        starts = _sites(emitter, bank.starts[width], [table[name] for name in names], len(table))
        stages = get_transform(bank.axis).axis.two_stage(width)
        y = _backward(emitter, emitter.op("Gather", sums, starts, axis=0), stages, len(names))
        # Squeeze before Transpose: inside the branch it is an alias, as the branch's last node it would be a copy
        parts = emitter.ops("Split", y, outputs=len(names), axis=1, num_outputs=len(names)) if len(names) > 1 else [y]
        for name, part in zip(names, parts, strict=True):
            turned = emitter.op("Transpose", emitter.op("Squeeze", part, emitter.ints(1)), perm=[0, 2, 1])
            if stages.permutation is not None:
                turned = emitter.op("Gather", turned, emitter.ints(*np.argsort(stages.permutation).tolist()), axis=2)
            answers[name] = turned if tokens else emitter.op("Squeeze", turned, emitter.ints(1))
    return [answers[call.module] for call in calls]


def _sites(emitter: Emitter, array: ir.Value, wanted: Sequence[int], total: int) -> ir.Value:
    """The ``wanted`` rows of the ``sites`` dimension (1)."""
    wanted = list(wanted)
    if wanted == list(range(total)):
        return array
    if wanted == list(range(wanted[0], wanted[-1] + 1)):
        return emitter.op("Slice", array, emitter.ints(wanted[0]), emitter.ints(wanted[-1] + 1), emitter.ints(1))
    return emitter.op("Gather", array, emitter.ints(*wanted), axis=1)


def _forward(emitter: Emitter, x: ir.Value, stages: TwoStage) -> ir.Value:
    """F x for x [batch, tokens, n], as [batch·n, tokens] in the stages' order."""
    if stages.permutation is not None:
        x = emitter.op("Gather", x, emitter.ints(*stages.permutation.tolist()), axis=2)
    x = emitter.op("Transpose", x, perm=[0, 2, 1])
    if stages.p == 1:
        return emitter.op("Flatten", emitter.op("MatMul", emitter.const(stages.second[0], FLOAT), x), axis=2)
    x = emitter.op("Reshape", x, emitter.ints(0, stages.p, -1))
    x = emitter.op("MatMul", emitter.const(stages.first, FLOAT), x)
    x = emitter.op("Reshape", x, emitter.ints(0, stages.p, 2 * stages.q, -1))
    return emitter.op("Flatten", emitter.op("MatMul", emitter.const(stages.second, FLOAT), x), axis=3)


def _backward(emitter: Emitter, prefix: ir.Value, stages: TwoStage, count: int) -> ir.Value:
    """Fᵀ t for prefix rows [batch, count, p, q+1, tokens] of t, as [batch, count, n, tokens], permuted still."""
    p, q = stages.p, stages.q
    second = emitter.const(differenced(stages), FLOAT)
    y = emitter.op("MatMul", second, prefix)
    if p > 1:
        y = emitter.op("Reshape", y, emitter.ints(0, count, 2 * p, -1))
        y = emitter.op("MatMul", emitter.const(stages.first.T, FLOAT), y)
    return emitter.op("Reshape", y, emitter.ints(0, count, p * q, -1))


def differenced(stages: TwoStage) -> NDArray[np.float64]:
    """``second[k1]ᵀ D``, float64 [p, 2q, q+1] ([1, n, n+1] when dense): takes prefix rows instead of their differences.

    ``(D P)[j] = P[j] − P[j+1]``.
    """
    transposed = stages.second.transpose(0, 2, 1)
    edge = np.zeros((*transposed.shape[:2], 1))
    return np.concatenate([transposed, edge], axis=2) - np.concatenate([edge, transposed], axis=2)

"""Sparse spectra inside the graph: y += F_Mᵀ S F_N x for every row of the batch with its own S, and no ScatterND.

**What runs.** Per row of the batch and site, n coefficients (row u, column v, value s). With tokens as the last axis,
z = F_N x [in, tokens] is two MatMuls (`TwoStage`), shared by all sites that read x. Then

    w = s · z[v]            Gather of whole token rows, Mul
    t[u] = Σ w over row u   the sparse sum
    y = F_Mᵀ t              two MatMuls

**The sparse sum.** ScatterND(add) is the obvious operator and loses additions: onnxruntime 1.31 splits its index
tuples over threads without a lock, and two threads adding to one row overwrite each other (measured: 200 of 200
runs wrong at 6,000 tuples on 50 rows with 2 threads). ScatterElements(add) is serial and right, and seven times slower.
So coefficients stand *in descending order of their row*, and the sum over equal neighbours is a difference of prefix
sums: P = CumSum(w), and with c[u] = how many coefficients have a row ≥ u,

    t[u] = P[c[u]] − P[c[u+1]]

The difference is linear, so it lives inside the first factor of the backward transform, which then takes 2q+1 prefix
rows for 2q outputs. c itself is a histogram (ScatterElements of ones, serial, single integers) and a CumSum, for all
sites at once. Descending, because a narrower adapter in a wider bank is padded with value 0 at place (0, 0): zeros
at the end stay in order. The cost of the prefix sums is their rounding: about 2⁻²⁴·√n of the largest |w|.

**Never a wrong answer.** Coefficients out of order, or places outside their weight, end in an error of Gather (a
one-element table asked for its second element); so do ids that are negative or beyond the bank.

**Cost.** `ssh-deploy bench bank` measures it. At 8×64 on the BERT-base shape half of what an active adapter adds is
the transforms' MatMuls (one transform of 512 tokens at 768 costs 0.14 of a dense layer in time, 0.10 in multiply-adds);
the rest, in order: Transpose, adding to the batch (ScatterND), Gather, Mul, CumSum: each is one pass over [n, tokens].
At 1×16 it is the number of nodes: ten per group and eight per site, 5 to 20 µs each, and 0.5 ms a run for what all
sites share (ids, casts, row starts, checks). So a backward transform per site, though sites of one width could share
it: the copy that takes the shared result apart costs more than the nodes saved. Not covered: single tokens.
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

    ``gate`` is true when an adapter is there, and ``batch`` int64 [batch, 1] then numbers the batch's rows (else
    [0, 1]). By first site of a group of size g: ``values`` f32 [batch, g, n+1, 1], scaled, one zero at the end, and
    ``cols`` int32 [batch, g, n+1], places in the flattened [batch·in] rows of z. By site: ``starts`` int32
    [batch, 1, blocks, width+1], places c[u] in the flattened [batch·g·(n+1)] rows of P.
    """

    axis: str
    gate: ir.Value
    batch: ir.Value
    values: Mapping[int, ir.Value]
    cols: Mapping[int, ir.Value]
    starts: Mapping[int, ir.Value]


def prepare(
    emitter: Emitter,
    axis: str,
    inputs: Mapping[str, ir.Value],
    ids: ir.Value,
    *,
    shapes: Sequence[tuple[int, int]],
    groups: Sequence[int],
) -> SpectralBank:
    """Emit what all sites share, once a run: the batch's rows of the bank, places in flat arrays, row starts.

    Args:
        emitter: of the outermost graph.
        axis: name of the axis kernel.
        inputs: ``values``, ``scales``, ``rows``, ``cols``.
        ids: checked rows of the bank, int64 [batch].
        shapes: (out, in) of every site.
        groups: sizes of the groups, whose sites follow one another.
    """
    # of the rows, not of the values: ORT's Size knows no float16 on the CPU and would cast the whole bank, every run
    gate = emitter.op("Greater", emitter.op("Size", inputs["rows"]), emitter.const(0, INT64))
    # outside the branch: ids beyond the bank are an error even when nothing is fed
    scales = emitter.op("Gather", inputs["scales"], ids, axis=0)
    then, other = emitter.branch("rows"), emitter.branch("none")
    batch = then.op("Shape", ids)
    number = then.op("Range", then.const(0, INT64), then.op("Squeeze", batch), then.const(1, INT64))
    results = [then.op("Unsqueeze", number, then.ints(1))]
    number = then.op("Cast", then.op("Reshape", number, then.ints(-1, 1, 1)), to=ir.DataType.INT32)
    ends = then.ints(0, 0, 0, 0, 0, 1)
    rows = then.op("Cast", then.op("Gather", inputs["rows"], ids, axis=0), to=ir.DataType.INT32)
    cols = then.op("Cast", then.op("Gather", inputs["cols"], ids, axis=0), to=ir.DataType.INT32)
    number = then.op("Add", number, _checked(then, rows, cols, shapes))
    values = then.op("Cast", then.op("Gather", inputs["values"], ids, axis=0), to=ir.DataType.FLOAT)
    values = then.op("Mul", values, then.op("Unsqueeze", scales, then.ints(2)))
    values = then.op("Unsqueeze", then.op("Pad", values, ends), then.ints(3))
    inner = np.array([shape[1] for shape in shapes], INT32).reshape(1, -1, 1)
    cols = then.op("Add", then.op("Pad", cols, ends), then.op("Mul", number, then.const(inner, INT32)))
    firsts = np.cumsum([0, *groups[:-1]]).tolist()
    results += [*_split(then, values, groups), *_split(then, cols, groups)]
    starts = _row_starts(then, rows, batch, number, shapes=shapes, groups=groups, axis=axis)
    results += starts.values()
    kinds = [INT64, *[FLOAT] * len(groups), *[INT32] * (len(groups) + len(shapes))]
    none = [other.op("Identity", other.const(np.zeros((0, 1)), INT64))]
    none += [other.op("Identity", other.const(np.zeros((0,), kind), kind)) for kind in kinds[1:]]
    for value, kind in zip(results + none, [*kinds, *kinds], strict=True):
        value.dtype = ir.DataType.from_numpy(np.dtype(kind))
    out = list(emitter.when(gate, then, results, other, none))
    count = len(groups)
    return SpectralBank(
        axis,
        gate,
        batch=out[0],
        values=dict(zip(firsts, out[1 : 1 + count], strict=True)),
        cols=dict(zip(firsts, out[1 + count : 1 + 2 * count], strict=True)),
        starts=dict(zip(starts, out[1 + 2 * count :], strict=True)),
    )


def _split(emitter: Emitter, array: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    """``array`` cut along the ``sites`` dimension (1)."""
    if len(sizes) == 1:
        return [array]
    return emitter.ops("Split", array, emitter.ints(*sizes), outputs=len(sizes), axis=1)


def _checked(emitter: Emitter, rows: ir.Value, cols: ir.Value, shapes: Sequence[tuple[int, int]]) -> ir.Value:
    """An int32 zero [1] that cannot be had when rows ascend or places lie outside their weights."""
    width = len(shapes)
    high_row = emitter.const(np.array([s[0] - 1 for s in shapes]).reshape(1, width, 1), INT32)
    high_col = emitter.const(np.array([s[1] - 1 for s in shapes]).reshape(1, width, 1), INT32)
    upper = emitter.op("Slice", rows, emitter.ints(0), emitter.ints(-1), emitter.ints(2))
    lower = emitter.op("Slice", rows, emitter.ints(1), emitter.ints(1 << 40), emitter.ints(2))
    # rows descend, so the first is the highest and the last the lowest
    first = emitter.op("Slice", rows, emitter.ints(0), emitter.ints(1), emitter.ints(2))
    last = emitter.op("Slice", rows, emitter.ints(-1), emitter.ints(1 << 40), emitter.ints(2))
    steps = emitter.op("Concat", emitter.op("Sub", upper, lower), emitter.op("Sub", high_row, first), last, axis=2)
    worst = [steps, emitter.op("Sub", high_col, cols), cols]
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
    groups: Sequence[int],
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
    sizes = np.repeat(groups, groups).reshape(1, -1, 1)
    places = np.concatenate([np.arange(size) for size in groups]).reshape(1, -1, 1)
    block = emitter.op("Add", emitter.op("Mul", number, emitter.const(sizes, INT32)), emitter.const(places, INT32))
    counts = emitter.op("Add", counts, emitter.op("Mul", block, length))
    starts: dict[int, ir.Value] = {}
    for out in sorted({shape[0] for shape in shapes}):
        blocks, width, _ = get_transform(axis).axis.two_stage(out).second.shape
        own = emitter.op("Slice", counts, emitter.ints(0), emitter.ints(out), emitter.ints(2))
        own = emitter.op("Reshape", own, emitter.ints(0, 0, blocks, width))
        steps = [emitter.ints(i) for i in (width, out + 1, 2, width)]
        after = emitter.op("Reshape", emitter.op("Slice", counts, *steps), emitter.ints(0, 0, blocks, 1))
        windows = _split(emitter, emitter.op("Concat", own, after, axis=3), [1] * len(shapes))
        starts |= {site: windows[site] for site, shape in enumerate(shapes) if shape[0] == out}
    return dict(sorted(starts.items()))


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
    modules = {call.module: call.outputs for call in calls}
    first = min(table[module] for module in modules)
    activation, tokens, n_in = calls[0].activation, calls[0].tokens, calls[0].inputs
    x = activation if tokens else emitter.op("Unsqueeze", activation, emitter.ints(1))
    if activation.shape is not None and len(activation.shape) == 4:
        x = emitter.op("Reshape", activation, emitter.ints(0, 0, n_in))
    z = _forward(emitter, x, get_transform(bank.axis).axis.two_stage(n_in))
    terms = emitter.op("Mul", emitter.op("Gather", z, bank.cols[first], axis=0), bank.values[first])
    sums = emitter.op("Flatten", emitter.op("CumSum", terms, emitter.const(2, INT64), exclusive=1), axis=3)
    answers: dict[str, ir.Value] = {}
    for module, n_out in modules.items():
        prefix = emitter.op("Gather", sums, bank.starts[table[module]], axis=0)
        y = _backward(emitter, prefix, get_transform(bank.axis).axis.two_stage(n_out))
        answers[module] = y if tokens else emitter.op("Squeeze", y, emitter.ints(1))
    return [answers[call.module] for call in calls]


def _forward(emitter: Emitter, x: ir.Value, stages: TwoStage) -> ir.Value:
    """F x for x [batch, tokens, n], as [batch·n, tokens] in the stages' order."""
    if stages.permutation is not None:
        x = emitter.op("Gather", x, emitter.ints(*stages.permutation.tolist()), axis=2)
    x = emitter.op("Transpose", x, perm=[0, 2, 1])
    if stages.p == 1:
        return emitter.op("Flatten", emitter.op("MatMul", emitter.const(stages.second[0], FLOAT), x), axis=2)
    blocks, width, _ = stages.second.shape
    x = emitter.op("Reshape", x, emitter.ints(0, stages.p, -1))
    x = emitter.op("MatMul", emitter.const(stages.first, FLOAT), x)
    x = emitter.op("Reshape", x, emitter.ints(0, blocks, width, -1))
    return emitter.op("Flatten", emitter.op("MatMul", emitter.const(stages.second, FLOAT), x), axis=3)


def _backward(emitter: Emitter, prefix: ir.Value, stages: TwoStage) -> ir.Value:
    """Fᵀ t for prefix rows [batch, 1, blocks, width+1, tokens] of t, as [batch, tokens, n]."""
    y = emitter.op("MatMul", emitter.const(differenced(stages), FLOAT), prefix)
    if stages.p > 1:
        y = emitter.op("Reshape", y, emitter.ints(0, stages.p, -1))
        y = emitter.op("MatMul", emitter.const(stages.first.T, FLOAT), y)
    y = emitter.op("Reshape", y, emitter.ints(0, stages.n, -1))
    y = emitter.op("Transpose", y, perm=[0, 2, 1])
    if stages.permutation is not None:
        y = emitter.op("Gather", y, emitter.ints(*np.argsort(stages.permutation).tolist()), axis=2)
    return y


def differenced(stages: TwoStage) -> NDArray[np.float64]:
    """``second[i]ᵀ D``, float64 [blocks, width, width+1]: takes prefix rows instead of their differences.

    ``(D P)[j] = P[j] − P[j+1]``.
    """
    transposed = stages.second.transpose(0, 2, 1)
    edge = np.zeros((*transposed.shape[:2], 1))
    return np.concatenate([transposed, edge], axis=2) - np.concatenate([edge, transposed], axis=2)

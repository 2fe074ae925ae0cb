"""Sparse spectra inside the graph: y += F_Mᵀ S F_N x for every row of the batch with its own S, and no ScatterND.

**What runs.** Per row of the batch and site, n coefficients (row u, column v, value s), compressed by rows (CSR). With
tokens as the last axis, z = F_N x is two MatMuls (`TwoStage`), shared by all sites that read x. Then

    w = s · z[v]            Gather of a batch row's tokens, Mul
    t[u] = Σ w over row u   the sparse sum
    y = F_Mᵀ t              two MatMuls

**The sparse sum.** ScatterND(add) is the obvious operator and loses additions: onnxruntime 1.31 splits its index
tuples over threads without a lock, and two threads adding to one row overwrite each other (measured: 200 of 200
runs wrong at 6,000 tuples on 50 rows with 2 threads). ScatterElements(add) is serial and right, and seven times slower.
So coefficients stand in ascending order of their row, and the sum over equal neighbours is a difference of prefix
sums, P[k] = Σ w over coefficients before k, at the ends of the row that the CSR row pointers r tell:

    t[u] = P[r[u+1]] − P[r[u]]

The difference is linear, so it lives inside the first factor of the backward transform, which then takes 2q+1 prefix
rows for 2q outputs. The cost of the prefix sums is their rounding: about 2⁻²⁴·√n of the largest |w|.

**Rows apart or together.** A batch row's activation is turned round once and stays on its own, forward and back, so
that what one core makes of it lies in that core's cache when the next step wants it. Graphs that read single tokens
take all rows ``together``: eight products of one column each take four times as long as one of eight columns. There
the first factor forward is small products on x as it lies, and what the second needs the other way round onnxruntime
fuses into its MatMul (FusedMatMul).

**Never a wrong answer.** Row pointers beyond the coefficients, or columns outside their weight, end in an error of
Gather (a one-element table asked for its second element); so do ids that are negative or beyond the bank.

**Cost.** `ssh-deploy bench bank` measures it. Half of what an active adapter adds at 8×64 on the BERT-base shape is the
transforms' MatMuls; the rest is one pass over [n, tokens] each for Gather, Mul, CumSum, Transpose and the addition. At
1×16 it is the number of nodes, some 40 a group of two sites and 2 µs each, and 0.3 ms a run for what all sites share.
So a backward transform per site, though sites of one width could share it: the copy that takes the shared result
apart costs more than the nodes saved; and the sites' arrays are cut apart once, not in every group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.sites import Call
from ssh_deploy.transforms import get_transform
from ssh_deploy.transforms.base import TwoStage

INT32, INT64, FLOAT = np.int32, np.int64, np.float32
#: Widest transform of single tokens that is one product: its matrix is read in the time of the nodes that it saves.
_DENSE = 256


@dataclass(frozen=True, slots=True, eq=False)
class SpectralBank:
    """Optional inputs of one axis kernel, and what the graph makes of them for a batch.

    ``gate`` is true when an adapter is there, and ``batch`` int64 [batch, 1] then numbers the batch's rows (else
    [0, 1]). By first site of a group of g sites: ``values`` f32 [batch, g, n+1, 1], scaled, one zero at the end, and
    ``cols`` int32 [batch, g, n+1], places in the flattened [batch·in] rows of z ([in·batch] where ``together``). By
    site: ``pointers`` int32 [batch, 1, blocks, width+1], or [1, blocks, width+1, batch] where ``together``, places in
    the flattened [batch·g·(n+1)] rows of the group's prefix sums. ``lead``: (batch, tokens) of the graph's input,
    symbolic; ``tokens`` int64 [2], (−1, its tokens), and by out ``spread`` int64 [3], (its batch, its tokens, out).
    """

    axis: str
    together: bool
    gate: ir.Value
    batch: ir.Value
    values: Mapping[int, ir.Value]
    cols: Mapping[int, ir.Value]
    pointers: Mapping[int, ir.Value]
    lead: tuple[object, object]
    tokens: ir.Value
    spread: Mapping[int, ir.Value]


def prepare(
    emitter: Emitter,
    axis: str,
    inputs: Mapping[str, ir.Value],
    pointers: Mapping[int, ir.Value],
    ids: ir.Value,
    *,
    like: ir.Value,
    shapes: Sequence[tuple[int, int]],
    groups: Sequence[int],
    together: bool,
) -> SpectralBank:
    """Emit what all sites share, once a run: the batch's rows of the bank, places in flat arrays, checks, lengths.

    Args:
        emitter: of the outermost graph.
        axis: name of the axis kernel.
        inputs: ``values``, ``scales``, ``cols``.
        pointers: by out, of its sites.
        ids: rows of the bank, one or one a batch row, int64, none negative.
        like: input of the graph, [batch, tokens, ..]; most activations have these leading sides.
        shapes: (out, in) of every site.
        groups: sizes of the groups, whose sites follow one another.
        together: batch rows share the products of both ways; for single tokens, whose products are narrow.
    """
    # of the places, not of the values: ORT's Size knows no float16 on the CPU and would cast the whole bank, every run
    gate = emitter.op("Greater", emitter.op("Size", inputs["cols"]), emitter.const(0, INT64))
    # outside the branch: ids beyond the bank are an error even when nothing is fed
    found = emitter.op("Gather", inputs["scales"], ids, axis=0)
    then, other = emitter.branch("rows"), emitter.branch("none")
    batch = then.op("Shape", like, start=0, end=1)
    ids = then.op("Reshape", then.op("Expand", ids, batch), batch)
    scales = then.op("Expand", found, then.op("Concat", batch, then.ints(1), axis=0))
    rows = then.op("Range", then.const(0, INT64), then.op("Size", ids), then.const(1, INT64))
    number = then.op("Cast", rows, to=ir.DataType.INT32)
    values = then.op("Cast", then.op("Gather", inputs["values"], ids, axis=0), to=ir.DataType.FLOAT)
    values = then.op("Mul", values, then.op("Unsqueeze", scales, then.ints(2)))
    end = then.ints(0, 0, 0, 0, 0, 1)
    values = then.op("Unsqueeze", then.op("Pad", values, end), then.ints(3))
    cols = then.op("Cast", then.op("Gather", inputs["cols"], ids, axis=0), to=ir.DataType.INT32)
    cols = then.op("Pad", cols, end)
    n = then.op("Cast", then.op("Shape", cols, start=2, end=3), to=ir.DataType.INT32)
    own = {out: then.op("Gather", value, ids, axis=0) for out, value in pointers.items()}
    if together:  # turned round while they are small
        own = {out: then.op("Transpose", value, perm=[1, 2, 0]) for out, value in own.items()}
    own = {out: then.op("Cast", value, to=ir.DataType.INT32) for out, value in own.items()}
    nil = _checked(then, cols, own.values(), n, shapes=shapes, small=inputs["cols"].dtype == ir.DataType.UINT16)
    number = then.op("Add", number, nil)
    cols = _flat(then, cols, number, shapes, together=together)
    places: dict[int, ir.Value] = {}
    for out, value in own.items():
        sites = [i for i, shape in enumerate(shapes) if shape[0] == out]
        windows = _windows(then, axis, out, value, number, n, sites, groups, together=together)
        places |= zip(sites, _split(then, windows, [1] * len(sites), axis=0 if together else 1), strict=True)
    sides = then.op("Shape", like, start=0, end=2)
    lengths = [then.op("Concat", then.ints(-1), then.op("Shape", like, start=1, end=2), axis=0)]
    lengths += [then.op("Concat", sides, then.ints(out), axis=0) for out in pointers]
    longs = [then.op("Unsqueeze", rows, then.ints(1)), *lengths]
    floats = _split(then, values, groups, axis=1)
    whole = [*_split(then, cols, groups, axis=1), *places.values()]
    # every output of a branch wants a node of that branch: here one node for all of a dtype
    none = [*_split(other, other.const(np.zeros((0, 1)), INT64), [0] * len(longs), axis=0)]
    none += _split(other, other.const(np.zeros(0), FLOAT), [0] * len(floats), axis=0)
    none += _split(other, other.const(np.zeros(0), INT32), [0] * len(whole), axis=0)
    results = [*longs, *floats, *whole]
    kinds = [INT64] * len(longs) + [FLOAT] * len(floats) + [INT32] * len(whole)
    for value, kind in zip(results + none, [*kinds, *kinds], strict=True):
        value.dtype = ir.DataType.from_numpy(np.dtype(kind))
    made = iter(emitter.when(gate, then, results, other, none))
    number, tokens = next(made), next(made)
    spread = dict(zip(pointers, islice(made, len(pointers)), strict=True))
    firsts = np.cumsum([0, *groups[:-1]]).tolist()
    of_values, of_cols = (dict(zip(firsts, islice(made, len(groups)), strict=True)) for _ in range(2))
    of_pointers = dict(zip(places, made, strict=True))
    lead = _leading(like)
    assert lead is not None
    return SpectralBank(axis, together, gate, number, of_values, of_cols, of_pointers, lead, tokens, spread)


def _split(emitter: Emitter, array: ir.Value, sizes: Sequence[int], *, axis: int) -> Sequence[ir.Value]:
    """``array`` cut along ``axis``."""
    return emitter.ops("Split", array, emitter.ints(*sizes), outputs=len(sizes), axis=axis)


def _checked(
    emitter: Emitter,
    cols: ir.Value,
    pointers: Iterable[ir.Value],
    n: ir.Value,
    *,
    shapes: Sequence[tuple[int, int]],
    small: bool,
) -> ir.Value:
    """An int32 zero [1] that cannot be had when a place lies outside its weight or a pointer beyond P.

    ``small``: columns were unsigned. Pointers always are.
    """
    highest = emitter.const(np.array([[inn - 1 for _, inn in shapes]]), INT32)
    room = [emitter.op("Sub", highest, emitter.op("ReduceMax", cols, emitter.ints(2), keepdims=0))]
    if not small:
        room.append(cols)
    room = [emitter.op("ReduceMin", value, keepdims=0) for value in room]
    last = emitter.op("Squeeze", emitter.op("Sub", n, emitter.const([1], INT32)))
    room += [emitter.op("Sub", last, emitter.op("ReduceMax", value, keepdims=0)) for value in pointers]
    broken = emitter.op(
        "Cast", emitter.op("Less", emitter.op("Min", *room), emitter.const(0, INT32)), to=ir.DataType.INT64
    )
    return emitter.op("Gather", emitter.const([0], INT32), emitter.op("Reshape", broken, emitter.ints(1)), axis=0)


def _flat(
    emitter: Emitter, cols: ir.Value, number: ir.Value, shapes: Sequence[tuple[int, int]], *, together: bool
) -> ir.Value:
    """Places of ``cols`` [batch, sites, n+1] in the flattened rows of z; ``number`` [batch] counts the batch's rows."""
    number = emitter.op("Reshape", number, emitter.ints(-1, 1, 1))
    if together:
        size = emitter.op("Cast", emitter.op("Size", number), to=ir.DataType.INT32)
        return emitter.op("Add", emitter.op("Mul", cols, size), number)
    sides = emitter.const(np.array([[[n_in] for _, n_in in shapes]]), INT32)
    return emitter.op("Add", cols, emitter.op("Mul", number, sides))


def _windows(
    emitter: Emitter,
    axis: str,
    out: int,
    pointers: ir.Value,
    number: ir.Value,
    n: ir.Value,
    sites: Sequence[int],
    groups: Sequence[int],
    *,
    together: bool,
) -> ir.Value:
    """Places of the prefix rows that each block of the backward transform of ``sites`` takes."""
    blocks, width, _ = get_transform(axis).axis.two_stage(out).second.shape
    window = width * np.arange(blocks)[:, None] + np.arange(width + 1)
    lead = (-1, 1, 1, 1) if together else (1, -1, 1, 1)
    size = np.repeat(groups, groups)[sites].reshape(lead)
    within = np.concatenate([np.arange(g) for g in groups])[sites].reshape(lead)
    number = number if together else emitter.op("Reshape", number, emitter.ints(-1, 1, 1, 1))
    block = emitter.op("Mul", number, emitter.const(size, INT32))
    block = emitter.op("Mul", emitter.op("Add", block, emitter.const(within, INT32)), n)
    own = emitter.op("Gather", pointers, emitter.const(window, INT64), axis=1 if together else 2)
    return emitter.op("Add", own, block)


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
    x, n_in = calls[0].activation, calls[0].inputs
    one, tokens, spread = not calls[0].tokens, bank.tokens, bank.spread
    if one:
        tokens, spread = emitter.ints(-1, 1), {out: emitter.ints(-1, out) for out in spread}
    elif _leading(x) != bank.lead:
        tokens = emitter.op("Concat", emitter.ints(-1), emitter.op("Shape", x, start=1, end=2), axis=0)
        sides = emitter.op("Shape", x, start=0, end=2)
        spread = {out: emitter.op("Concat", sides, emitter.ints(out), axis=0) for out in set(modules.values())}
    stages = get_transform(bank.axis).axis.two_stage(n_in)
    z = _forward_together(emitter, x, stages) if bank.together else _forward(emitter, x, stages, one=one)
    z = emitter.op("Reshape", z, tokens)
    terms = emitter.op("Mul", emitter.op("Gather", z, bank.cols[first], axis=0), bank.values[first])
    sums = emitter.op("Flatten", emitter.op("CumSum", terms, emitter.const(2, INT64), exclusive=1), axis=3)
    answers: dict[str, ir.Value] = {}
    for module, out in modules.items():
        prefix = emitter.op("Gather", sums, bank.pointers[table[module]], axis=0)
        stages = get_transform(bank.axis).axis.two_stage(out)
        if bank.together:
            answers[module] = emitter.op("Reshape", _backward_together(emitter, prefix, stages), spread[out])
        else:
            y = _backward(emitter, prefix, stages)
            answers[module] = emitter.op("Reshape", y, spread[out]) if one else y
    return [answers[call.module] for call in calls]


def _leading(value: ir.Value) -> tuple[object, object] | None:
    """The first two sides, None where they are not known."""
    sides = value.shape
    if sides is None or len(sides) < 2:
        return None
    found = tuple(side if isinstance(side, int) else side.value for side in sides[:2])
    return None if None in found else (found[0], found[1])


def _forward(emitter: Emitter, x: ir.Value, stages: TwoStage, *, one: bool) -> ir.Value:
    """F x for x [batch, tokens, n], or [batch, n] where ``one``, as [batch, .., .., tokens] in the stages' order."""
    blocks, width, _ = stages.second.shape
    if not one:
        if x.shape is None or len(x.shape) != 3:
            x = emitter.op("Reshape", x, emitter.ints(0, 0, stages.n))
        x = emitter.op("Transpose", x, perm=[0, 2, 1])
    if stages.permutation is not None:
        x = emitter.op("Gather", x, emitter.ints(*stages.permutation.tolist()), axis=1)
    if stages.p > 1:
        x = emitter.op("Reshape", x, emitter.ints(0, stages.p, -1))
        x = emitter.op("MatMul", emitter.const(stages.first, FLOAT), x)
    x = emitter.op("Reshape", x, emitter.ints(0, blocks, width, -1))
    return emitter.op("MatMul", emitter.const(stages.second, FLOAT), x)


def _forward_together(emitter: Emitter, x: ir.Value, stages: TwoStage) -> ir.Value:
    """F x for x [batch, tokens, n], as [.., .., batch·tokens] in the stages' order."""
    if stages.permutation is not None:
        x = emitter.op("Reshape", x, emitter.ints(-1, stages.n))
        x = emitter.op("Gather", x, emitter.ints(*stages.permutation.tolist()), axis=1)
    if stages.p > 1:
        x = emitter.op("Reshape", x, emitter.ints(-1, stages.p, stages.q))
        x = emitter.op("MatMul", emitter.const(stages.first, FLOAT), x)
    blocks, width, _ = stages.second.shape
    x = emitter.op("Reshape", x, emitter.ints(-1, blocks, width))
    # a MatMul that reads its second factor turned round: onnxruntime fuses the two
    return emitter.op("MatMul", emitter.const(stages.second, FLOAT), emitter.op("Transpose", x, perm=[1, 2, 0]))


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


def _backward_together(emitter: Emitter, prefix: ir.Value, stages: TwoStage) -> ir.Value:
    """Fᵀ t for prefix rows [1, blocks, width+1, batch, tokens] of t, as [batch·tokens, n] or with n taken apart."""
    blocks, width, _ = stages.second.shape
    if stages.n <= _DENSE:
        rows = emitter.op("Reshape", prefix, emitter.ints(blocks * (width + 1), -1))
        return emitter.op("MatMul", emitter.op("Transpose", rows, perm=[1, 0]), emitter.const(composed(stages), FLOAT))
    second, first = backward_factors(stages)
    y = emitter.op("Reshape", prefix, emitter.ints(blocks, width + 1, -1))
    y = emitter.op("MatMul", emitter.const(second, FLOAT), y)
    y = emitter.op("Transpose", emitter.op("Reshape", y, emitter.ints(stages.p, stages.q, -1)), perm=[2, 0, 1])
    if stages.p > 1:
        y = emitter.op("MatMul", emitter.const(first, FLOAT), y)
    if stages.permutation is not None:
        y = emitter.op("Reshape", y, emitter.ints(-1, stages.n))
        y = emitter.op("Gather", y, emitter.ints(*np.argsort(stages.permutation).tolist()), axis=1)
    return y


def composed(stages: TwoStage) -> NDArray[np.float64]:
    """What `_backward_together` makes of prefix rows, as one matrix f64 [blocks·(width+1), n]: y = Pᵀ times it."""
    second, first = backward_factors(stages)
    blocks, width, _ = stages.second.shape
    dense = second[0].T
    if stages.p > 1:
        apart = np.zeros((2, blocks, stages.q, blocks, width + 1))  # each block reads its own window
        for block in range(blocks):
            apart[:, block, :, block] = second[:, block]
        apart = apart.reshape(stages.p, stages.q, -1)
        dense = np.einsum("op,pqr->roq", first, apart).reshape(-1, stages.n)
    return dense if stages.permutation is None else dense[:, np.argsort(stages.permutation)]


def differenced(stages: TwoStage) -> NDArray[np.float64]:
    """``second[i]ᵀ D`` f64 [blocks, width, width+1]: takes prefix rows P instead of t, ``t[u] = P[u+1] − P[u]``."""
    turned = stages.second.transpose(0, 2, 1)
    edge = np.zeros((*turned.shape[:2], 1))
    return np.concatenate([edge, turned], axis=2) - np.concatenate([turned, edge], axis=2)


def backward_factors(stages: TwoStage) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factors of Fᵀ as `_backward_together` takes them.

    Returns:
        `differenced` as [2, blocks, q, width+1], the halves of each block's outputs apart ([1, n, n+1] with ``p = 1``);
        and ``firstᵀ`` [p, p], its columns in the order (half, block).
    """
    second = differenced(stages)
    if stages.p == 1:
        return second, stages.first
    blocks, width, _ = stages.second.shape
    second = second.reshape(blocks, 2, stages.q, width + 1).transpose(1, 0, 2, 3)
    return second, stages.first.T.reshape(-1, blocks, 2).transpose(0, 2, 1).reshape(stages.p, stages.p)

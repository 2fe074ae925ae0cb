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

The difference is linear, so it lives inside the first factor of the way back (`stages`). The cost of the prefix sums is
their rounding: about 2⁻²⁴·√n of the largest |w|.

**Rows apart or together** (`stages`). In graphs that read single tokens the batch's rows stand beside one another,
last, in every array: CumSum then adds them side by side, and not one row's thousand numbers after the other's (3 µs
for eight rows of two sites, and 42). And with one token a place is one number, which GatherElements fetches six times
faster than Gather, which copies runs (1.5 and 9.7 µs for 1,502 numbers; 10 and 38 for eight rows). It wants flat
arrays. So a graph of single tokens has both behind one more If, for one token and for the many of a prompt. That costs
a single row what it saves, and takes 6 % of the time from a batch of eight (SmolLM2's shape, query and value).

**Never a wrong answer.** Row pointers beyond the coefficients, or columns outside their weight, end in an error of
Gather (a one-element table asked for its second element); so do ids that are negative or beyond the bank.

**Cost.** `ssh-deploy bench bank` measures it. Half of what an active adapter adds at 8×64 on the BERT-base shape is the
transforms' MatMuls; the rest is one pass over [n, tokens] each for Gather, Mul, CumSum, Transpose and the addition. At
1×16 it is the number of nodes, some 40 a group of two sites and 2 µs each, and 0.3 ms a run for what all sites share.
So a backward transform per site, though sites of one width could share it: the copy that takes the shared result
apart costs more than the nodes saved; and the sites' arrays are cut apart once, not in every group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.lowering.stages import backward, backward_together, forward, forward_together
from ssh_deploy.graph.sites import Call
from ssh_deploy.transforms import get_transform

INT32, INT64, FLOAT = np.int32, np.int64, np.float32


@dataclass(frozen=True, slots=True, eq=False)
class SpectralBank:
    """Optional inputs of one axis kernel, and what the graph makes of them for a batch.

    ``gate`` is true when an adapter is there, and ``batch`` int64 [batch, 1] then numbers the batch's rows (else
    [0, 1]). ``lead``: (batch, tokens) of the graph's input, symbolic; ``tokens`` int64 [2], (−1, its tokens), and by
    out ``spread`` int64 [3], (its batch, its tokens, out).

    By first site of a group of g sites: ``values`` f32 [batch, g, n+1, 1], scaled, one zero at the end, and ``cols``
    int32 [batch, g, n+1], places in the flattened [batch·in] rows of z. By site: ``pointers`` int32 [batch, 1, blocks,
    width+1], places in the flattened [batch·g·(n+1)] rows of the group's prefix sums.

    In graphs of single tokens there is ``single``, true when the input is one token, and rows are together: values and
    cols are flat [g·(n+1)·batch], places those of [in·batch] rows; pointers flat [blocks·(width+1)·batch], those of
    [g·(n+1)·batch]; ``counts`` int64 [3] by g is (g, n+1, −1).
    """

    axis: str
    gate: ir.Value
    batch: ir.Value
    values: Mapping[int, ir.Value]
    cols: Mapping[int, ir.Value]
    pointers: Mapping[int, ir.Value]
    lead: tuple[object, object]
    tokens: ir.Value
    spread: Mapping[int, ir.Value]
    single: ir.Value | None
    counts: Mapping[int, ir.Value]


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
    then = emitter.branch("rows")
    batch = then.op("Shape", like, start=0, end=1)
    ids = then.op("Reshape", then.op("Expand", ids, batch), batch)
    rows = then.op("Range", then.const(0, INT64), then.op("Size", ids), then.const(1, INT64))
    number = then.op("Cast", rows, to=ir.DataType.INT32)
    scales = then.op("Expand", found, then.op("Concat", batch, then.ints(1), axis=0))
    values, cols, own = _fetched(then, inputs, pointers, ids, scales)
    length = then.op("Shape", cols, start=2, end=3)
    n = then.op("Cast", length, to=ir.DataType.INT32)
    nil = _checked(then, cols, own.values(), n, shapes=shapes, small=inputs["cols"].dtype == ir.DataType.UINT16)
    number = then.op("Reshape", then.op("Add", number, nil), then.ints(-1, 1, 1))
    side = then.op("Cast", batch, to=ir.DataType.INT32) if together else None
    cols = _flat_columns(then, cols, number, side, shapes)
    places: dict[int, ir.Value] = {}
    for out, value in own.items():
        sites = [i for i, shape in enumerate(shapes) if shape[0] == out]
        windows = _flat_windows(then, _windows(then, axis, out, value), number, side, n, sites, groups)
        if together:
            windows = then.op("Reshape", then.op("Transpose", windows, perm=[1, 2, 3, 0]), then.ints(-1))
        each = then.ops("Split", windows, outputs=len(sites), axis=0 if together else 1, num_outputs=len(sites))
        places |= zip(sites, each, strict=True)
    size = then.op("Shape", like, start=1, end=2)
    lengths = [then.op("Concat", then.ints(-1), size, axis=0)]
    lengths += [then.op("Concat", batch, size, then.ints(out), axis=0) for out in pointers]
    singles: list[ir.Value] = []
    counts: list[ir.Value] = []
    parts, cut = then.ints(*groups), 1
    if together:
        values, cols = (
            then.op("Reshape", then.op("Transpose", array, perm=[1, 2, 0]), then.ints(-1)) for array in (values, cols)
        )
        parts, cut = then.op("Mul", parts, then.op("Mul", length, batch)), 0
        singles = [then.op("Equal", size, then.ints(1))]
        counts = [then.op("Concat", then.ints(g), length, then.ints(-1), axis=0) for g in sorted(set(groups))]
    else:
        values = then.op("Unsqueeze", values, then.ints(3))
    floats, wholes = (then.ops("Split", array, parts, outputs=len(groups), axis=cut) for array in (values, cols))
    longs = [then.op("Unsqueeze", rows, then.ints(1)), *lengths, *counts]
    whole = [*wholes, *places.values()]
    results = {INT64: longs, FLOAT: floats, INT32: whole, np.bool_: singles}
    made = _behind(emitter, gate, then, results)
    number, tokens = next(made), next(made)
    spread = dict(zip(pointers, islice(made, len(pointers)), strict=True))
    by_size = dict(zip(sorted(set(groups)), islice(made, len(counts)), strict=True)) if together else {}
    firsts = np.cumsum([0, *groups[:-1]]).tolist()
    of_values, of_cols = (dict(zip(firsts, islice(made, len(groups)), strict=True)) for _ in range(2))
    of_pointers = dict(zip(places, islice(made, len(places)), strict=True))
    lead = _leading(like)
    assert lead is not None
    single = next(made, None)
    return SpectralBank(axis, gate, number, of_values, of_cols, of_pointers, lead, tokens, spread, single, by_size)


def _fetched(
    emitter: Emitter,
    inputs: Mapping[str, ir.Value],
    pointers: Mapping[int, ir.Value],
    ids: ir.Value,
    scales: ir.Value,
) -> tuple[ir.Value, ir.Value, dict[int, ir.Value]]:
    """The batch's rows of the bank: values, scaled, and columns [batch, sites, n+1], a zero last; pointers by out."""
    end = emitter.ints(0, 0, 0, 0, 0, 1)
    values = emitter.op("Cast", emitter.op("Gather", inputs["values"], ids, axis=0), to=ir.DataType.FLOAT)
    values = emitter.op("Mul", values, emitter.op("Unsqueeze", scales, emitter.ints(2)))
    cols = emitter.op("Cast", emitter.op("Gather", inputs["cols"], ids, axis=0), to=ir.DataType.INT32)
    own = {out: emitter.op("Gather", value, ids, axis=0) for out, value in pointers.items()}
    own = {out: emitter.op("Cast", value, to=ir.DataType.INT32) for out, value in own.items()}
    return emitter.op("Pad", values, end), emitter.op("Pad", cols, end), own


def _behind(
    emitter: Emitter, gate: ir.Value, then: Emitter, results: Mapping[type, Sequence[ir.Value]]
) -> Iterator[ir.Value]:
    """``results`` of ``then`` by dtype, one after another, or as many without elements where ``gate`` is false.

    Every output of a branch wants a node of that branch: here one node for all of a dtype.
    """
    other = emitter.branch("none")
    none: list[ir.Value] = []
    for kind, values in results.items():
        if not values:
            continue
        shape = (0, 1) if kind is INT64 else (0,)  # the batch's row numbers have two sides
        empty = other.const(np.zeros(shape), kind)
        none += other.ops("Split", empty, other.ints(*[0] * len(values)), outputs=len(values), axis=0)
        for value in (*values, *none[-len(values) :]):
            value.dtype = ir.DataType.from_numpy(np.dtype(kind))
    return iter(emitter.when(gate, then, [value for values in results.values() for value in values], other, none))


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


def _flat_columns(
    emitter: Emitter, cols: ir.Value, number: ir.Value, side: ir.Value | None, shapes: Sequence[tuple[int, int]]
) -> ir.Value:
    """``cols`` [batch, sites, n+1] as places in the flattened rows of z: (batch row, column).

    ``number`` [batch, 1, 1] counts the batch's rows; ``side``: how many, where they come last.
    """
    if side is not None:
        return emitter.op("Add", emitter.op("Mul", cols, side), number)
    return emitter.op("Add", cols, emitter.op("Mul", number, emitter.const([[[inn] for _, inn in shapes]], INT32)))


def _windows(emitter: Emitter, axis: str, out: int, pointers: ir.Value) -> ir.Value:
    """``pointers`` [batch, sites, out+1] as each block of the way back takes them: [batch, sites, blocks, width+1]."""
    blocks, width, _ = get_transform(axis).axis.two_stage(out).second.shape
    along, step = emitter.ints(2), emitter.ints(width)
    own = emitter.op("Slice", pointers, emitter.ints(0), emitter.ints(out), along)
    edge = emitter.op("Slice", pointers, step, emitter.ints(out + 1), along, step)
    own = emitter.op("Reshape", own, emitter.ints(0, 0, blocks, width))
    return emitter.op("Concat", own, emitter.op("Unsqueeze", edge, emitter.ints(3)), axis=3)


def _flat_windows(
    emitter: Emitter,
    windows: ir.Value,
    number: ir.Value,
    side: ir.Value | None,
    n: ir.Value,
    sites: Sequence[int],
    groups: Sequence[int],
) -> ir.Value:
    """``windows`` of ``sites`` as places in the flattened rows of prefix sums: (batch row, site of its group, row).

    ``number``, ``side``: as in `_flat_columns`.
    """
    number = emitter.op("Unsqueeze", number, emitter.ints(3))
    within = emitter.const(np.concatenate([np.arange(g) for g in groups])[sites].reshape(1, -1, 1, 1), INT32)
    if side is not None:
        places = emitter.op("Add", windows, emitter.op("Mul", within, n))
        return emitter.op("Add", emitter.op("Mul", places, side), number)
    size = emitter.const(np.repeat(groups, groups)[sites].reshape(1, -1, 1, 1), INT32)
    start = emitter.op("Add", emitter.op("Mul", number, size), within)
    return emitter.op("Add", windows, emitter.op("Mul", start, n))


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
    one, tokens, spread, single = not calls[0].tokens, bank.tokens, bank.spread, bank.single
    if one:
        tokens, spread = emitter.ints(-1, 1), {out: emitter.ints(-1, out) for out in spread}
    elif _leading(x) != bank.lead:
        tokens = emitter.op("Concat", emitter.ints(-1), emitter.op("Shape", x, start=1, end=2), axis=0)
        sides = emitter.op("Shape", x, start=0, end=2)
        spread = {out: emitter.op("Concat", sides, emitter.ints(out), axis=0) for out in set(modules.values())}
        single = None  # how many tokens the input has does not say how many these are
    axis = get_transform(bank.axis).axis
    values, cols = bank.values[first], bank.cols[first]
    pointers = [bank.pointers[table[module]] for module in modules]
    answers: dict[str, ir.Value] = {}
    if bank.single is None:
        z = emitter.op("Reshape", forward(emitter, x, axis.two_stage(n_in), one=one), tokens)
        w = emitter.op("Mul", emitter.op("Gather", z, cols, axis=0), values)
        sums = emitter.op("Flatten", emitter.op("CumSum", w, emitter.const(2, INT64), exclusive=1), axis=3)
        for (module, out), places in zip(modules.items(), pointers, strict=True):
            y = backward(emitter, emitter.op("Gather", sums, places, axis=0), axis.two_stage(out))
            answers[module] = emitter.op("Reshape", y, spread[out]) if one else y
    else:
        z = forward_together(emitter, x, axis.two_stage(n_in))
        parts = z, values, cols, pointers, bank.counts[len(modules)]
        if single is None:
            prefixes: Sequence[ir.Value] = _prefixes_of_tokens(emitter, *parts, tokens)
        else:
            token, many = emitter.branch("token"), emitter.branch("tokens")
            alone, beside = _prefixes_of_token(token, *parts), _prefixes_of_tokens(many, *parts, tokens)
            prefixes = emitter.when(single, token, alone, many, beside)
        for (module, out), prefix in zip(modules.items(), prefixes, strict=True):
            answers[module] = emitter.op(
                "Reshape", backward_together(emitter, prefix, axis.two_stage(out)), spread[out]
            )
    return [answers[call.module] for call in calls]


def _prefixes_of_token(
    emitter: Emitter,
    z: ir.Value,
    values: ir.Value,
    cols: ir.Value,
    pointers: Sequence[ir.Value],
    counts: ir.Value,
) -> list[ir.Value]:
    """Prefix rows of every site of a group where every batch row has one token, [blocks·(width+1)·batch]."""
    w = emitter.op("GatherElements", emitter.op("Reshape", z, emitter.ints(-1)), cols, axis=0)
    w = emitter.op("Reshape", emitter.op("Mul", w, values), counts)
    sums = emitter.op("Reshape", emitter.op("CumSum", w, emitter.const(1, INT64), exclusive=1), emitter.ints(-1))
    return _floats(emitter.op("GatherElements", sums, places, axis=0) for places in pointers)


def _prefixes_of_tokens(
    emitter: Emitter,
    z: ir.Value,
    values: ir.Value,
    cols: ir.Value,
    pointers: Sequence[ir.Value],
    counts: ir.Value,
    tokens: ir.Value,
) -> list[ir.Value]:
    """Prefix rows of every site of a group, [blocks·(width+1)·batch, tokens]; ``tokens`` is (−1, how many)."""
    w = emitter.op("Gather", emitter.op("Reshape", z, tokens), cols, axis=0)
    w = emitter.op("Reshape", emitter.op("Mul", w, emitter.op("Unsqueeze", values, emitter.ints(1))), counts)
    sums = emitter.op("Reshape", emitter.op("CumSum", w, emitter.const(1, INT64), exclusive=1), tokens)
    return _floats(emitter.op("Gather", sums, places, axis=0) for places in pointers)


def _floats(values: Iterable[ir.Value]) -> list[ir.Value]:
    """``values``, known to be float32, as the outputs of a branch must be."""
    found = list(values)
    for value in found:
        value.dtype = ir.DataType.FLOAT
    return found


def _leading(value: ir.Value) -> tuple[object, object] | None:
    """The first two sides, None where they are not known."""
    sides = value.shape
    if sides is None or len(sides) < 2:
        return None
    found = tuple(side if isinstance(side, int) else side.value for side in sides[:2])
    return None if None in found else (found[0], found[1])

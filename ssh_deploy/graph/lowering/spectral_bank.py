"""What the graph makes once a run of an axis kernel's bank: the batch's rows of it, checked, as flat places.

Every group of sites reads its part of it (`lowering.spectral`). All but the cutting apart stands behind one If, so that
without an adapter nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.lowrank_rows import sites_by_width
from ssh_deploy.transforms import get_transform

INT32, INT64, FLOAT = np.int32, np.int64, np.float32
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Coefficients for any number of tokens, which are the last axis.

    By first site of a group of g sites: ``values`` f32 [batch, g, n+1, 1], scaled, one zero at the end, and ``cols``
    int32 [batch, g, n+1], places in the flattened [batch·in] rows of z. By site: ``pointers`` int32 [batch, 1, blocks,
    width+1], places in the flattened [batch·g·(n+1)] rows of the group's prefix sums.
    """

    values: Mapping[int, ir.Value]
    cols: Mapping[int, ir.Value]
    pointers: Mapping[int, ir.Value]


@dataclass(frozen=True, slots=True, eq=False)
class RowPlaces:
    """Coefficients as one token a batch row wants them: places in the batch row's own numbers.

    ``single`` is true when an adapter is there and the input is one token a batch row.

    By first site of a group of g sites: ``values`` f32 and ``cols`` int32 [batch, g·(n+1)]. By first site and `form`:
    ``windows`` int32 [batch, Σ blocks·(width+1)], places in the group's g·(n+1) prefix sums, of the group's sites of
    that form one after another. ``number`` int32 [batch, 1, 1] counts the batch rows.
    """

    single: ir.Value
    values: Mapping[int, ir.Value]
    cols: Mapping[int, ir.Value]
    windows: Mapping[tuple[int, tuple[int, int]], ir.Value]
    number: ir.Value


@dataclass(frozen=True, slots=True, eq=False)
class SpectralBank:
    """Optional inputs of one axis kernel, and what the graph makes of them for a batch.

    ``gate`` is true when an adapter is there, and ``batch`` int64 [batch, 1] then numbers the batch's rows (else
    [0, 1]). ``lead``: (batch, tokens) of the graph's input, symbolic. ``places`` are `RowPlaces` in graphs of single
    tokens; ``gate_first`` tells whether groups of these are to ask for an adapter before they ask for the length.
    """

    axis: str
    gate: ir.Value
    batch: ir.Value
    lead: tuple[object, object]
    places: Places | RowPlaces
    gate_first: bool


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
    layers: int,
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
        layers: with a cache, of a graph that reads single tokens; 0: it does not.
    """
    # of the places, not of the values: ORT's Size knows no float16 on the CPU and would cast the whole bank, every run
    gate = emitter.op("Greater", emitter.op("Size", inputs["cols"]), emitter.const(0, INT64))
    # outside the branch: ids beyond the bank are an error even when nothing is fed
    found = emitter.op("Gather", inputs["scales"], ids, axis=0)
    then = emitter.branch("rows")
    batch = then.op("Shape", like, start=0, end=1)
    ids = then.op("Reshape", then.op("Expand", ids, batch), batch)
    rows = then.op("Range", then.const(0, INT64), then.op("Size", ids), then.const(1, INT64))
    number = then.op("Reshape", then.op("Cast", rows, to=ir.DataType.INT32), then.ints(-1, 1, 1))
    scales = then.op("Expand", found, then.op("Concat", batch, then.ints(1), axis=0))
    values, cols, own = _fetched(then, inputs, pointers, ids, scales)
    length = then.op("Shape", cols, start=2, end=3)
    n = then.op("Cast", length, to=ir.DataType.INT32)
    nil = _checked(then, cols, own.values(), n, shapes=shapes, small=inputs["cols"].dtype == ir.DataType.UINT16)
    number = then.op("Add", number, nil)
    windows = {out: _windows(then, axis, out, value) for out, value in own.items()}
    counted = then.op("Unsqueeze", rows, then.ints(1))
    outs, lead = [shape[0] for shape in shapes], leading(like)
    assert lead is not None
    sites, firsts = len(shapes), np.cumsum([0, *groups[:-1]]).tolist()
    places: RowPlaces | Places
    if layers:
        forms = _windows_of_forms(then, axis, windows, n, outs, groups)
        results = [(counted, _none(INT64, 1)), (values, _none(FLOAT, sites, 1)), (cols, _none(INT32, sites, 1))]
        results += [(whole, _none(INT32, sum(lengths.values()), 1)) for whole, lengths in forms.values()]
        counted, *arrays, number = _behind(emitter, gate, then, [*results, (number, _none(INT32, 1, 1))])
        # out here they are flattened where they lie; a branch would copy them
        flat = [emitter.op("Flatten", array, axis=1) for array in arrays]
        single = emitter.op("Equal", emitter.op("Shape", like, start=1, end=2), emitter.ints(1))
        width = emitter.op("Add", emitter.op("Shape", inputs["cols"], start=2, end=3), emitter.const([1], INT64))
        parts = emitter.op("Mul", emitter.ints(*groups), width)
        of_forms: dict[tuple[int, tuple[int, int]], ir.Value] = {}
        for array, (one, (_, lengths)) in zip(flat[2:], forms.items(), strict=True):
            of_forms |= _cut(emitter, array, emitter.ints(*lengths.values()), [(start, one) for start in lengths])
        of_values, of_cols = (_cut(emitter, array, parts, firsts) for array in flat[:2])
        places = RowPlaces(emitter.op("And", gate, single), of_values, of_cols, of_forms, number)
    else:
        members = sites_by_width(outs)
        first = then.const([[[inn] for _, inn in shapes]], INT32)
        values = then.op("Unsqueeze", values, then.ints(3))
        cols = then.op("Add", cols, then.op("Mul", number, first))
        results = [(counted, _none(INT64, 1)), (values, _none(FLOAT, sites, 0, 1)), (cols, _none(INT32, sites, 0))]
        for out, value in windows.items():
            _, block = form(axis, out)
            none = _none(INT32, len(members[out]), out // block, block + 1)
            results.append((_flat_windows(then, value, number, n, members[out], groups), none))
        counted, *cut = _behind(emitter, gate, then, results)
        of_sites: dict[int, ir.Value] = {}
        for array, out in zip(cut[2:], windows, strict=True):
            of_sites |= _cut(emitter, array, emitter.ints(*[1] * len(members[out])), members[out])
        of_values, of_cols = (_cut(emitter, array, emitter.ints(*groups), firsts) for array in cut[:2])
        places = Places(of_values, of_cols, of_sites)
    return SpectralBank(axis, gate, counted, lead, places, gate_first=len(groups) <= layers)


def form(axis: str, out: int) -> tuple[int, int]:
    """Sites of one form share the products of the way back: q and the width of its blocks."""
    (p, q), _ = get_transform(axis).axis.output_order(out)
    return q, q if p == 1 else 2 * q


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


def _none(kind: type, *sides: int) -> NDArray[Any]:
    """What stands for an array [batch, ``sides``] where there is no adapter: no batch rows."""
    return np.zeros((0, *sides), kind)


def _behind(
    emitter: Emitter, gate: ir.Value, then: Emitter, results: Sequence[tuple[ir.Value, NDArray[Any]]]
) -> Sequence[ir.Value]:
    """The values of ``then``, or where ``gate`` is false what stands with each of them in ``results``.

    They are cut apart outside: each output of an If costs a microsecond more.
    """
    other = emitter.branch("none")
    # an output wants a node of its branch
    nones = [other.op("Identity", other.const(none, none.dtype)) for _, none in results]
    for (value, none), instead in zip(results, nones, strict=True):
        value.dtype = instead.dtype = ir.DataType.from_numpy(none.dtype)
    return emitter.when(gate, then, [value for value, _ in results], other, nones)


def _cut(emitter: Emitter, array: ir.Value, lengths: ir.Value, keys: Sequence[Key]) -> dict[Key, ir.Value]:
    """``array`` cut apart along its second axis into ``lengths``, a part for each of ``keys``."""
    return dict(zip(keys, emitter.ops("Split", array, lengths, outputs=len(keys), axis=1), strict=True))


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


def _windows(emitter: Emitter, axis: str, out: int, pointers: ir.Value) -> ir.Value:
    """``pointers`` [batch, sites, out+1] as each block of the way back takes them: [batch, sites, blocks, width+1]."""
    _, width = form(axis, out)
    along, step = emitter.ints(2), emitter.ints(width)
    own = emitter.op("Slice", pointers, emitter.ints(0), emitter.ints(out), along)
    edge = emitter.op("Slice", pointers, step, emitter.ints(out + 1), along, step)
    own = emitter.op("Reshape", own, emitter.ints(0, 0, out // width, width))
    return emitter.op("Concat", own, emitter.op("Unsqueeze", edge, emitter.ints(3)), axis=3)


def _flat_windows(
    emitter: Emitter,
    windows: ir.Value,
    number: ir.Value,
    n: ir.Value,
    sites: Sequence[int],
    groups: Sequence[int],
) -> ir.Value:
    """``windows`` of ``sites`` as places in the flattened rows of prefix sums: (batch row, site of its group, row)."""
    number = emitter.op("Unsqueeze", number, emitter.ints(3))
    size = emitter.const(np.repeat(groups, groups)[sites].reshape(1, -1, 1, 1), INT32)
    start = emitter.op("Add", emitter.op("Mul", number, size), _within(emitter, sites, groups))
    return emitter.op("Add", windows, emitter.op("Mul", start, n))


def _within(emitter: Emitter, sites: Sequence[int], groups: Sequence[int]) -> ir.Value:
    """Which of its group each of ``sites`` is, int32 [1, sites, 1, 1]."""
    return emitter.const(np.concatenate([np.arange(g) for g in groups])[sites].reshape(1, -1, 1, 1), INT32)


def _windows_of_forms(
    emitter: Emitter,
    axis: str,
    windows: Mapping[int, ir.Value],
    n: ir.Value,
    outs: Sequence[int],
    groups: Sequence[int],
) -> dict[tuple[int, int], tuple[ir.Value, dict[int, int]]]:
    """``windows`` by out, by form: of all groups [batch, Σ blocks, width+1], and how long each one's part is then.

    Put in the groups' order a whole block of places at a time, all of a form at once: a run of the graph does nothing
    for a single group but cut its part off. Groups go by their first site.
    """
    forms, members = {out: form(axis, out) for out in windows}, sites_by_width(outs)
    starts = np.repeat(np.cumsum([0, *groups[:-1]]), groups).tolist()
    found: dict[tuple[int, int], tuple[ir.Value, dict[int, int]]] = {}
    for one in dict.fromkeys(forms.values()):
        parts, blocks, place = [], dict[int, list[int]](), 0
        for out, value in windows.items():
            if forms[out] != one:
                continue
            sites = members[out]
            shifted = emitter.op("Add", value, emitter.op("Mul", _within(emitter, sites, groups), n))
            parts.append(emitter.op("Reshape", shifted, emitter.ints(0, -1, one[1] + 1)))
            each = out // one[1]
            for site in sites:
                blocks[site] = list(range(place, place + each))
                place += each
        whole = emitter.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
        order = [block for site in sorted(blocks) for block in blocks[site]]
        if order != list(range(place)):
            whole = emitter.op("Gather", whole, emitter.ints(*order), axis=1)
        lengths: dict[int, int] = {}
        for site, mine in blocks.items():
            lengths[starts[site]] = lengths.get(starts[site], 0) + len(mine) * (one[1] + 1)
        found[one] = (whole, dict(sorted(lengths.items())))
    return found


def leading(value: ir.Value) -> tuple[object, object] | None:
    """The first two sides, None where they are not known."""
    sides = value.shape
    if sides is None or len(sides) < 2:
        return None
    found = tuple(side if isinstance(side, int) else side.value for side in sides[:2])
    return None if None in found else (found[0], found[1])

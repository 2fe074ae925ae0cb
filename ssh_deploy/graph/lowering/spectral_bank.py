"""What the graph makes once a run of an axis kernel's bank: the batch's rows of it, checked, as flat places.

Every group of sites reads its part of it (`lowering.spectral`). All but the cutting apart stands behind one If, so that
without an adapter nothing is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.spectral_rows import form, sites_by_block

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

    By first site of a group of g sites: ``values`` f32 and ``cols`` int32 [batch, g·(n+1)]. By first site and form:
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
        pointers: by width of the blocks; see `spectral_rows`.
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
    n = then.op("Cast", then.op("Shape", cols, start=2, end=3), to=ir.DataType.INT32)
    # as many sides as what it multiplies has: with fewer, beside a last side of 1, ORT goes number by number (28 ns)
    n = then.op("Reshape", n, then.ints(1, 1, 1))
    nil = _checked(then, cols, own.values(), n, shapes=shapes, small=inputs["cols"].dtype == ir.DataType.UINT16)
    number = then.op("Add", number, nil)
    counted = then.op("Unsqueeze", rows, then.ints(1))
    lead = leading(like)
    assert lead is not None
    table = _Sites(axis, tuple(out for out, _ in shapes), tuple(groups))
    results = [(counted, _none(INT64, 1))]
    places: RowPlaces | Places
    if layers:
        arrays = [(values, _none(FLOAT, len(shapes), 0)), (cols, _none(INT32, len(shapes), 0))]
        arrays += table.windows(then, own, n)
        counted, *made, number = _behind(emitter, gate, then, [*results, *arrays, (number, _none(INT32, 1, 1))])
        single = emitter.op("Equal", emitter.op("Shape", like, start=1, end=2), emitter.ints(1))
        length = emitter.op("Shape", inputs["cols"], start=2, end=3)
        places = RowPlaces(emitter.op("And", gate, single), *table.rows_apart(emitter, made, length), number)
    else:
        first = then.const([[[inn] for _, inn in shapes]], INT32)
        cols = then.op("Add", cols, then.op("Mul", number, first))
        values = then.op("Unsqueeze", values, then.ints(3))
        arrays = [(values, _none(FLOAT, len(shapes), 0, 1)), (cols, _none(INT32, len(shapes), 0))]
        arrays += table.windows(then, own, n, number=number)
        counted, *made = _behind(emitter, gate, then, [*results, *arrays])
        places = Places(*table.apart(emitter, made))
    return SpectralBank(axis, gate, counted, lead, places, gate_first=len(groups) <= layers)


def _fetched(
    emitter: Emitter,
    inputs: Mapping[str, ir.Value],
    pointers: Mapping[int, ir.Value],
    ids: ir.Value,
    scales: ir.Value,
) -> tuple[ir.Value, ir.Value, dict[int, ir.Value]]:
    """The batch's rows of the bank: values, scaled, and columns [batch, sites, n+1]; pointers by width of blocks."""
    values = emitter.op("Cast", emitter.op("Gather", inputs["values"], ids, axis=0), to=ir.DataType.FLOAT)
    values = emitter.op("Mul", values, emitter.op("Unsqueeze", scales, emitter.ints(2)))
    cols = emitter.op("Cast", emitter.op("Gather", inputs["cols"], ids, axis=0), to=ir.DataType.INT32)
    own = {width: emitter.op("Gather", value, ids, axis=0) for width, value in pointers.items()}
    return values, cols, {width: emitter.op("Cast", value, to=ir.DataType.INT32) for width, value in own.items()}


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


def _cut(
    emitter: Emitter, array: ir.Value, lengths: ir.Value, keys: Sequence[Key], *, along: int = 1
) -> dict[Key, ir.Value]:
    """``array`` cut apart along an axis into ``lengths``, a part for each of ``keys``."""
    return dict(zip(keys, emitter.ops("Split", array, lengths, outputs=len(keys), axis=along), strict=True))


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


@dataclass(frozen=True, slots=True)
class _Sites:
    """Where the sites' parts of the arrays lie; ``outs`` of all sites, ``groups``: sizes of those that follow."""

    axis: str
    outs: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def firsts(self) -> list[int]:
        """First site of every group."""
        return [0, *accumulate(self.groups[:-1])]

    @property
    def within(self) -> list[int]:
        """Which of its group each site is."""
        return [i for size in self.groups for i in range(size)]

    def windows(
        self, emitter: Emitter, own: Mapping[int, ir.Value], n: ir.Value, *, number: ir.Value | None = None
    ) -> list[tuple[ir.Value, NDArray[Any]]]:
        """``own`` pointers [batch, blocks, width+1] by width as places in prefix sums, and what stands for none.

        Those of a site are ``n`` long, int32 [1, 1, 1], and follow those of the group's sites before; with the batch
        rows' ``number`` they follow those of the rows before, and get an axis after the batch's.
        """
        within, sizes, found = self.within, [size for size in self.groups for _ in range(size)], []
        for width, members in sites_by_block(self.axis, self.outs).items():
            start = self._of_blocks(emitter, within, width, members)
            if number is not None:
                size = self._of_blocks(emitter, sizes, width, members)
                start = emitter.op("Add", emitter.op("Mul", number, size), start)
            array = emitter.op("Add", own[width], emitter.op("Mul", start, n))
            sides = [sum(self.outs[site] // width for site in members), width + 1]
            if number is not None:
                array, sides = emitter.op("Unsqueeze", array, emitter.ints(1)), [1, *sides]
            found.append((array, _none(INT32, *sides)))
        return found

    def rows_apart(
        self, emitter: Emitter, arrays: Sequence[ir.Value], length: ir.Value
    ) -> tuple[dict[int, ir.Value], dict[int, ir.Value], dict[tuple[int, tuple[int, int]], ir.Value]]:
        """Values, columns and windows of `RowPlaces`; ``length`` int64 [1] of a site's values."""
        # out here they are flattened where they lie; a branch would copy them
        values, cols, *windows = [emitter.op("Flatten", array, axis=1) for array in arrays]
        lengths = emitter.op("Mul", emitter.ints(*self.groups), length)
        within, found = self.within, dict[tuple[int, tuple[int, int]], ir.Value]()
        for array, (width, members) in zip(windows, sites_by_block(self.axis, self.outs).items(), strict=True):
            parts: Counter[tuple[int, tuple[int, int]]] = Counter()
            for site in members:
                parts[site - within[site], form(self.axis, self.outs[site])] += self.outs[site] // width
            found |= _cut(emitter, array, emitter.ints(*[n * (width + 1) for n in parts.values()]), list(parts))
        return _cut(emitter, values, lengths, self.firsts), _cut(emitter, cols, lengths, self.firsts), found

    def apart(
        self, emitter: Emitter, arrays: Sequence[ir.Value]
    ) -> tuple[dict[int, ir.Value], dict[int, ir.Value], dict[int, ir.Value]]:
        """Values, columns and pointers of `Places`."""
        values, cols, *windows = arrays
        lengths, found = emitter.ints(*self.groups), dict[int, ir.Value]()
        for array, (width, members) in zip(windows, sites_by_block(self.axis, self.outs).items(), strict=True):
            blocks = emitter.ints(*[self.outs[site] // width for site in members])
            found |= _cut(emitter, array, blocks, members, along=2)
        return _cut(emitter, values, lengths, self.firsts), _cut(emitter, cols, lengths, self.firsts), found

    def _of_blocks(self, emitter: Emitter, of_sites: Sequence[int], width: int, members: Sequence[int]) -> ir.Value:
        """What is known of every site, of every block of ``members``: int32 [1, blocks, 1]."""
        each = [[of_sites[site]] for site in members for _ in range(self.outs[site] // width)]
        return emitter.const([each], INT32)


def leading(value: ir.Value) -> tuple[object, object] | None:
    """The first two sides, None where they are not known."""
    sides = value.shape
    if sides is None or len(sides) < 2:
        return None
    found = tuple(side if isinstance(side, int) else side.value for side in sides[:2])
    return None if None in found else (found[0], found[1])

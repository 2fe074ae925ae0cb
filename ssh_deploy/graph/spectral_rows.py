"""Sparse spectra as the optional inputs of a graph: values, columns, and where each row begins.

By prefix of the kind: ``values`` [sites, n+1] as in the adapter's own file (f16 or f32), ``cols`` [sites, n+1] (u16, or
i32 beside a side above 65,536), ``scales`` f32 [sites] (α, the orthonormal transforms' share, the factor of a joint
spectrum's expansion), and ``row_pointers.<width>`` u16 [blocks, width+1]. Together they are a matrix compressed by rows
(CSR) a site: row u has the coefficients from pointer u to pointer u+1, and the last pointer is how many there are.
`lowering.spectral` says why rows are compressed. Places are renumbered to the order in which the graph's transforms put
their outputs. What is narrower than its bank is padded with zeros at the end.

All is stored as a run of the graph reads it, which then has nothing to rearrange: a zero after the last coefficient,
for there is a prefix sum more than there are coefficients; and the pointers in blocks of the way back
(`lowering.stages`), each with the pointer at which the next begins, of all sites whose blocks are of one width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import finite
from ssh_deploy.deltas.spectral import Stack
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.graph.lowrank_rows import sites_by_width
from ssh_deploy.transforms import get_transform

Arrays = dict[str, NDArray[Any]]
#: kinds that are spectra (names of their axis kernels), and how their inputs begin
AXES = {"hartley": "adapter_", "cosine": "adapter_cosine_"}
#: Name, after the prefix, of the row pointers of the sites with blocks of one width.
ROW_POINTERS = "row_pointers."
#: Coefficients of one matrix that pointers of 16 bits can count.
MOST = (1 << 16) - 1
_PARTS = ("values", "scales", "rows", "cols")


def is_of(name: str, prefix: str) -> bool:
    """Whether the input ``name`` is one of values at places of the kind with ``prefix``."""
    part = name.removeprefix(prefix)
    return name.startswith(prefix) and (part in _PARTS or part.startswith(ROW_POINTERS))


def spectrum_rows(
    where: str,
    kind: str,
    stacks: Sequence[Stack[int]],
    sites: Sequence[tuple[str, int, int]],
    *,
    values: np.dtype[Any],
    places: np.dtype[Any],
) -> Arrays:
    """One row of the bank of ``kind`` by input name, as wide as the most coefficients and `spare`.

    Args:
        where: names the adapter in the message.
        kind: of `AXES`.
        stacks: one or more, whose keys are rows of the ``sites`` dimension.
        sites: (module, in, out) of the graph.
        values: float16 or float32.
        places: of columns: uint16 or int32.

    Raises:
        AdapterMismatchError: values that overflow, or more coefficients than 16 bits count.
    """
    prefix = AXES[kind]
    made = [(stack, *_ordered(stack, kind)) for stack in stacks]
    most = max(found.shape[1] for _, found, *_ in made)
    if most > MOST:
        raise AdapterMismatchError(
            f"{where}: {most:,} coefficients in one matrix, a slot takes {MOST:,}.",
            hint="So many weigh more than a LoRA: merge it, or `ssh-deploy convert --to lora`.",
        )
    shape = (len(sites), most + spare(kind))
    rows: Arrays = {
        f"{prefix}values": np.zeros(shape, values),
        f"{prefix}cols": np.zeros(shape, places),
        f"{prefix}scales": np.zeros(shape[0], np.float32),
    }
    outs = tuple(n_out for *_, n_out in sites)
    rows |= no_pointers(kind, outs)
    for stack, found, starts, cols, factor in made:
        own, n = list(stack.keys), found.shape[1]
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            rows[f"{prefix}values"][own, :n] = found
        rows[f"{prefix}cols"][own, :n] = cols
        rows[f"{prefix}scales"][own] = stack.gain * factor
        _put_pointers(rows, kind, outs, own, starts)
    if not finite(rows[f"{prefix}values"]):
        largest = max(float(np.abs(found.astype(np.float64)).max(initial=0)) for _, found, *_ in made)
        raise AdapterMismatchError(
            f"{where}: values up to {largest:.4g} overflow {values}.",
            hint="Export the base with --adapter-dtype float32.",
        )
    return rows


def spare(kind: str) -> int:
    """Columns of values and places beyond the coefficients, in a bank of ``kind``, which may be no spectrum."""
    return 1 if kind in AXES else 0


def row_pointers(rows: NDArray[np.integer[Any]], out: int) -> NDArray[np.int64]:
    """Pointers [sites, out+1] into ``rows`` [sites, n], which ascend."""
    sites = len(rows)
    flat = (rows + np.arange(sites, dtype=np.int64)[:, None] * out).reshape(-1)
    counts = np.bincount(flat, minlength=sites * out).reshape(sites, out)
    del flat  # see `_ordered`
    pointers = np.zeros((sites, out + 1), np.int64)
    np.cumsum(counts, axis=1, out=pointers[:, 1:])
    return pointers


def rows_of(arrays: Mapping[str, NDArray[Any]], kind: str, outs: Sequence[int]) -> NDArray[np.int64]:
    """Row of every column [sites, n+1], 0 in the padding, of one adapter's ``arrays``; ``outs`` of every site."""
    rows = np.zeros((len(outs), arrays[f"{AXES[kind]}cols"].shape[1]), np.int64)
    for site, pointers in enumerate(pointers_by_site(arrays, kind, outs)):
        counts = (pointers[:, 1:] - pointers[:, :-1]).reshape(-1)
        rows[site, : counts.sum()] = np.repeat(np.arange(outs[site]), counts)
    return rows


def pointers_of(rows: NDArray[np.int64], counts: NDArray[np.int64], kind: str, outs: Sequence[int]) -> Arrays:
    """Row pointers by input name of ascending ``rows`` [sites, n], of which each site's first ``counts`` count."""
    arrays = no_pointers(kind, outs)
    for out, members in sites_by_width(outs).items():
        beyond = np.where(np.arange(rows.shape[1]) < counts[members, None], rows[members], out)
        _put_pointers(arrays, kind, outs, members, row_pointers(beyond, out + 1)[:, :-1])
    return arrays


def pointers_by_site(arrays: Mapping[str, NDArray[Any]], kind: str, outs: Sequence[int]) -> list[NDArray[np.uint16]]:
    """Each site's own pointers [blocks, width+1], views of ``arrays``, one adapter's by input name."""
    found = []
    for start, out in zip(_first_blocks(kind, tuple(outs)).tolist(), outs, strict=True):
        _, width = form(kind, out)
        found.append(arrays[f"{AXES[kind]}{ROW_POINTERS}{width}"][start : start + out // width])
    return found


def broken_pointers(arrays: Mapping[str, NDArray[Any]], kind: str, outs: Sequence[int], n: int) -> str | None:
    """Name of the first of ``arrays`` whose pointers do not lead from 0 upwards through at most ``n`` coefficients."""
    starts = _first_blocks(kind, tuple(outs))
    for width, members in sites_by_block(kind, tuple(outs)).items():
        name = f"{AXES[kind]}{ROW_POINTERS}{width}"
        pointers = arrays[name].astype(np.int64)
        before = np.concatenate([pointers[:1, 0], pointers[:-1, -1]])  # each block begins where the one before ended
        before[starts[members]] = 0
        if (before != pointers[:, 0]).any() or np.diff(pointers, axis=1).min() < 0 or pointers.max() > n:
            return name
    return None


def no_pointers(kind: str, outs: Sequence[int]) -> Arrays:
    """Row pointers by input name of an adapter without coefficients."""
    return {name: np.zeros(shape, np.uint16) for name, shape in pointer_shapes(kind, outs).items()}


def _put_pointers(
    arrays: Arrays, kind: str, outs: Sequence[int], sites: Sequence[int], pointers: NDArray[np.int64]
) -> None:
    """Put ``pointers`` [sites, out+1] of ``sites``, all of one out, into their blocks."""
    out = pointers.shape[1] - 1
    _, width = form(kind, out)
    blocks = arrays[f"{AXES[kind]}{ROW_POINTERS}{width}"]
    places = _first_blocks(kind, tuple(outs))[sites, None] + np.arange(out // width)
    blocks[places, :-1] = pointers[:, :-1].reshape(*places.shape, width)
    blocks[places, -1] = pointers[:, width::width]


@lru_cache(maxsize=64)
def sites_by_block(kind: str, outs: tuple[int, ...]) -> dict[int, list[int]]:
    """Sites by the width of their blocks, as their pointers follow one another: those of one form together."""
    found: dict[int, list[int]] = {}
    for site in sorted(range(len(outs)), key=lambda site: (form(kind, outs[site]), site)):
        found.setdefault(form(kind, outs[site])[1], []).append(site)
    return dict(sorted(found.items()))


def pointer_shapes(kind: str, outs: Sequence[int]) -> dict[str, tuple[int, int]]:
    """(blocks, width+1) of the row pointers by input name, in ascending order of the widths."""
    return {
        f"{AXES[kind]}{ROW_POINTERS}{width}": (sum(outs[site] // width for site in members), width + 1)
        for width, members in sites_by_block(kind, tuple(outs)).items()
    }


@lru_cache(maxsize=64)
def _first_blocks(kind: str, outs: tuple[int, ...]) -> NDArray[np.int64]:
    """Where each site's blocks begin among those of their width, int64 [sites]."""
    starts = np.zeros(len(outs), np.int64)
    for width, members in sites_by_block(kind, outs).items():
        starts[members] = np.cumsum([0, *(outs[site] // width for site in members[:-1])])
    return starts


def form(kind: str, out: int) -> tuple[int, int]:
    """``q`` of `TwoStage` and the width of blocks of the way back to ``out`` rows; sites of one form share products."""
    (p, q), _ = output_order(kind, out)
    return q, q if p == 1 else 2 * q


def _ordered(stack: Stack[int], axis: str) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[Any], float]:
    """Values [sites, n], row pointers [sites, out+1], columns [sites, n], and the factor of joint spectra's expansion.

    Sorted by row, column, place in the file. All three are packed into one integer: numpy sorts integers an order of
    magnitude faster than it finds the order of several keys, and they come back out of it sorted. (`take` is twice as
    fast as indexing.)
    """
    spectrum = stack.separable()
    sites, n = spectrum.rows.shape
    top, inner, last = (max(size - 1, 0).bit_length() for size in (*stack.shape, n))
    if top + inner + last > 63:
        raise AdapterMismatchError(
            f"{n} coefficients in a weight of {stack.shape[0]}×{stack.shape[1]} are more than 63 bits can number.",
            hint="No weight is that large; the adapter and the folder are forged.",
        )
    word = np.uint32 if top + inner + last <= 32 else np.int64  # half the bits are sorted in less than half the time
    packed = _numbered(axis, stack.shape[0], inner + last, word).take(spectrum.rows)
    packed |= _numbered(axis, stack.shape[1], last, word).take(spectrum.cols)
    packed |= np.arange(n).astype(word)
    values, factor = spectrum.values, spectrum.factor
    del spectrum  # the next arrays lie where it lay: after a run of the model no other memory is in a cache
    packed.sort(axis=-1)
    places = (packed & word((1 << last) - 1)).astype(np.int64)
    places += np.arange(sites)[:, None] * n
    values = values.reshape(-1).take(places)
    del places
    packed >>= word(last)
    cols = packed & word((1 << inner) - 1)
    packed >>= word(inner)
    return values, row_pointers(packed, stack.shape[0]), cols, factor


@lru_cache(maxsize=64)
def _numbered(axis: str, n: int, bits: int, word: type[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Output order of the graph's transform of length ``n``, ``bits`` further up in a ``word``."""
    return output_order(axis, n)[1].astype(word) << word(bits)


@lru_cache(maxsize=64)
def output_order(axis: str, n: int) -> tuple[tuple[int, int], NDArray[np.int64]]:
    """Factors (p, q) and output order of the graph's transform of length ``n``; see `TwoStage`."""
    return get_transform(axis).axis.output_order(n)

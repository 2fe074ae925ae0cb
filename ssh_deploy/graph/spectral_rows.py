"""Sparse spectra as the optional inputs of a graph: values, columns, and where each row begins.

By prefix of the kind: ``values`` [sites, n] as in the adapter's own file (f16 or f32), ``cols`` [sites, n] (u16, or i32
beside a side above 65,536), ``scales`` f32 [sites] (α, the orthonormal transforms' share, the factor of a joint
spectrum's expansion), and by out ``row_pointers.<out>`` u16 [sites of that out, out+1]. Together they are a matrix
compressed by rows (CSR) a site: row u has the coefficients from pointer u to pointer u+1, and the last pointer is how
many there are. Places are renumbered to the order in which the graph's transforms put their outputs. What is narrower
than its bank is padded with zeros at the end. `lowering.spectral` says why rows are compressed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import finite
from ssh_deploy.deltas.spectral import SpectralDelta, Stack, stacked
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.graph.lowrank_rows import sites_by_width
from ssh_deploy.transforms import get_transform

Arrays = dict[str, NDArray[Any]]
#: kinds that are spectra (names of their axis kernels), and how their inputs begin
AXES = {"hartley": "adapter_", "cosine": "adapter_cosine_"}
#: Name, after the prefix, of the row pointers of the sites of one out.
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
    deltas: Mapping[int, SpectralDelta],
    sites: Sequence[tuple[str, int, int]],
    *,
    values: np.dtype[Any],
    places: np.dtype[Any],
) -> Arrays:
    """One row of the bank of ``kind`` by input name, as wide as the most coefficients.

    Args:
        where: names the adapter in the message.
        kind: of `AXES`.
        deltas: by row of the ``sites`` dimension.
        sites: (module, in, out) of the graph.
        values: float16 or float32.
        places: of columns: uint16 or int32.

    Raises:
        AdapterMismatchError: values that overflow, or more coefficients than 16 bits count.
    """
    prefix = AXES[kind]
    made = [(stack, *_ordered(stack, kind)) for stack in stacked(deltas)]
    shape = (len(sites), max(found.shape[1] for _, found, *_ in made))
    if shape[1] > MOST:
        raise AdapterMismatchError(
            f"{where}: {shape[1]:,} coefficients in one matrix, a slot takes {MOST:,}.",
            hint="So many weigh more than a LoRA: merge it, or `ssh-deploy convert --to lora`.",
        )
    rows: Arrays = {
        f"{prefix}values": np.zeros(shape, values),
        f"{prefix}cols": np.zeros(shape, places),
        f"{prefix}scales": np.zeros(shape[0], np.float32),
    }
    pointers: dict[int, NDArray[np.uint16]] = {}
    place: dict[int, int] = {}
    for out, members in sites_by_width([n_out for *_, n_out in sites]).items():
        pointers[out] = rows[f"{prefix}{ROW_POINTERS}{out}"] = np.zeros((len(members), out + 1), np.uint16)
        place |= {site: i for i, site in enumerate(members)}
    for stack, found, starts, cols, factor in made:
        own, n = list(stack.keys), found.shape[1]
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            rows[f"{prefix}values"][own, :n] = found
        rows[f"{prefix}cols"][own, :n] = cols
        rows[f"{prefix}scales"][own] = [deltas[site].gain * factor for site in own]
        pointers[stack.shape[0]][[place[site] for site in own]] = starts
    if not finite(rows[f"{prefix}values"]):
        largest = max(float(np.abs(found.astype(np.float64)).max(initial=0)) for _, found, *_ in made)
        raise AdapterMismatchError(
            f"{where}: values up to {largest:.4g} overflow {values}.",
            hint="Export the base with --adapter-dtype float32.",
        )
    return rows


def row_pointers(rows: NDArray[np.integer[Any]], out: int) -> NDArray[np.int64]:
    """Pointers [sites, out+1] into ``rows`` [sites, n], which ascend."""
    sites = len(rows)
    flat = rows + np.arange(sites, dtype=np.int64)[:, None] * out
    counts = np.bincount(flat.reshape(-1), minlength=sites * out).reshape(sites, out)
    pointers = np.zeros((sites, out + 1), np.int64)
    np.cumsum(counts, axis=1, out=pointers[:, 1:])
    return pointers


def rows_of(arrays: Mapping[str, NDArray[Any]], prefix: str, outs: Sequence[int]) -> NDArray[np.int64]:
    """Row of every coefficient [sites, n], 0 in the padding, of one adapter's ``arrays``; ``outs`` of every site."""
    n = arrays[f"{prefix}cols"].shape[1]
    rows = np.zeros((len(outs), n), np.int64)
    for out, members in sites_by_width(outs).items():
        pointers = arrays[f"{prefix}{ROW_POINTERS}{out}"].astype(np.int64)
        own = np.repeat(np.tile(np.arange(out), len(members)), np.diff(pointers).reshape(-1))
        part = np.zeros((len(members), n), np.int64)
        part[np.arange(n) < pointers[:, -1:]] = own
        rows[members] = part
    return rows


def pointers_of(rows: NDArray[np.int64], counts: NDArray[np.int64], prefix: str, outs: Sequence[int]) -> Arrays:
    """Row pointers by input name of ascending ``rows`` [sites, n], of which each site's first ``counts`` count."""
    arrays = {}
    for out, members in sites_by_width(outs).items():
        beyond = np.where(np.arange(rows.shape[1]) < counts[members, None], rows[members], out)
        arrays[f"{prefix}{ROW_POINTERS}{out}"] = row_pointers(beyond, out + 1)[:, :-1].astype(np.uint16)
    return arrays


def _ordered(stack: Stack[int], axis: str) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64], float]:
    """Values [sites, n], row pointers [sites, out+1], columns [sites, n], and the factor of joint spectra's expansion.

    Sorted by row, column, place in the file. All three are packed into one integer: numpy sorts integers an order of
    magnitude faster than it finds the order of several keys, and they come back out of it sorted.
    """
    spectrum = stack.separable()
    sites, n = spectrum.rows.shape
    top, inner, last = (max(size - 1, 0).bit_length() for size in (*stack.shape, n))
    if top + inner + last > 63:
        raise AdapterMismatchError(
            f"{n} coefficients in a weight of {stack.shape[0]}×{stack.shape[1]} are more than 63 bits can number.",
            hint="No weight is that large; the adapter and the folder are forged.",
        )
    down, across = (output_order(axis, size)[1] for size in stack.shape)
    packed = down[spectrum.rows]
    packed <<= inner  # in place: new arrays of this size cost more than what is done to them
    packed |= across[spectrum.cols]
    packed <<= last
    packed |= np.arange(n)
    packed.sort(axis=-1)
    values = spectrum.values.reshape(-1)[(packed & ((1 << last) - 1)) + np.arange(sites)[:, None] * n]
    packed >>= last
    cols = packed & ((1 << inner) - 1)
    packed >>= inner
    return values, row_pointers(packed, stack.shape[0]), cols, spectrum.factor


@lru_cache(maxsize=64)
def output_order(axis: str, n: int) -> tuple[tuple[int, int], NDArray[np.int64]]:
    """Factors (p, q) and output order of the graph's transform of length ``n``; see `TwoStage`."""
    return get_transform(axis).axis.output_order(n)

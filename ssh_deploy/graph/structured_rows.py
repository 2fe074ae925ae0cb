"""Scales, thin maps and sparse changes as the optional inputs of a graph; what is not there is zeros.

The layout is that of `lowering.sided` and `lowering.sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import finite
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.deltas.reflection import ReflectionDelta
from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.graph.lowrank_rows import sites_by_width

Arrays = dict[str, NDArray[Any]]
Sites = Sequence[tuple[str, int, int]]
DIAGONAL, REFLECTION, SPARSE = "adapter_diagonal_", "adapter_reflection_", "adapter_sparse_"
#: kinds of maps on a side, and how their inputs begin
SIDED = {"diagonal": DIAGONAL, "reflection": REFLECTION}


def sided_rows(where: str, kind: str, deltas: Mapping[int, Delta], sites: Sites) -> Arrays:
    """One row of the bank of ``kind`` by input name, f32, each side as wide as its widest map.

    Args:
        where: names the adapter in the message.
        kind: ``diagonal`` or ``reflection``.
        deltas: by row of the ``sites`` dimension; none gives sides 0 wide, which mean "no adapter".
        sites: (module, in, out) of the graph.

    Raises:
        AdapterMismatchError: numbers that overflow float32.
    """
    parts = {site: _maps(delta) for site, delta in deltas.items()}
    rows: Arrays = {}
    sides = {"in": [n_in for _, n_in, _ in sites], "out": [n_out for *_, n_out in sites]}
    for i, (side, widths) in enumerate(sides.items()):
        own = {site: maps[i] for site, maps in parts.items() if maps[i].size}
        shape = next((array.shape for array in own.values()), (0, 0) if kind == "diagonal" else (2, 0, 0))
        depth = max((array.shape[-2] for array in own.values()), default=0)
        for width, members in sites_by_width(widths).items():
            rows[f"{SIDED[kind]}{side}.{width}"] = out = np.zeros((len(members), *shape[:-2], depth, width), np.float32)
            for place, site in enumerate(members):
                if site in own:
                    with np.errstate(over="ignore"):  # what overflows is refused as infinite
                        out[place][..., : own[site].shape[-2], :] = own[site]
    if not all(finite(array) for array in rows.values()):
        raise AdapterMismatchError(f"{where}: numbers beyond float32.", hint="The training diverged.")
    return rows


def _maps(delta: Delta) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What ``delta`` has beyond the identity on the side of the inputs, and of the answers; a side without is empty."""
    none = np.zeros((0, 0))
    if isinstance(delta, ReflectionDelta):
        inner, outer = (none if m is None else np.stack([m.p, m.q]) for m in (delta.inner, delta.outer))
        return inner, outer
    assert isinstance(delta, DiagonalDelta)
    inner = none if delta.inner is None else delta.inner.astype(np.float64)[None] - 1
    if delta.outer is None and delta.shift is None:
        return inner, none
    nothing = np.zeros(delta.shape[0])
    scale = nothing if delta.outer is None else delta.outer.astype(np.float64) - 1
    return inner, np.stack([scale, nothing if delta.shift is None else delta.shift.astype(np.float64)])


def sparse_rows(
    where: str, deltas: Mapping[int, SparseDelta], sites: Sites, *, values: np.dtype[Any], places: np.dtype[Any]
) -> Arrays:
    """One row of the sparse bank by input name, as wide as the most values, rows descending.

    Args:
        where: names the adapter in the message.
        deltas: by row of the ``sites`` dimension.
        sites: (module, in, out) of the graph.
        values: float16 or float32.
        places: uint16 or int32.

    Raises:
        AdapterMismatchError: values that overflow.
    """
    shape = (len(sites), max(delta.parameters for delta in deltas.values()))
    rows: Arrays = {f"{SPARSE}values": np.zeros(shape, values), f"{SPARSE}scales": np.zeros(len(sites), np.float32)}
    rows |= {f"{SPARSE}{part}": np.zeros(shape, places) for part in ("rows", "cols")}
    for site, delta in deltas.items():
        order, n = np.lexsort((delta.cols, -delta.rows.astype(np.int64))), delta.parameters
        with np.errstate(over="ignore"):
            rows[f"{SPARSE}values"][site, :n] = delta.values[order]
        rows[f"{SPARSE}rows"][site, :n] = delta.rows[order]
        rows[f"{SPARSE}cols"][site, :n] = delta.cols[order]
        rows[f"{SPARSE}scales"][site] = 1
    if not finite(rows[f"{SPARSE}values"]):
        largest = max(float(np.abs(delta.values).max(initial=0)) for delta in deltas.values())
        raise AdapterMismatchError(
            f"{where}: values up to {largest:.4g} overflow {values}.",
            hint="Export the base with --adapter-dtype float32.",
        )
    return rows

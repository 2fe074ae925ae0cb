"""Low-rank adapters as the optional inputs of a graph: one array for all sites of one width, padded with zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import finite
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterMismatchError

A, B = "adapter_lowrank_a.", "adapter_lowrank_b."


def sites_by_width(widths: Sequence[int]) -> dict[int, list[int]]:
    """Sites of each width, both ascending."""
    return {width: [i for i, w in enumerate(widths) if w == width] for width in sorted(set(widths))}


def product_rows(
    where: str, deltas: Mapping[int, LowRankDelta], sites: Sequence[tuple[str, int, int]]
) -> dict[str, NDArray[Any]]:
    """One row of the low-rank bank by input name, f32, as wide as the highest rank.

    Args:
        where: names the adapter in the message.
        deltas: by row of the ``sites`` dimension; none gives rank 0, which means "no adapter".
        sites: (module, in, out) of the graph.

    Raises:
        AdapterMismatchError: scaled numbers that overflow float32.
    """
    rank = max((delta.rank for delta in deltas.values()), default=0)
    rows: dict[str, NDArray[Any]] = {}
    for width, members in sites_by_width([n_in for _, n_in, _ in sites]).items():
        rows[f"{A}{width}"] = a = np.zeros((len(members), rank, width), np.float32)
        for i, site in enumerate(members):
            if site in deltas:
                a[i, : deltas[site].rank] = deltas[site].a
    for width, members in sites_by_width([n_out for *_, n_out in sites]).items():
        rows[f"{B}{width}"] = b = np.zeros((len(members), width, rank), np.float32)
        for i, site in enumerate(members):
            if site in deltas:
                with np.errstate(over="ignore"):  # what overflows is refused as infinite
                    b[i, :, : deltas[site].rank] = deltas[site].b.astype(np.float64) * deltas[site].scaling
    if not all(finite(array) for array in rows.values()):
        raise AdapterMismatchError(f"{where}: b times its scaling overflows float32.", hint="The training diverged.")
    return rows


def stack_padded(own: Sequence[Mapping[str, NDArray[Any]]], prefix: str) -> dict[str, NDArray[Any]]:
    """Rows of several adapters as a bank: row 0 empty, each padded to the widest. ``prefix``: of the inputs."""
    banks = {}
    for name in [name for name in own[0] if name.startswith(prefix)]:
        arrays = [rows[name] for rows in own]
        shape = tuple(max(sides) for sides in zip(*(array.shape for array in arrays), strict=True))
        banks[name] = bank = np.zeros((len(own) + 1, *shape), np.float32)
        for i, array in enumerate(arrays, 1):
            bank[i][tuple(slice(0, side) for side in array.shape)] = array
    return banks


def site_places(table: Mapping[str, int], shapes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Place of every module among the sites of its in, and among those of its out."""
    of_in, of_out = (sites_by_width([shape[side] for shape in shapes]) for side in (1, 0))
    return {
        module: (of_in[shapes[row][1]].index(row), of_out[shapes[row][0]].index(row)) for module, row in table.items()
    }

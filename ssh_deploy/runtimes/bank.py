"""Resident adapters of one kind: contiguous arrays with a row each, lent to runs without a copy.

A bank is the arrays that a graph's optional inputs of one kind take, ``[rows, …]`` each; a run feeds them whole
and says with ids which row each of its own rows wants. Row 0 is empty: id 0 is the base.

**Who may write when.** A run reads the arrays while other threads load and unload. Rows that a run was lent are
never written: unloading takes the name away and leaves the row until the last run that was lent it ends, loading
writes only rows that nobody owns and nobody reads. Growing and shrinking make new arrays; runs keep the old ones.
So a run sees the adapters it began with, bit for bit, whatever is loaded meanwhile. Not locked in itself: the
deployment's one lock covers all its banks, since an adapter may hold a row in several.

**What it costs.** Memory is rows × the widest adapter of the kind. Arrays grow by half when rows run out and are
rebuilt smaller when three quarters of them, or half of their width, are unused: unloading frees memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.runtimes.session import Input

#: ids input of each kind of bank; the kind of every other adapter input follows from its name (`kind_of`).
IDS = {
    "hartley": "adapter_ids",
    "cosine": "adapter_cosine_ids",
    "lowrank": "adapter_lowrank_ids",
    "head": "adapter_head_ids",
}
GUARD = "adapter_guard"

#: Arrays of one adapter by input name, each without the leading row dimension.
Rows = Mapping[str, NDArray[Any]]


def kind_of(name: str) -> str:
    """Kind of bank that the adapter input ``name`` belongs to."""
    for kind, start in (("head", "adapter_head"), ("cosine", "adapter_cosine_"), ("lowrank", "adapter_lowrank_")):
        if name.startswith(start):
            return kind
    return "hartley"


def banks_of(inputs: Iterable[Input], *, max_width: int) -> dict[str, Bank]:
    """Empty banks for the adapter inputs of a graph, by kind."""
    kinds: dict[str, list[Input]] = {}
    for entry in inputs:
        if entry.name != GUARD and entry.name not in IDS.values():
            kinds.setdefault(kind_of(entry.name), []).append(entry)
    return {kind: Bank(kind, entries, max_width=max_width) for kind, entries in kinds.items()}


@dataclass(slots=True, eq=False)
class _Table:
    """One generation of arrays: ``owners`` name → row, ``users`` how many runs read each row."""

    arrays: dict[str, NDArray[Any]]
    widths: dict[str, int]
    users: list[int]
    owners: dict[str, int] = field(default_factory=dict)

    def free_row(self) -> int | None:
        taken = set(self.owners.values())
        return next((r for r in range(1, len(self.users)) if r not in taken and not self.users[r]), None)


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """Rows of one bank lent to one run: ``feeds`` to give to ORT; `release` when the run has ended."""

    feeds: Mapping[str, NDArray[Any]]
    _table: _Table
    _rows: tuple[int, ...]

    def release(self) -> None:
        """The run has ended; its rows may be written again."""
        for row in self._rows:
            self._table.users[row] -= 1


class Bank:
    """Resident adapters of one kind."""

    def __init__(self, kind: str, inputs: Sequence[Input], *, max_width: int) -> None:
        """An empty bank for ``inputs`` (leading side: rows; other symbolic sides vary, up to ``max_width``)."""
        self.kind = kind
        self._inputs = {entry.name: entry for entry in inputs}
        self._max_width = max_width
        self._sizes: dict[str, dict[str, int]] = {}  # symbolic sides of each resident adapter
        self._table = self._new_table(1, {})

    def __contains__(self, name: str) -> bool:
        return name in self._table.owners

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are now."""
        return sum(array.nbytes for array in self._table.arrays.values())

    def check(self, where: str, rows: Rows) -> dict[str, int]:
        """Sizes of the symbolic sides of ``rows``.

        Raises:
            AdapterMismatchError: an input missing or unknown, a dtype, rank or static side that is not the
                graph's, sides of one name that differ, or one wider than the bank may grow.
        """
        if set(rows) != set(self._inputs):
            raise AdapterMismatchError(
                f"{where}: has {sorted(rows)} where the graph takes {sorted(self._inputs)}.",
                hint="It was made for another graph: convert the adapter with this folder.",
            )
        sizes: dict[str, int] = {}
        for name, array in rows.items():
            want = self._inputs[name]
            fits = array.ndim == len(want.shape) - 1 and array.dtype == want.dtype
            for side, size in zip(want.shape[1:], array.shape, strict=False):
                fits = fits and (sizes.setdefault(side, size) if isinstance(side, str) else side) == size
            if not fits:
                raise AdapterMismatchError(
                    f"{where}: {name} is {array.dtype} {list(array.shape)} where the graph takes "
                    f"{np.dtype(want.dtype)} {list(want.shape[1:])}.",
                    hint="It was made for another graph: convert the adapter with this folder.",
                )
        for side, size in sizes.items():
            if size > self._max_width:
                raise AdapterMismatchError(
                    f"{where}: {size} {side} where a bank may grow to {self._max_width}; every resident adapter "
                    "would take that much.",
                    hint=f"Open the deployment with max_coefficients={size} or serve this adapter alone.",
                )
        return sizes

    def put(self, name: str, rows: Rows) -> None:
        """Give ``name`` a row that holds ``rows`` (checked by `check`)."""
        sizes = self.check(name, rows)
        table = self._table
        widths = {side: max(size, table.widths.get(side, 0)) for side, size in sizes.items()}
        row = table.free_row()
        if row is None or widths != table.widths:
            count = len(table.users)
            self._rebuild(count if row is not None else max(len(table.owners) + 2, count + count // 2), widths)
            row = self._table.free_row()
        assert row is not None
        for key, array in self._table.arrays.items():
            _write(array[row], rows[key], _fill(key))
        self._sizes[name] = sizes
        self._table.owners[name] = row

    def drop(self, name: str) -> None:
        """Take the row away from ``name``; runs that were lent it keep it until they end."""
        del self._table.owners[name], self._sizes[name]
        held, count = len(self._table.owners) + 1, len(self._table.users)
        widths = self._needed()
        narrow = any(2 * widths.get(side, 0) <= width for side, width in self._table.widths.items())
        if 4 * held <= count or (narrow and held > 1) or held == 1:
            self._rebuild(held, widths)

    def lease(self, names: Sequence[str | None]) -> Lease | None:
        """Lend the rows of ``names`` (None: the empty row) to one run; None when no name has a row here.

        One adapter for the whole batch is lent as a bank of that one row, whose ids are the graph's default.
        """
        table = self._table
        ids = np.array([table.owners.get(name, 0) if name is not None else 0 for name in names], dtype=np.int64)
        if not ids.any():
            return None
        rows = tuple(np.unique(ids).tolist())
        for row in rows:
            table.users[row] += 1
        if len(rows) == 1:
            row = rows[0]
            feeds = {key: array[row : row + 1] for key, array in table.arrays.items()}
            return Lease(feeds, table, rows)
        return Lease({**table.arrays, IDS[self.kind]: ids}, table, rows)

    def empty(self) -> dict[str, NDArray[Any]]:
        """Feeds that mean "no adapter", for graphs whose adapter inputs have no defaults."""
        feeds = {
            key: np.zeros([1, *(0 if isinstance(side, str) else int(side or 0) for side in i.shape[1:])], i.dtype)
            for key, i in self._inputs.items()
        }
        return {**feeds, IDS[self.kind]: np.zeros(1, dtype=np.int64)}

    def _needed(self) -> dict[str, int]:
        widths: dict[str, int] = {}
        for sizes in self._sizes.values():
            widths = {side: max(size, widths.get(side, 0)) for side, size in sizes.items()}
        return widths

    def _rebuild(self, count: int, widths: dict[str, int]) -> None:
        old, new = self._table, self._new_table(count, widths)
        for row, (name, before) in enumerate(old.owners.items(), start=1):
            for key, array in new.arrays.items():
                source = old.arrays[key][before]
                _write(array[row], source[tuple(slice(0, n) for n in array.shape[1:])], _fill(key))
            new.owners[name] = row
        self._table = new

    def _new_table(self, count: int, widths: dict[str, int]) -> _Table:
        arrays = {}
        for key, entry in self._inputs.items():
            sides = [widths.get(s, 0) if isinstance(s, str) else int(s or 0) for s in entry.shape[1:]]
            arrays[key] = np.full([count, *sides], _fill(key), dtype=entry.dtype)
        return _Table(arrays, dict(widths), [0] * count)


def _fill(name: str) -> float:
    """What pads a row to the bank's width: nothing, and −∞ for the bias of labels that a head has not."""
    return -np.inf if kind_of(name) == "head" and name.endswith(".bias") else 0


def _write(target: NDArray[Any], source: NDArray[Any], fill: float) -> None:
    if target.shape != source.shape:
        target[...] = fill
    target[tuple(slice(0, n) for n in source.shape)] = source

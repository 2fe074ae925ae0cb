"""Resident adapters of one kind: contiguous arrays with a row each, lent to runs without a copy.

A bank is the arrays that a graph's optional inputs of one kind take, ``[rows, …]`` each; a run feeds them whole and
says with ids which row each of its own rows wants. Row 0 is empty: id 0 is the base.

**Reserved once.** All rows that the budget could ever hold are reserved when the deployment opens, as anonymous
memory whose pages the system gives out at the first write. So loading is a copy into a row, nothing is ever moved
under a run, and ONNX Runtime sees arrays of one shape for ever (it plans memory anew for every shape it meets).
Rows are as wide as the bank, set at opening: a wider adapter is refused, never allowed to widen every row.

**Who may write when.** A run reads the arrays while other threads load and unload. A row that a run was lent is never
written: its owner (`residents`) frees it after the last such run. Nothing here locks; the owner's one lock does.

**What it costs.** A row is the bank's whole width whatever the adapter's. A freed row gives its pages back, except
those it shares with rows in use (a page is 4 KiB; a row of values at n = 750 in 24 sites is 36 kB). On a GPU runs are
lent a copy that is there already (`mirror`). *Not covered:* systems other than Linux may keep freed pages.
"""

from __future__ import annotations

import heapq
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import AdapterMismatchError, DeploymentError
from ssh_deploy.graph.spectral_rows import spare
from ssh_deploy.runtimes.mirror import Mirror, Upload
from ssh_deploy.runtimes.session import Input

#: ids input of each kind of bank; the kind of every other adapter input follows from its name (`kind_of`).
IDS = {
    "hartley": "adapter_ids",
    "cosine": "adapter_cosine_ids",
    "lowrank": "adapter_lowrank_ids",
    "sparse": "adapter_sparse_ids",
    "diagonal": "adapter_diagonal_ids",
    "reflection": "adapter_reflection_ids",
    "head": "adapter_head_ids",
}
GUARD = "adapter_guard"
#: Option that says how wide a bank is, where it is not ``max_coefficients``; None: the folder's adapters alone.
WIDTHS = {"head": "max_labels", "lowrank": "max_rank", "reflection": "max_rank", "diagonal": None}

#: Arrays of one adapter by input name, each without the leading row dimension.
Rows = Mapping[str, NDArray[Any]]
#: Size of each symbolic side of the inputs of one kind, without the leading one.
Sizes = Mapping[str, int]


def kind_of(name: str) -> str:
    """Kind of bank that the adapter input ``name`` belongs to."""
    return next((kind for kind in IDS if name.startswith(f"adapter_{kind}")), "hartley")


def inputs_by_kind(inputs: Iterable[Input]) -> dict[str, list[Input]]:
    """Adapter inputs that are rows of banks, by kind; neither ids nor the guard."""
    kinds: dict[str, list[Input]] = {}
    for entry in inputs:
        if entry.name != GUARD and entry.name not in IDS.values():
            kinds.setdefault(kind_of(entry.name), []).append(entry)
    return kinds


def row_bytes(inputs: Sequence[Input], widths: Sizes) -> int:
    """Bytes of one row over all of ``inputs``, as wide as ``widths`` says of every symbolic side."""
    return sum(math.prod(_side(s, widths) for s in e.shape[1:]) * np.dtype(e.dtype).itemsize for e in inputs)


class Bank:
    """Rows of adapters of one kind.

    Attributes:
        kind: of adapters.
        widths: of the symbolic sides of its rows.
        row_bytes: of one row over all its arrays.
        capacity: rows that adapters can take, row 0 not counted.
    """

    def __init__(
        self, kind: str, inputs: Sequence[Input], *, widths: Sizes, capacity: int, upload: Upload | None = None
    ) -> None:
        """Reserve rows for ``capacity`` adapters of ``inputs``, as wide as ``widths`` says of every symbolic side.

        ``upload``: puts an array on the device that runs compute on; None: they compute here.

        Raises:
            DeploymentError: the system reserves no memory of that size.
        """
        self.kind, self.capacity = kind, capacity
        self._inputs = {entry.name: entry for entry in inputs}
        self.widths = {s: widths[s] for e in inputs for s in e.shape[1:] if isinstance(s, str)}
        sides = {e.name: [_side(side, widths) for side in e.shape[1:]] for e in inputs}
        self.row_bytes = row_bytes(inputs, widths)
        self._blocks = {e.name: _reserve((capacity + 1, *sides[e.name]), e.dtype) for e in inputs}
        self._arrays = {name: array for name, (_, array) in self._blocks.items()}
        self._fills = {name: _fill(entry) for name, entry in self._inputs.items()}
        for name, fill in self._fills.items():
            if fill:
                self._arrays[name][0] = fill
        self._fresh = 1  # rows from here on were never used
        self._freed: list[int] = []  # a heap of used ones that nobody owns
        self._free: set[int] = set()  # the same rows
        self._untidy: list[int] = []  # freed and perhaps still holding pages
        self._mirror = None if upload is None else Mirror(upload)
        self._version = 0  # rows written so far

    @property
    def used(self) -> int:
        """Rows that are owned."""
        return self._fresh - 1 - len(self._freed)

    def check(self, where: str, rows: Rows) -> dict[str, int]:
        """Sizes of the symbolic sides of ``rows``.

        Raises:
            AdapterMismatchError: an input missing or unknown, a dtype, rank or static side that is not the
                graph's, sides of one name that differ, or one wider than the bank.
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
            if size > self.widths[side]:
                option = WIDTHS.get(self.kind, "max_coefficients")
                own, most = (width - spare(self.kind) for width in (size, self.widths[side]))
                raise AdapterMismatchError(
                    f"{where}: {own} {side} where every row of this bank holds {most}.",
                    hint="Add it to the folder (`ssh-deploy add`): the widest adapter there says how wide rows are."
                    if option is None
                    else f"Open the deployment with {option}={own}"
                    f"{' (--max-coefficients)' if option == 'max_coefficients' else ''}; every resident adapter then "
                    "takes that much.",
                )
        return sizes

    def put(self, rows: Rows) -> int:
        """Copy ``rows`` (checked by `check`) into the lowest free row and pad it; returns the row."""
        if self._freed:
            row = heapq.heappop(self._freed)
            self._free.discard(row)
        else:
            row = self._fresh
            self._fresh += 1
        for name, array in self._arrays.items():
            _write(array[row], rows[name], self._fills[name])
        self._version += 1
        return row

    def free(self, row: int) -> None:
        """Nobody owns or reads ``row`` any more; its pages stay until `give_back`."""
        heapq.heappush(self._freed, row)
        self._free.add(row)
        self._untidy.append(row)

    def give_back(self) -> None:
        """Give the system the pages of rows freed since the last call and still free, but those that others share."""
        while self._untidy:
            row = self._untidy.pop()
            if row in self._free:
                self._give_back(row)

    @property
    def on_device(self) -> bool:
        """Runs compute elsewhere, and what `mixed` lends is there already."""
        return self._mirror is not None

    def alone(self, row: int) -> dict[str, NDArray[Any]]:
        """Feeds for a batch that uses ``row`` throughout: a bank of that one row, whose ids are the graph's default.

        Views, as wide as the bank: a narrower head would be summed in another order than in a mixed batch, and a
        row's answer would depend on its neighbours in the last bit.
        """
        return {name: array[row : row + 1] for name, array in self._arrays.items()}

    def mixed(self, ids: Sequence[int]) -> dict[str, Any]:
        """Feeds for a batch of several: the whole bank, and ``ids`` (rows here) as int64 [batch].

        Raises:
            DeploymentError: a row that was never filled. A CPU would refuse it, a GPU answer something.
        """
        if not all(0 <= row < self._fresh for row in ids):
            raise DeploymentError(
                f"Rows {sorted(set(ids))} of the bank of {self.kind} adapters are asked for; it has {self._fresh}.",
                hint="Ask for adapters by name; rows are the deployment's own.",
            )
        arrays: Mapping[str, Any] = self._arrays
        if self._mirror is not None:
            arrays = self._mirror.values(self._arrays, used=self._fresh, version=self._version)
        return {**arrays, IDS[self.kind]: np.array(ids, dtype=np.int64)}

    def copy(self, row: int, sizes: Sizes) -> dict[str, NDArray[Any]]:
        """What was put into ``row``, copied out without its padding."""
        return {
            name: array[row][tuple(slice(0, _side(s, sizes)) for s in self._inputs[name].shape[1:])].copy()
            for name, array in self._arrays.items()
        }

    def empty(self) -> dict[str, NDArray[Any]]:
        """Feeds that mean "no adapter", for graphs whose adapter inputs have no defaults."""
        feeds = {
            key: np.zeros([1, *(0 if isinstance(side, str) else int(side or 0) for side in i.shape[1:])], i.dtype)
            for key, i in self._inputs.items()
        }
        return {**feeds, IDS[self.kind]: np.zeros(1, dtype=np.int64)}

    def _give_back(self, row: int) -> None:
        page = mmap.PAGESIZE
        for block, array in self._blocks.values():
            size = math.prod(array.shape[1:]) * array.itemsize
            if not size or not hasattr(block, "madvise"):
                continue
            first, last = row * size, (row + 1) * size
            start, stop = first // page * page, -(-last // page) * page
            if start < first and not self._all_free(range(row - 1, start // size - 1, -1)):
                start += page
            if stop > last and not self._all_free(range(row + 1, min(-(-stop // size), self.capacity + 1))):
                stop -= page
            if start < stop:
                block.madvise(mmap.MADV_DONTNEED, start, min(stop, len(block)) - start)

    def _all_free(self, rows: range) -> bool:
        """No row of ``rows`` is owned; row 0 is, those never used are not."""
        return all(row >= self._fresh or row in self._free for row in rows)


def _side(side: int | str | None, sizes: Sizes) -> int:
    return sizes[side] if isinstance(side, str) else int(side or 0)


def _fill(entry: Input) -> float:
    """What pads a row to the bank's width: nothing, and −∞ for the bias of labels that a head has not."""
    return -np.inf if kind_of(entry.name) == "head" and entry.name.endswith(".bias") and "labels" in entry.shape else 0


def _write(target: NDArray[Any], source: NDArray[Any], fill: float) -> None:
    if target.shape != source.shape:
        target[...] = fill
    target[tuple(slice(0, n) for n in source.shape)] = source


def _reserve(shape: tuple[int, ...], dtype: Any) -> tuple[mmap.mmap, NDArray[Any]]:
    """Zeros of ``shape`` on memory that is reserved and not yet given out, and the block they lie in."""
    size = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if _POSIX else mmap.mmap(-1, size)
    except (OSError, ValueError, OverflowError) as error:
        raise DeploymentError(
            f"The system reserves no {size:,} bytes for a bank of {shape[0]:,} rows: {error}.",
            hint="Open the deployment with less `memory=`.",
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would be given out whole for one row
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_NOHUGEPAGE)
    return block, np.frombuffer(block, dtype=dtype, count=math.prod(shape)).reshape(shape)


_POSIX = hasattr(mmap, "MAP_PRIVATE")

"""Which adapters are resident, and lending them to runs: one lock, all banks at one moment.

Reading a file happens outside the lock, so a load does not hold up runs; giving it its rows is all or nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import AdapterMismatchError, DeploymentError, UnknownNameError, near_misses
from ssh_deploy.runtimes.bank import Lease, banks_of
from ssh_deploy.runtimes.folder import Folder, check_name
from ssh_deploy.runtimes.loading import Loaded, read_source
from ssh_deploy.runtimes.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows of a batch that run together (a slice or int64 indices), and the feeds they are lent."""

    rows: Any
    feeds: dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Lent:
    """What one batch runs with: its parts, and the labels of each row's head."""

    parts: list[Part]
    labels: list[tuple[str, ...]]


class Residents:
    """The adapters of one open folder that are in memory."""

    def __init__(self, folder: Folder, session: Session, *, max_width: int) -> None:
        """None yet; ``max_width``: see `Bank`."""
        self._folder = folder
        self._inputs = session.adapter_inputs
        self._banks = banks_of(self._inputs.values(), max_width=max_width)
        self._lock = threading.Lock()
        self._loaded: dict[str, Loaded] = {}
        self.unloaded: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all banks."""
        with self._lock:
            return sum(bank.nbytes for bank in self._banks.values())

    def table(self) -> dict[str, Loaded]:
        """What is resident now, by name."""
        with self._lock:
            return dict(self._loaded)

    def empty(self) -> dict[str, NDArray[Any]]:
        """Feeds that mean "no adapter", for graphs whose adapter inputs have no defaults."""
        return {key: array for bank in self._banks.values() for key, array in bank.empty().items()}

    def load(self, name: str, path: Path | None) -> None:
        """Make ``name`` resident, from ``path`` or from the folder (also one that was unloaded).

        Raises:
            UnknownNameError: no path, and no such adapter in the folder.
            DeploymentError, AdapterFileError, AdapterMismatchError, FingerprintError: see `read_source`.
        """
        stored = self._folder.adapters.get(name)
        if path is None and stored is None:
            raise self.absent(name)
        if path is not None and stored is not None and path.resolve() != stored.path.resolve():
            raise DeploymentError(
                f"{name} is the folder's own {stored.path.name}; {path} cannot go by the same name.",
                hint="Load it under another name, or `ssh-deploy remove` the folder's.",
            )
        loaded = read_source(self._folder, self._inputs, stored=stored, path=path)
        with self._lock:
            self._install(name, loaded)
            self.unloaded.discard(name)

    def unload(self, name: str) -> None:
        """Take ``name`` and its rows away; runs that were lent them keep them.

        Raises:
            UnknownNameError: not resident.
        """
        with self._lock:
            if name not in self._loaded:
                raise UnknownNameError(f"{name} is not loaded.", hint=near_misses(name, self._loaded))
            del self._loaded[name]
            for bank in self._banks.values():
                if name in bank:
                    bank.drop(name)
            if name in self._folder.adapters:
                self.unloaded.add(name)

    def fetch(self, names: Sequence[str | None]) -> None:
        """Load those of ``names`` that lie in the folder and are not resident yet.

        Raises:
            UnknownNameError: no such adapter, or one that was unloaded.
        """
        for name in dict.fromkeys(names):
            if name is None:
                continue
            check_name(name)
            with self._lock:
                if name in self._loaded:
                    continue
                if name not in self._folder.adapters or name in self.unloaded:
                    raise self.absent(name)
            loaded = read_source(self._folder, self._inputs, stored=self._folder.adapters[name], path=None)
            with self._lock:
                if name not in self.unloaded:
                    self._install(name, loaded)

    @contextmanager
    def lend(self, names: Sequence[str | None], *, logits: bool, headed: bool) -> Iterator[Lent]:
        """Settle at one moment which rows of which banks a batch reads, and keep them until it has run.

        Where some rows use adapters' heads and others the base's own, the two run apart: the graph runs the base's
        own head for a whole batch only, and a copy of it in the bank would not be bit-identical.

        Args:
            names: one per row, None for the base.
            logits: the run computes logits.
            headed: refuse any row that neither its adapter nor the base gives a head.

        Raises:
            UnknownNameError: unloaded since it was asked for.
            DeploymentError: a row without a head, among rows with one or with ``headed``.
        """
        leases: list[Lease] = []
        with self._lock:
            entries = [None if name is None else self._loaded.get(name) for name in names]
            gone = next((n for n, e in zip(names, entries, strict=True) if n is not None and e is None), None)
            if gone is not None:
                raise self.absent(gone)
            own = [i for i, entry in enumerate(entries) if entry is not None and entry.headed]
            rest = [i for i, entry in enumerate(entries) if entry is None or not entry.headed]
            if rest and not self._folder.labels and (headed or (own and logits)):
                raise self._headless(rest[0], names[rest[0]])
            apart = bool(own and rest and self._folder.labels)
            parts = []
            for rows in [own, rest] if apart else [list(range(len(names)))]:
                lent = [bank.lease([names[i] for i in rows]) for bank in self._banks.values()]
                leases += [lease for lease in lent if lease is not None]
                feeds = {key: array for lease in lent if lease is not None for key, array in lease.feeds.items()}
                parts.append(Part(np.array(rows) if apart else slice(None), feeds))
        try:
            yield Lent(parts, [self._folder.labels if entry is None else entry.labels for entry in entries])
        finally:
            with self._lock:
                for lease in leases:
                    lease.release()

    def absent(self, name: str) -> UnknownNameError:
        """The error for a name that is not to be had, with the nearest that are."""
        if name in self.unloaded:
            return UnknownNameError(f"{name} was unloaded.", hint=f"`.load({name!r})` brings it back.")
        known = {*self._loaded, *self._folder.adapters} - self.unloaded
        return UnknownNameError(f"{self._folder.root}: no adapter {name!r}.", hint=near_misses(name, known))

    def _install(self, name: str, loaded: Loaded) -> None:
        """Give ``name`` its rows in every bank or in none; the lock is held."""
        before = self._loaded.get(name)
        if before is not None and before.digest == loaded.digest:
            return
        if before is not None:
            raise DeploymentError(
                f"{name} is loaded already, with other content ({before.digest[:16]}…).",
                hint=f"`.unload({name!r})` first, or load it under another name.",
            )
        for kind, rows in loaded.kinds.items():
            if kind not in self._banks:
                raise AdapterMismatchError(
                    f"{name}: needs {kind} slots; this graph has {', '.join(self._banks) or 'none'}.",
                    hint="Export the base again with this adapter among the given ones, or with `--kinds`.",
                )
            self._banks[kind].check(name, rows)
        for kind, rows in loaded.kinds.items():
            self._banks[kind].put(name, rows)
        self._loaded[name] = replace(loaded, kinds={})  # the banks hold its numbers

    def _headless(self, row: int, name: str | None) -> DeploymentError:
        who = "no adapter" if name is None else f"adapter {name}, which brings no head"
        return DeploymentError(
            f"Row {row} asks for {who}, and the base {self._folder.base} has no classification head.",
            hint="Name an adapter that brings a head, or take the hidden state: "
            "`.run(feeds, adapters=…, outputs=['last_hidden_state'])`.",
        )

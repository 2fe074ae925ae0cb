"""Names and what they stand for: the folder's own adapters, files under a name, sums; loading, replacing, unloading.

**What a name answers with.** At every use a name's source is looked at (one ``stat``). A file that changed is read
again and is a new adapter, in place of the old one for every batch from then on; batches that run finish with the
old. A folder's own adapter must keep the bytes that ``deployment.json`` states. A file that is gone has not changed:
its resident rows go on answering, and once they are evicted a use is an error that says so.

**Under which lock.** Files are read outside any; what the names mean, and the rows they get, is settled at one moment
under that of `residents`. If something changed between reading and that moment, the batch looks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ssh_deploy.errors import DeploymentError, UnknownNameError, near_misses
from ssh_deploy.runtimes.folder import Folder, check_name
from ssh_deploy.runtimes.loading import Loaded
from ssh_deploy.runtimes.residents import Content, MustReadError, Residents, Wanted
from ssh_deploy.runtimes.session import Input
from ssh_deploy.runtimes.sources import Reader, Signature, Source
from ssh_deploy.runtimes.sums import Sum, combine, is_sum, parse_sum, sum_digest


@dataclass(slots=True, eq=False)
class Entry:
    """One name: its source, the state that was last read and what that was (without its numbers)."""

    name: str
    source: Source
    seen: Signature = None
    loaded: Loaded | None = None
    pinned: bool = False
    leaving: bool = False
    users: int = 0  # runs that came by this name, alone or in a sum
    look: _Look | None = None  # what a use finds as long as nothing changes

    @property
    def digest(self) -> str:
        """Of what it stands for; empty before the first reading."""
        return "" if self.loaded is None else self.loaded.digest


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """What a name was found to mean: its content, and the entries with the digests that say so."""

    wanted: Wanted
    entries: tuple[tuple[Entry, str], ...]


@dataclass(slots=True, eq=False)
class _Reading:
    """What one call has read so far, by digest, and the readings that others may share until it is done."""

    fetched: dict[str, Loaded] = field(default_factory=dict)
    rides: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Loan:
    """Contents by name, held until ``give_back`` is called, once."""

    contents: Mapping[str, Content]
    give_back: Callable[[], None]


class Catalogue:
    """The names of one open folder."""

    def __init__(self, folder: Folder, inputs: Mapping[str, Input], residents: Residents) -> None:
        """The folder's own adapters are known; none is read."""
        self._folder, self._residents = folder, residents
        self._outs = [site.out for site in folder.sites]
        self._reader = Reader(folder, inputs)
        self._changed = residents.changed
        self._entries: dict[str, Entry] = {}
        self._closed = False
        self.unloaded: set[str] = set()

    def table(self) -> dict[str, tuple[Loaded, bool]]:
        """What names stand for that were used or loaded, and whether it is resident now."""
        with self._changed:
            entries = list(self._entries.values())
            return {e.name: (e.loaded, self._residents.holds(e.digest)) for e in entries if e.loaded is not None}

    def known(self, name: str) -> tuple[Loaded, bool] | None:
        """`table`'s row of ``name``."""
        entry = self._entries.get(name)
        return None if entry is None or entry.loaded is None else (entry.loaded, self._residents.holds(entry.digest))

    def load(self, name: str, path: Path | None, *, pin: bool = False) -> None:
        """Make ``name`` resident: from ``path``, or from the folder (also one that was unloaded).

        Raises:
            UnknownNameError: no path, and no such adapter in the folder.
            DeploymentError, AdapterFileError, AdapterMismatchError, FingerprintError: see `Reader.read` and
                `Residents.acquire`; what the name stood for before, it stands for still.
        """
        entry = self._entry_for(name, path)
        reading = _Reading()
        try:
            while True:
                look = self._look_at(entry, reading)
                try:
                    held = self._residents.acquire(partial(self._settle, [look], named=False))
                    break
                except MustReadError:
                    continue
        finally:
            self._leave(reading)
        with self._changed:
            self._place(entry, pin=pin)
            self._residents.release(held)

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Refuse ``name`` from now on, wait for the runs that use it, then free what no other name stands for.

        Raises:
            UnknownNameError: not loaded, or being unloaded.
            DeploymentError: still in use after ``timeout`` seconds; it stays loaded.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or entry.leaving:
                raise UnknownNameError(f"{name} is not loaded.", hint=near_misses(name, set(self._entries) - {name}))
            entry.leaving = True
            while entry.users and not self._closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    entry.leaving = False
                    raise DeploymentError(
                        f"{name} is in use by {entry.users} run{'s' * (entry.users > 1)}; it stays loaded.",
                        hint="Unload it when they have ended, or give a longer timeout (None waits for them).",
                    )
                self._changed.wait(left)
            if self._entries.get(name) is entry:  # not replaced meanwhile
                del self._entries[name]
                if entry.source.stored is not None:
                    self.unloaded.add(name)
                self._forget(entry)

    def pin(self, name: str, *, pinned: bool) -> None:
        """Make ``name`` resident and never evict it, or let it be evicted again.

        Raises:
            UnknownNameError: no such name. See `lend` for the rest.
        """
        if pinned:
            with self.lend([name]):
                self._set_pin(name, pinned=True)
        else:
            self._set_pin(name, pinned=False)

    def borrow(self, names: Sequence[str | None], *, wait: bool = True) -> Loan:
        """Hold what ``names`` stand for until it is given back; sources are looked at and read as needed.

        Raises:
            UnknownNameError: no such adapter, one that was unloaded, or no name at all.
            DeploymentError: a vanished file, or more than the budget can hold. What reading raises.
            MustWaitError: not ``wait``, and there is no room before others have ended.
        """
        order = [name for name in dict.fromkeys(names) if name is not None]
        reading = _Reading()
        try:
            while True:
                looks = [self._look(name, reading) for name in order]
                try:
                    held = self._residents.acquire(
                        partial(self._settle, looks), partial(self._count, looks, 1), wait=wait
                    )
                    break
                except MustReadError:
                    continue
        finally:
            self._leave(reading)

        def give_back() -> None:
            with self._changed:
                self._count(looks, -1)
                self._residents.release(held)

        return Loan(dict(zip(order, held, strict=True)), give_back)

    @contextmanager
    def lend(self, names: Sequence[str | None]) -> Iterator[Mapping[str, Content]]:
        """Hold what ``names`` stand for, for one run; raises what `borrow` does."""
        loan = self.borrow(names)
        try:
            yield loan.contents
        finally:
            loan.give_back()

    def check(self, name: str) -> None:
        """Refuse a name that nothing goes by now, without reading anything.

        Raises:
            UnknownNameError: no such adapter, one that was unloaded, or no name at all.
        """
        with self._changed:
            for one in parse_sum(name).names if name not in self._entries and is_sum(name) else (name,):
                if one not in self._entries and (check_name(one) not in self._folder.adapters or one in self.unloaded):
                    raise self.absent(one)

    def close(self) -> None:
        """Refuse whoever waits for room or for runs to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def absent(self, name: str) -> UnknownNameError:
        """The error for a name that is not to be had, with the nearest that are."""
        if name in self.unloaded or name in self._entries:
            return UnknownNameError(f"{name} was unloaded.", hint=f"`.load({name!r})` brings it back.")
        known = {*list(self._entries), *self._folder.adapters} - self.unloaded
        return UnknownNameError(f"{self._folder.root}: no adapter {name!r}.", hint=near_misses(name, known))

    def _settle(self, looks: Sequence[_Look], *, named: bool = True) -> list[Wanted]:
        """What ``looks`` found, if it is still so and (``named``) still goes by its name; the lock is held."""
        if self._closed:
            raise DeploymentError(f"{self._folder.root}: this deployment was closed.", hint="Open it again.")
        holds, known = self._residents.holds, self._entries
        wanted = [look.wanted for look in looks]
        for look in looks:
            for entry, digest in look.entries:
                if named and (known.get(entry.name) is not entry or entry.leaving):
                    if known.get(entry.name) in (None, entry):
                        raise self.absent(entry.name)
                    raise MustReadError  # replaced
                if entry.loaded is None or entry.loaded.digest != digest:
                    raise MustReadError
        if not all(want.loaded is not None or holds(want.digest) for want in wanted):
            raise MustReadError
        return wanted

    @staticmethod
    def _count(looks: Sequence[_Look], change: int) -> None:
        for look in looks:
            for entry, _ in look.entries:
                entry.users += change

    def _look(self, name: str, reading: _Reading) -> _Look:
        """What ``name`` means now; reads what is missing."""
        entry = self._entries.get(name)
        if entry is None:
            if is_sum(name):
                return self._look_at_sum(name, parse_sum(name), reading)
            entry = self._stored_entry(name)
        if entry.leaving:
            raise self.absent(name)
        return self._look_at(entry, reading)

    def _look_at(self, entry: Entry, reading: _Reading) -> _Look:
        signature, look = entry.source.signature(), entry.look
        gone = signature is None and look is not None
        if look is not None and (gone or signature == entry.seen):
            digest = look.wanted.digest
            if self._residents.holds(digest):
                return look
            if digest in reading.fetched:
                return _Look(Wanted(entry.name, digest, reading.fetched[digest]), look.entries)
        if gone:
            raise DeploymentError(
                f"{entry.name}: its file {entry.source.path} is gone, and it is not resident any more.",
                hint=f"Put the file back, or `.unload({entry.name!r})`.",
            )
        fresh, seen = self._reader.shared(entry.source, signature, reading.rides)
        reading.fetched[fresh.digest] = fresh
        with self._changed:
            self._learn(entry, replace(fresh, kinds={}), seen)
        return _Look(Wanted(entry.name, fresh.digest, fresh), ((entry, fresh.digest),))

    def _look_at_sum(self, text: str, expression: Sum, reading: _Reading) -> _Look:
        looks = {name: self._look(name, reading) for name in expression.names}
        entries = tuple(pair for look in looks.values() for pair in look.entries)
        digests = {name: look.wanted.digest for name, look in looks.items()}
        digest, terms = sum_digest(expression, digests), frozenset(digests.values())
        if self._residents.holds(digest):
            return _Look(Wanted(text, digest, None, terms), entries)
        if digest not in reading.fetched:
            numbers = {}
            for name, look in looks.items():
                found = look.wanted.loaded or self._residents.copy(look.wanted.digest)
                source = look.entries[0][0].source
                numbers[name] = found or self._reader.shared(source, source.signature(), reading.rides)[0]
                if numbers[name].digest != look.wanted.digest:  # it changed since it was looked at
                    return self._look_at_sum(text, expression, reading)
            reading.fetched[digest] = combine(text, expression, numbers, digest, outs=self._outs)
        return _Look(Wanted(text, digest, reading.fetched[digest], terms), entries)

    def _stored_entry(self, name: str) -> Entry:
        """An entry for the folder's own adapter ``name``, made at its first use."""
        check_name(name)
        stored = self._folder.adapters.get(name)
        with self._changed:
            if stored is None or name in self.unloaded:
                raise self.absent(name)
            return self._entries.setdefault(name, Entry(name, Source(str(stored.path), stored)))

    def _entry_for(self, name: str, path: Path | None) -> Entry:
        """The entry that ``load`` is about: the one there is, when it has that source; else a new one."""
        stored = self._folder.adapters.get(name)
        old = self._entries.get(name)
        if path is None and stored is None:
            if old is None or old.leaving:
                raise self.absent(name)
            return old
        if path is not None and stored is not None and path.resolve() != stored.path.resolve():
            raise DeploymentError(
                f"{name} is the folder's own {stored.path.name}; {path} cannot go by the same name.",
                hint="Load it under another name, or `ssh-deploy remove` the folder's.",
            )
        if stored is not None:
            source = Source(str(stored.path), stored)
        else:
            assert path is not None
            source = Source.at(path)
        if old is not None and old.source == source and not old.leaving:
            return old
        return Entry(name, source)

    def _learn(self, entry: Entry, loaded: Loaded, seen: Signature) -> None:
        """``entry`` stands for ``loaded`` from now on; the lock is held."""
        before, entry.seen = entry.digest, seen
        if before == loaded.digest:
            return
        entry.loaded, entry.look = loaded, _Look(Wanted(entry.name, loaded.digest), ((entry, loaded.digest),))
        if self._entries.get(entry.name) is entry:
            self._residents.own(loaded.digest, pinned=entry.pinned)
            if before:
                self._residents.disown(before, pinned=entry.pinned)

    def _place(self, entry: Entry, *, pin: bool) -> None:
        """``entry`` is what its name means from now on; the lock is held."""
        old = self._entries.get(entry.name)
        self.unloaded.discard(entry.name)
        if old is not entry:
            if entry.leaving and entry.loaded is not None:  # it was unloaded while it was loaded again
                loaded, seen, entry = entry.loaded, entry.seen, Entry(entry.name, entry.source)
                self._learn(entry, loaded, seen)
            self._entries[entry.name] = entry
            entry.pinned = old is not None and old.pinned
            self._residents.own(entry.digest, pinned=entry.pinned)
            if old is not None:
                self._forget(old)
        if pin and not entry.pinned:
            entry.pinned = True
            self._residents.pin(entry.digest)

    def _forget(self, entry: Entry) -> None:
        if entry.loaded is not None:
            self._residents.disown(entry.digest, pinned=entry.pinned)

    def _set_pin(self, name: str, *, pinned: bool) -> None:
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or entry.leaving:
                raise self.absent(name)
            if entry.pinned != pinned:
                entry.pinned = pinned
                (self._residents.pin if pinned else self._residents.unpin)(entry.digest)

    @staticmethod
    def _leave(reading: _Reading) -> None:
        for leave in reading.rides:
            leave()

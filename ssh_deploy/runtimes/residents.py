"""Which contents are resident: rows, the byte budget, who is evicted, and lending them to runs under one lock.

A content is what an adapter's bytes say, known by the sha256 of them (a sum by that of its terms): two names of one
content share its rows. Names are the business of `catalogue`; it takes part under the same lock, `Residents.changed`.

**All or nothing.** A batch gets the rows of all its contents at one moment, or it waits, holding none, until others
have ended; so no two batches can each wait for the other. Whoever waits is served in the order of asking, and no
later batch overtakes: a large one is not starved by small ones. A batch that could never fit is an error at once.

**Who goes.** When the budget is spent the content that has been idle longest is evicted; never one in use, never a
pinned one. A content that no name stands for any more goes when its last run ends. Freeing a row is exact: its
memory is given back to the system unless a new content takes it at once.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ssh_deploy.errors import AdapterMismatchError, DeploymentError
from ssh_deploy.runtimes.bank import Bank, Rows, Sizes
from ssh_deploy.runtimes.loading import Loaded


@dataclass(slots=True, eq=False)
class Content:
    """One resident content.

    ``loaded``: what it is, without its numbers, which lie in ``rows`` (by kind of bank; ``sizes``: their own widths);
    ``users``: runs that hold it; ``terms``: digests it was summed from, empty for an adapter.
    """

    loaded: Loaded
    rows: dict[str, int]
    sizes: dict[str, Sizes]
    nbytes: int
    terms: frozenset[str]
    users: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A content that a batch needs: as whom, its digest, its numbers where they were read, what it is summed from."""

    name: str
    digest: str
    loaded: Loaded | None = None
    terms: frozenset[str] = field(default_factory=frozenset)


class MustReadError(Exception):
    """Internal: some wanted contents are not resident and were not read; the caller reads and asks again."""


class MustWaitError(Exception):
    """Internal: there is no room now for all that is wanted, and the caller would not wait."""


class Residents:
    """Contents in memory, within ``budget`` bytes.

    Attributes:
        banks: by kind.
        budget: bytes.
        used: bytes of the rows that contents own.
        changed: the one lock; notified whenever rows come free.
    """

    def __init__(self, banks: Mapping[str, Bank], *, budget: int) -> None:
        """None yet."""
        self.banks, self.budget, self.used = dict(banks), budget, 0
        self.changed = threading.Condition(threading.Lock())
        self._contents: dict[str, Content] = {}
        self._idle: OrderedDict[str, Content] = OrderedDict()  # evictable, longest idle first
        self._sums: dict[str, Content] = {}
        self._owners: Counter[str] = Counter()  # names that stand for a digest, resident or not
        self._pins: Counter[str] = Counter()
        self._queue: deque[object] = deque()

    def __len__(self) -> int:
        return len(self._contents)

    def holds(self, digest: str) -> bool:
        """``digest`` is resident at this moment; needs no lock."""
        return digest in self._contents

    def acquire(
        self,
        settle: Callable[[], Collection[Wanted]],
        lent: Callable[[], None] | None = None,
        *,
        wait: bool = True,
    ) -> list[Content]:
        """Hold all contents that ``settle`` names, in its order, for a run; waits until there is room for all.

        Args:
            settle: called under the lock, again after each wait, so that what it says is true at the moment the rows
                are lent; whatever it raises ends the call.
            lent: called under the lock once the rows are held.
            wait: False: `MustWaitError` instead of waiting.

        Raises:
            MustReadError: a wanted content is neither resident nor given.
            MustWaitError: others must end first, or were first to ask.
            AdapterMismatchError: one that the banks cannot take.
            DeploymentError: more than the budget could ever hold beside what is pinned.
        """
        ticket = object()
        with self.changed:
            try:
                while True:
                    if not self._queue or self._queue[0] is ticket:
                        held = self._take(settle())
                        if held is not None:
                            if lent is not None:
                                lent()
                            return held
                    if not wait:
                        raise MustWaitError
                    if ticket not in self._queue:
                        self._queue.append(ticket)
                    self.changed.wait()
            finally:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                    self.changed.notify_all()

    def release(self, held: Iterable[Content]) -> None:
        """The run of ``held`` has ended; the lock is held."""
        for content in held:
            content.users -= 1
            self._settle(content)
        self.changed.notify_all()

    def own(self, digest: str, *, pinned: bool = False) -> None:
        """A name stands for ``digest`` from now on; the lock is held."""
        self._owners[digest] += 1
        if pinned:
            self.pin(digest)

    def disown(self, digest: str, *, pinned: bool = False) -> None:
        """A name stands for ``digest`` no more; without any, it goes, and idle sums of it too; the lock is held."""
        if pinned:
            self.unpin(digest)
        self._owners[digest] -= 1
        if self._owners[digest] > 0:
            return
        del self._owners[digest]
        if digest in self._contents:
            self._settle(self._contents[digest])
        for content in [c for c in self._sums.values() if digest in c.terms and not c.users]:
            self._drop(content)
        self.changed.notify_all()

    def pin(self, digest: str) -> None:
        """Never evict ``digest``; counts; the lock is held."""
        self._pins[digest] += 1
        self._idle.pop(digest, None)

    def unpin(self, digest: str) -> None:
        """Take one pin back; the lock is held."""
        self._pins[digest] -= 1
        if self._pins[digest] <= 0:
            del self._pins[digest]
            if digest in self._contents:
                self._settle(self._contents[digest])
            self.changed.notify_all()

    def copy(self, digest: str) -> Loaded | None:
        """``digest`` with its numbers copied out of the banks, or None when it is not resident."""
        with self.changed:
            content = self._contents.get(digest)
            if content is None:
                return None
            kinds = {kind: self.banks[kind].copy(row, content.sizes[kind]) for kind, row in content.rows.items()}
            return replace(content.loaded, kinds=kinds)

    def head_bytes(self) -> int:
        """Bytes of resident heads; the lock is held."""
        head = self.banks.get("head")
        return head.used * head.row_bytes if head else 0

    def _take(self, wanted: Collection[Wanted]) -> list[Content] | None:
        """Hold all of ``wanted``, or none and return None when others must end first."""
        contents = self._contents
        missing = [want for want in wanted if want.digest not in contents]
        if missing:
            if any(want.loaded is None for want in missing):
                raise MustReadError
            missing = list({want.digest: want for want in missing}.values())
            sizes = [self._check(want.name, want.loaded) for want in missing if want.loaded is not None]
            if not self._make_room(wanted, sum(self._bytes(s) for s in sizes)):
                return None
            for want, size in zip(missing, sizes, strict=True):
                self._install(want, size)
            self._tidy()
        held = [contents[want.digest] for want in wanted]
        for content in held:
            content.users += 1
            self._idle.pop(content.loaded.digest, None)
        return held

    def _check(self, name: str, loaded: Loaded) -> dict[str, Sizes]:
        """Widths of ``loaded`` by kind, checked against the banks."""
        for kind in loaded.kinds:
            if kind not in self.banks:
                raise AdapterMismatchError(
                    f"{name}: needs {kind} slots; this graph has {', '.join(self.banks) or 'none'}.",
                    hint="Export the base again with this adapter among the given ones, or with `--kinds`.",
                )
        return {kind: self.banks[kind].check(name, rows) for kind, rows in loaded.kinds.items()}

    def _bytes(self, kinds: Iterable[str]) -> int:
        return sum(self.banks[kind].row_bytes for kind in kinds)

    def _make_room(self, wanted: Collection[Wanted], need: int) -> bool:
        """Evict until ``need`` bytes are free, sparing ``wanted``; False when others must end first."""
        lack = self.used + need - self.budget
        if lack <= 0:
            return True
        keep = {want.digest for want in wanted}
        going, found = [], 0
        for digest, content in self._idle.items():
            if found >= lack:
                break
            if digest not in keep:
                going.append(content)
                found += content.nbytes
        if found >= lack:
            for content in going:
                self._drop(content, tidy=False)
            return True
        total = need + sum(self._contents[digest].nbytes for digest in keep if digest in self._contents)
        pinned = sum(self._contents[d].nbytes for d in self._pins if d in self._contents and d not in keep)
        if total + pinned > self.budget:
            raise DeploymentError(
                f"{len(keep)} distinct adapter{'s' * (len(keep) > 1)} at once take {total:,} bytes; the budget is "
                f"{self.budget:,}, of which {pinned:,} are pinned by others.",
                hint="Open the deployment with more `memory=`, unpin adapters, or ask for fewer in one batch.",
            )
        return False

    def _install(self, want: Wanted, sizes: dict[str, Sizes]) -> None:
        assert want.loaded is not None
        numbers: Mapping[str, Rows] = want.loaded.kinds
        rows = {kind: self.banks[kind].put(arrays) for kind, arrays in numbers.items()}
        content = Content(replace(want.loaded, kinds={}), rows, sizes, self._bytes(rows), want.terms)
        self._contents[want.digest] = content
        self.used += content.nbytes
        if want.terms:
            self._sums[want.digest] = content

    def _settle(self, content: Content) -> None:
        """Where a content that may have come free belongs: in use, pinned, idle, or gone."""
        digest = content.loaded.digest
        if content.users:
            return
        if not content.terms and digest not in self._owners:
            self._drop(content)
        elif digest not in self._pins:
            self._idle[digest] = content

    def _drop(self, content: Content, *, tidy: bool = True) -> None:
        digest = content.loaded.digest
        del self._contents[digest]
        self._idle.pop(digest, None)
        self._sums.pop(digest, None)
        self.used -= content.nbytes
        for kind, row in content.rows.items():
            self.banks[kind].free(row)
        if tidy:
            self._tidy()

    def _tidy(self) -> None:
        """Give back the memory of rows that came free and that nobody took at once."""
        for bank in self.banks.values():
            bank.give_back()

"""Where adapters are read from, how a change is noticed, and reading each missing one once.

A source's signature is (inode, size, mtime) of its file, or of every file of its folder. It is compared at every use;
when it differs the source is read again, and its sha256 says whether it is another adapter. *Not covered:* a file
rewritten in place with the same size and the old time put back.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ssh_deploy.adapters.peft_folder import CONFIG, WEIGHTS
from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.folder import Folder, StoredAdapter
from ssh_deploy.runtimes.loading import Loaded, read_source
from ssh_deploy.runtimes.session import Input

#: What tells one state of a source from another, inode, size and time (ns) of each file in turn; None: nothing there.
Signature = tuple[int, ...] | None
#: File systems stamp a change with the time of the last clock tick (4 to 10 ms): a younger stamp proves nothing.
_TICK_NS = 20_000_000
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Source:
    """A file or PEFT folder at ``path`` (absolute), or the folder's own adapter ``stored``."""

    path: str
    stored: StoredAdapter | None = None

    @classmethod
    def at(cls, path: Path) -> Source:
        """The source at ``path``; a file of a PEFT folder stands for the folder."""
        whole = os.path.abspath(path)  # noqa: PTH100 - links stay: one that is turned elsewhere is a change
        parent, name = os.path.split(whole)
        return cls(parent if name in (CONFIG, WEIGHTS) else whole)

    def signature(self) -> Signature:
        """Of its present state; None when it is not there."""
        try:
            found = os.stat(self.path)  # noqa: PTH116 - half the time of Path.stat, at every use of every adapter
            if not stat.S_ISDIR(found.st_mode):
                return found.st_ino, found.st_size, found.st_mtime_ns
            with os.scandir(self.path) as entries:
                stats = [entry.stat() for entry in sorted(entries, key=lambda e: e.name) if entry.is_file()]
            return tuple(number for s in stats for number in (s.st_ino, s.st_size, s.st_mtime_ns))
        except (OSError, ValueError):  # ValueError: a name with a null byte
            return None


@dataclass(slots=True, eq=False)
class _Flight:
    """A reading under way or just done, and how many batches still want it."""

    done: threading.Event = field(default_factory=threading.Event)
    riders: int = 0
    result: tuple[Loaded, Signature] | None = None
    error: BaseException | None = None


class Reader:
    """Reads sources for one open folder; batches that want the same one at the same time read it once."""

    def __init__(self, folder: Folder, inputs: Mapping[str, Input]) -> None:
        """For ``folder`` whose graph has the adapter ``inputs``."""
        self._folder, self._inputs = folder, inputs
        self._lock = threading.Lock()
        self._flights: dict[Hashable, _Flight] = {}

    def read(self, source: Source, before: Signature) -> tuple[Loaded, Signature]:
        """The adapter, and the signature it has as long as it does not change; None when that is not certain yet.

        ``before``: its signature now.

        Raises:
            DeploymentError: it changes all the time. What `read_source` raises.
        """
        for _ in range(_TRIES):
            loaded = read_source(
                self._folder,
                self._inputs,
                stored=source.stored,
                path=None if source.stored else Path(source.path),
            )
            now, after = time.time_ns(), source.signature()
            if before == after:
                return loaded, None if _is_young(before, now) else before
            before = after
        raise DeploymentError(f"{source.path}: changes while it is read.", hint="Write it elsewhere and rename it.")

    def shared(self, source: Source, signature: Signature, rides: list[Callable[[], None]]) -> tuple[Loaded, Signature]:
        """`read`, together with whoever reads the same state of ``source`` now.

        Args:
            source: to read.
            signature: of its present state.
            rides: gets a function to call when the result has been made use of; until then others may share it.
        """
        key: Hashable = object() if _is_young(signature, time.time_ns()) else (source.path, signature)
        with self._lock:
            flight = self._flights.get(key)
            first = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight()
            flight.riders += 1
        rides.append(lambda: self._leave(key, flight))
        if first:
            try:
                flight.result = self.read(source, signature)
            except BaseException as error:
                flight.error = error
                raise
            finally:
                flight.done.set()
        else:
            flight.done.wait()
        if flight.result is None:
            assert flight.error is not None
            raise flight.error
        return flight.result

    def _leave(self, key: Hashable, flight: _Flight) -> None:
        with self._lock:
            flight.riders -= 1
            if not flight.riders:
                self._flights.pop(key, None)


def _is_young(signature: Signature, now: int) -> bool:
    """Whether a change right after it could have left it as it is."""
    return signature is None or any(abs(now - stamp) < _TICK_NS for stamp in signature[2::3])

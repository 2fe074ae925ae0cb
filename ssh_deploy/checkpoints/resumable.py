"""A folder that is filled over several runs: a journal says which of its files are finished, and a rename ends it.

Work goes to ``.OUT.partial-KEY`` beside OUT, where the key stands for everything that the content depends on. A
file counts as finished once it is fsynced and its line is in the journal. A process that is killed leaves both; the
next one with the same key goes on behind them, and one with another key has a folder of its own. An error or Ctrl-C
leaves nothing, as everywhere in this package. The journal is locked while somebody works.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ssh_deploy.checkpoints.whole import make_room, publish, refuse_existing, sync, system_errors_of
from ssh_deploy.errors import OutputError

JOURNAL = ".journal"


class Partial:
    """The folder being filled. ``finished``: what `finish` was told of each file, in this run or an earlier one."""

    def __init__(self, folder: Path, journal: IO[bytes]) -> None:
        self.folder = folder
        self._journal, self._lock = journal, threading.Lock()
        self.finished, good = _read(folder, journal)
        journal.truncate(good)  # a line would be lost behind half a line

    def finish(self, name: str, facts: Mapping[str, Any]) -> None:
        """``name`` is whole: fsync it, then say so in the journal. May be called from several threads.

        Raises:
            OSError: of the system.
        """
        sync(self.folder / name)
        line = {"name": name, "bytes": (self.folder / name).stat().st_size, **facts}
        with self._lock:
            self._journal.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            os.fsync(self._journal.fileno())
            self.finished[name] = line


def partial_path(out: Path, key: str) -> Path:
    """Where the work of ``key`` (hex digest) for ``out`` goes."""
    return out.parent / f".{out.name}.partial-{key[:16]}"


def finished_bytes(out: Path, key: str) -> int:
    """Bytes of ``out`` that an earlier run with ``key`` finished; 0 where there was none."""
    try:
        with (partial_path(out, key) / JOURNAL).open("rb") as journal:
            return sum(line["bytes"] for line in _read(partial_path(out, key), journal)[0].values())
    except OSError:
        return 0


@contextmanager
def resumable_folder(out: Path, *, key: str, need: int = 0, fresh: bool = False) -> Iterator[Partial]:
    """Yield the `Partial` that becomes ``out`` on success.

    Args:
        out: the folder to make; must not exist.
        key: hex digest of all that its content depends on.
        need: bytes of the whole folder; what is not finished is checked against the free space first.
        fresh: throw away what an earlier run finished.

    Raises:
        OutputError: ``out`` exists, too little space, another process is at it, or the system refuses a write.
    """
    refuse_existing(out)
    folder = partial_path(out, key)
    with system_errors_of(out):
        make_room(out, need - (0 if fresh else finished_bytes(out, key)))
        if folder.is_symlink():
            raise OutputError(f"{folder} is a link.", hint="Remove it.")
        folder.mkdir(exist_ok=True)
        with (folder / JOURNAL).open("a+b", buffering=0) as journal:
            _lock(journal, out)
            try:
                if fresh:
                    journal.truncate(0)
                partial = Partial(folder, journal)
                _clear(folder, keep=partial.finished)
                yield partial
                _sync_rest(folder, partial.finished)
                (folder / JOURNAL).unlink()
                publish(folder, out)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise


def _lock(journal: IO[bytes], out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no locks of this kind on this system
        return
    try:
        fcntl.flock(journal.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{out}: the same command is running already.", hint="Wait for it, or choose another name."
        ) from None


def _read(folder: Path, journal: IO[bytes]) -> tuple[dict[str, dict[str, Any]], int]:
    """Lines of files that are there and as long as they say, and the bytes of those lines.

    What follows a line that is torn, or names a file that is not there, does not count.
    """
    journal.seek(0)
    found: dict[str, dict[str, Any]] = {}
    good = 0
    for raw in journal.read().split(b"\n")[:-1]:
        try:
            line = json.loads(raw)
            path = folder / line["name"]
            if path.parent != folder or path.lstat().st_size != line["bytes"]:
                break
        except (ValueError, KeyError, TypeError, OSError):
            break
        found[path.name] = line
        good += len(raw) + 1
    return found, good


def _clear(folder: Path, *, keep: Mapping[str, Any]) -> None:
    for path in folder.iterdir():
        if path.name in keep or path.name == JOURNAL:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync_rest(folder: Path, finished: Mapping[str, Any]) -> None:
    for path in folder.rglob("*"):
        if not (path.parent == folder and (path.name in finished or path.name == JOURNAL)):
            sync(path)

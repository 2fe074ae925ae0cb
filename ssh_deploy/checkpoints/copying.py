"""Bytes of one file into another: blocks shared, or written around the page cache, or copied by the kernel.

* Where the file system can (btrfs, XFS, bcachefs), a whole file is cloned (FICLONE): no bytes move at all.
* Long ranges go out from memory of this process (O_DIRECT). Through the page cache each page would be found, filled
  and written back before ``fsync`` comes to an end; around it the disk begins with the first piece, and what other
  processes keep in that cache stays there.
* What is left, and what a file system does not take like that, the kernel copies (copy_file_range), or else this
  process does.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

#: Called with the number of bytes just written.
Advance = Callable[[int], None]

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY, errno.EBADF}
_CHUNK = 64 << 20  # bytes between two reports of progress
_PIECE = 8 << 20  # bytes of the memory that is written from
_LONG = 4 << 20  # bytes of a range that is worth it
_BLOCK = max(4096, mmap.PAGESIZE)  # a page is written the one way or the other, never both


def clone(source: Path, target: int) -> bool:
    """Whether the file system made the open file ``target`` share the blocks of ``source``."""
    try:
        import fcntl

        with source.open("rb") as base:
            fcntl.ioctl(target, _FICLONE, base.fileno())
    except (ImportError, OSError):  # no such file system, or two of them
        return False
    return True


def clones_into(source: Path, folder: Path) -> bool:
    """Whether a copy of ``source`` in ``folder``, which exists, would take no space of its own."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return clone(source, file.fileno())
    except OSError:
        return False


class Copier:
    """Copies ranges of other files into one new file; a context."""

    def __init__(self, path: Path, target: int) -> None:
        """``path``: the new file, open for writing as the descriptor ``target``."""
        self._path, self._target = path, target
        self._direct: int | None = None
        self._memory: mmap.mmap | None = None
        self._able = hasattr(os, "O_DIRECT")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._direct is not None:
            os.close(self._direct)
        self._memory = None  # not closed: an error on its way out still holds a part of it

    def copy(self, source: Path, begin: int, to: int, length: int, *, advance: Advance) -> None:
        """``length`` bytes of ``source`` from ``begin`` on, to the place ``to`` of the new file.

        Raises:
            OSError: of the system.
        """
        with source.open("rb", buffering=0) as file:
            base, done = file.fileno(), 0
            if length >= _LONG and self._opened():
                done = -to % _BLOCK
                _copy(base, self._target, begin, to, done, advance)
                done += self._write(base, begin + done, to + done, length - done, advance)
            _copy(base, self._target, begin + done, to + done, length - done, advance)

    def _opened(self) -> bool:
        """Whether the new file is open a second time, to be written around the page cache."""
        if self._able and self._direct is None:
            try:
                self._direct = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
                self._memory = mmap.mmap(-1, _PIECE)  # begins where a page does
            except OSError:
                self._able = False
        return self._able

    def _write(self, base: int, begin: int, to: int, length: int, advance: Advance) -> int:
        """Write whole blocks around the page cache; how many bytes they were: less than asked for where it failed."""
        assert self._memory is not None
        assert self._direct is not None
        done, whole = 0, length - length % _BLOCK
        with memoryview(self._memory) as memory:
            while done < whole:
                found = os.preadv(base, [memory[: min(_PIECE, whole - done)]], begin + done)
                try:
                    moved = os.pwrite(self._direct, memory[: found - found % _BLOCK], to + done)
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise
                    self._able = False
                    break
                done += moved
                advance(moved)
                if moved == 0 or moved % _BLOCK:  # the base ends here, or the disk does: `_copy` says which
                    break
        return done


def _copy(source: int, target: int, begin: int, to: int, length: int, advance: Advance) -> None:
    """Copy in the kernel, or in this process where that cannot be."""
    done = 0
    while done < length:
        count = min(_CHUNK, length - done)
        try:
            moved = os.copy_file_range(source, target, count, begin + done, to + done)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT:
                raise
            break
        if moved == 0:
            raise OSError(errno.EIO, "the base became shorter while it was read")
        done += moved
        advance(moved)
    else:
        return
    os.lseek(source, begin + done, os.SEEK_SET)
    os.lseek(target, to + done, os.SEEK_SET)
    with os.fdopen(os.dup(source), "rb") as reader, os.fdopen(os.dup(target), "wb") as writer:
        while done < length:
            piece = reader.read(min(1 << 20, length - done))
            if not piece:
                raise OSError(errno.EIO, "the base became shorter while it was read")
            writer.write(piece)
            done += len(piece)
            advance(len(piece))


def copy_into(source: Path, path: Path, *, advance: Advance) -> None:
    """Copy a file of the base to the new ``path``, its folder made where needed.

    Raises:
        OSError: of the system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with path.open("xb") as file, Copier(path, file.fileno()) as copier:
        if clone(source, file.fileno()):
            advance(size)
        else:
            copier.copy(source, 0, 0, size, advance=advance)
    shutil.copymode(source, path)

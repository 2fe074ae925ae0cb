"""Shards written from shards: unchanged bytes copied by the kernel, changed tensors written in their place.

A merge changes a few tensors of a file of gigabytes. Where the header stays the same the whole shard is cloned
(FICLONE: no bytes move at all on btrfs, XFS, bcachefs) and the changed tensors are written over the clone. Where a
file system cannot clone, or names are added, dropped, renamed or retyped, the file is written from its beginning to
its end: a header, runs of unchanged bytes that the kernel copies, and between them what is computed. That is asked
for tensor by tensor, in parts, when its turn comes: memory does not grow with the model.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.safefile import DTYPES, SafeFile

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY, errno.EBADF}
_CHUNK = 64 << 20  # bytes between two reports of progress


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor taken as it is from a shard."""

    shard: SafeFile
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A tensor computed when it is written.

    ``parts()`` yields C-ordered pieces that follow one another; ``memory``: about the bytes that takes.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[NDArray[Any]]]
    memory: int = 0


Entry = Stored | Made
#: Called with the number of bytes just written.
Advance = Callable[[int], None]


def entry_bytes(entry: Entry) -> int:
    """Size of an entry's payload in bytes."""
    dtype, shape = _type(entry)
    return int(np.dtype(DTYPES[dtype]).itemsize * np.prod(shape, dtype=np.int64))


def write_shard(path: Path, source: SafeFile, entries: Mapping[str, Entry], *, advance: Advance) -> None:
    """Write one shard.

    Args:
        path: new file.
        source: the shard it is made from; its metadata is kept.
        entries: all tensors by name.
        advance: told of every piece written.

    Raises:
        OSError: of the system.
    """
    asked = {name: _type(entry) for name, entry in entries.items()}
    there = {name: (str(e["dtype"]), tuple(e["shape"])) for name, e in source.table.items()}
    own = all(isinstance(e, Made) or (e.shard is source and e.name == name) for name, e in entries.items())
    with path.open("xb") as file:
        target = file.fileno()
        if asked == there and own:
            offsets = {name: source.start + e["data_offsets"][0] for name, e in source.table.items()}
            cloned = _clone(source.path, target)
            if cloned:
                advance(sum(entry_bytes(e) for e in entries.values() if isinstance(e, Stored)))
            else:
                file.write(source.content[: source.start])
        else:
            cloned = False
            header, offsets = _layout(source, asked, entries)
            file.write(header)
        file.flush()
        pieces: list[tuple[int, Made | tuple[SafeFile, int, int]]] = []
        if not cloned:
            pieces += [(to, (shard, begin, length)) for shard, begin, to, length in _runs(entries, offsets)]
        pieces += [(offsets[name], entry) for name, entry in entries.items() if isinstance(entry, Made)]
        for offset, piece in sorted(pieces, key=lambda pair: pair[0]):
            if isinstance(piece, Made):
                _write_parts(target, offset, piece, advance)
                continue
            shard, begin, length = piece
            with shard.path.open("rb") as base:
                _copy_range(base.fileno(), target, begin, offset, length, advance=advance)


def copy_file(source: Path, target: int, *, advance: Advance) -> None:
    """Clone or copy the whole of ``source`` into the open file ``target``.

    Raises:
        OSError: of the system.
    """
    size = source.stat().st_size
    if _clone(source, target):
        advance(size)
        return
    with source.open("rb") as base:
        _copy_range(base.fileno(), target, 0, 0, size, advance=advance)


def _clone(source: Path, target: int) -> bool:
    """Whether the file system made ``target`` share the blocks of ``source``."""
    try:
        import fcntl

        with source.open("rb") as base:
            fcntl.ioctl(target, _FICLONE, base.fileno())
    except (ImportError, OSError):  # no such file system, or two of them
        return False
    return True


def _copy_range(source: int, target: int, begin: int, to: int, length: int, *, advance: Advance) -> None:
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


def _layout(
    source: SafeFile, asked: Mapping[str, tuple[str, tuple[int, ...]]], entries: Mapping[str, Entry]
) -> tuple[bytes, dict[str, int]]:
    """Header of a new shard and each tensor's offset in the file: wide types first, so that all are aligned."""
    order = sorted(asked, key=lambda name: -np.dtype(DTYPES[asked[name][0]]).itemsize)
    table: dict[str, Any] = {"__metadata__": dict(source.metadata)} if source.metadata else {}
    begins: dict[str, int] = {}
    end = 0
    for name in order:
        size = entry_bytes(entries[name])
        begins[name] = end
        table[name] = {"dtype": asked[name][0], "shape": list(asked[name][1]), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


def _runs(entries: Mapping[str, Entry], offsets: Mapping[str, int]) -> list[tuple[SafeFile, int, int, int]]:
    """(shard, from, to, length) of unchanged bytes; neighbours in both files are one run."""
    runs: list[tuple[SafeFile, int, int, int]] = []
    for name in sorted(entries, key=lambda name: offsets[name]):
        entry = entries[name]
        if isinstance(entry, Made):
            continue
        begin, stop = (entry.shard.start + place for place in entry.shard.table[entry.name]["data_offsets"])
        to, length = offsets[name], stop - begin
        if runs:
            shard, first, target, before = runs[-1]
            if shard is entry.shard and first + before == begin and target + before == to:
                runs[-1] = (shard, first, target, before + length)
                continue
        runs.append((entry.shard, begin, to, length))
    return runs


def _write_parts(target: int, offset: int, entry: Made, advance: Advance) -> None:
    size, end = entry_bytes(entry), offset
    for part in entry.parts():
        data = memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        while data:
            moved = os.pwrite(target, data, end)
            data, end = data[moved:], end + moved
            advance(moved)
    assert end - offset == size, f"{end - offset} bytes made for {size}"


def _type(entry: Entry) -> tuple[str, tuple[int, ...]]:
    if isinstance(entry, Made):
        return entry.dtype, entry.shape
    stored = entry.shard.table[entry.name]
    return str(stored["dtype"]), tuple(stored["shape"])


def copy_into(source: Path, path: Path, *, advance: Advance) -> None:
    """Copy a file of the base to the new ``path``, its folder made where needed.

    Raises:
        OSError: of the system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        copy_file(source, file.fileno(), advance=advance)
    shutil.copymode(source, path)

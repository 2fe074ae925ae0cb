"""Shards written from shards: unchanged bytes are copied, changed tensors written in their place.

A merge changes a few tensors of a file of gigabytes. Where the header stays the same the whole shard is cloned if the
file system can, and the changed tensors are written over the clone. Where it cannot, or names are added, dropped,
renamed or retyped, the file is written from its beginning to its end: a header, runs of unchanged bytes
(`checkpoints.copying`), and between them what is computed. That is asked for tensor by tensor, in parts, when its turn
comes: memory does not grow with the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.copying import Advance, Copier, clone
from ssh_deploy.checkpoints.safefile import DTYPES, SafeFile


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
    with path.open("xb") as file, Copier(path, file.fileno()) as copier:
        target = file.fileno()
        if keeps_layout(source, entries):
            offsets = {name: source.start + e["data_offsets"][0] for name, e in source.table.items()}
            cloned = clone(source.path, target)
            if cloned:
                advance(sum(entry_bytes(e) for e in entries.values() if isinstance(e, Stored)))
            else:
                file.write(source.content[: source.start])
        else:
            cloned = False
            header, offsets = _layout(source, entries)
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
            copier.copy(shard.path, begin, offset, length, advance=advance)


def keeps_layout(source: SafeFile, entries: Mapping[str, Entry]) -> bool:
    """Whether ``entries`` have the header of ``source``, and nothing but changed tensors is not its own."""
    asked = {name: _type(entry) for name, entry in entries.items()}
    there = {name: (str(e["dtype"]), tuple(e["shape"])) for name, e in source.table.items()}
    own = all(isinstance(e, Made) or (e.shard is source and e.name == name) for name, e in entries.items())
    return asked == there and own


def _layout(source: SafeFile, entries: Mapping[str, Entry]) -> tuple[bytes, dict[str, int]]:
    """Header of a new shard and each tensor's offset in the file: wide types first, so that all are aligned."""
    asked = {name: _type(entry) for name, entry in entries.items()}
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

"""safetensors files opened without trust: the header is checked in full before a byte of payload is touched.

The safetensors library reads well-formed files well; what it does not do is let a caller see the declared shapes
before mapping, report which tensor is out of bounds, or hand out zero-copy numpy views. Its own parser still
writes every file here (`safetensors.numpy`). Adapters and checkpoints both are read through it; each says which
error it raises.

Adapters of one base and one n have the same table of tensors, byte for byte: what a table says is worked out once
for its text (and the payload's size), not for every file, and so is what a reader makes of it (`Table.known`). That
is half of the time an adapter takes to be read.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import CheckpointError, DeployError

MAX_HEADER = 16 << 20
MAX_READ = 256 << 20  # larger files are mapped even where they could be read
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_DTYPES = {code: np.dtype(dtype) for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_FIRST = f'{{"{_METADATA}":{{'  # how safetensors begins a header with metadata
_KEPT = 1 << 18  # characters of the longest text that is kept: all seven linears of 60 blocks have 200,000
#: JSON as digests take it: sorted keys, no spaces, ASCII.
canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_FETCH, _FORGED = "Fetch or make the file again.", "The file is damaged or forged."


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """Tensors of one ``shape`` and ``dtype``, from the bytes ``starts``: one array, as many equal ``strides`` apart.

    ``strides``: of that array; None where the tensors do not lie so.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    starts: tuple[int, ...]
    strides: tuple[int, ...] | None

    def of(self, payload: memoryview) -> NDArray[Any]:
        """[tensors, *shape], read-only; zero-copy where they lie in equal steps."""
        if self.strides is None:
            together = np.array([np.ndarray(self.shape, self.dtype, payload, start) for start in self.starts])
            together.flags.writeable = False
            return together
        return np.ndarray((len(self.starts), *self.shape), self.dtype, payload, self.starts[0], self.strides)


@dataclass(frozen=True, eq=False)
class Table:
    """A header's tensors, found sound for a payload of one size.

    ``entries`` as in the header; ``runs`` (names, shape, dtype, first byte) of tensors of one shape and dtype that
    follow one another; ``metadata``: what the text held besides; ``known``: what readers worked out from it, by the
    reader's name, for as long as the table is kept.
    """

    entries: Mapping[str, Mapping[str, Any]]
    runs: Sequence[tuple[Sequence[str], tuple[int, ...], np.dtype[Any], int]]
    metadata: Any
    known: dict[str, Any] = field(default_factory=dict)

    def form(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape of the tensor ``name``."""
        entry = self.entries[name]
        return _DTYPES[entry["dtype"]], tuple(entry["shape"])

    def alike(self, names: Sequence[str]) -> Alike:
        """The tensors ``names``, one or more, all of one form."""
        dtype, shape = self.form(names[0])
        starts = tuple(self.entries[name]["data_offsets"][0] for name in names)
        steps = {after - before for before, after in pairwise(starts)} or {0}
        inner = np.empty(shape, dtype).strides if len(steps) == 1 else ()
        return Alike(shape, dtype, starts, (*steps, *inner) if len(steps) == 1 else None)

    def views(self, payload: memoryview) -> dict[str, NDArray[Any]]:
        """Tensors by name, in the header's order, read-only where ``payload`` is."""
        found: dict[str, NDArray[Any]] = {}
        for names, shape, dtype, start in self.runs:
            together = np.ndarray((len(names), *shape), dtype, payload, start)
            if shape:  # the rows of an array come five times as fast as arrays are made
                found.update(zip(names, together, strict=True))
            else:
                found.update((name, together[i, ...]) for i, name in enumerate(names))
        return found

    @cached_property
    def canonical(self) -> str:
        """`canonical_json` of ``entries``."""
        return canonical_json(self.entries)


@dataclass(frozen=True, eq=False)
class SafeFile:
    """A mapped (or read) safetensors file.

    ``metadata`` str→str; ``header`` what it says of tensors; ``payload`` the bytes behind the header, which begin at
    ``start`` of the file.
    """

    path: Path
    metadata: Mapping[str, str]
    header: Table
    payload: memoryview
    start: int

    @cached_property
    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Zero-copy read-only views by name."""
        return self.header.views(self.payload)

    @property
    def table(self) -> Mapping[str, Mapping[str, Any]]:
        """Entries of the header by name."""
        return self.header.entries

    @property
    def content(self) -> memoryview:
        """The whole file, header included."""
        return memoryview(self.payload.obj)

    def read_into(self, handle: int, array: NDArray[Any], offset: int) -> None:
        """Fill ``array`` (contiguous) from byte ``offset`` of the file, opened as ``handle``.

        A mapped page of a file that became shorter would kill this process.

        Raises:
            CheckpointError: it ends before.
        """
        data = memoryview(array.reshape(-1).view(np.uint8).data)
        while data:
            count = os.preadv(handle, [data], offset)
            if not count:
                raise CheckpointError(f"{self.path}: became shorter while it was read.", hint="Leave the base alone.")
            data, offset = data[count:], offset + count

    def forget(self) -> None:
        """Give mapped pages back to the page cache: what was read no longer counts as this process's memory."""
        mapped = self.payload.obj
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # file-backed and read-only: pages come back on the next touch


def open_safefile(path: Path, *, error: type[DeployError], mapped: bool = True) -> SafeFile:
    """Open ``path`` and check its header.

    Args:
        path: the file.
        error: what to raise when it is missing, truncated, has a header that is not JSON, or tensors that are not
            the payload's bytes from end to end.
        mapped: False reads a file of up to `MAX_READ` bytes at once: whoever rewrites it in place then neither
            changes what was checked nor kills this process, which a mapped file that shrinks does.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise error(f"{path}: {size} bytes are no safetensors file.", hint=_FETCH)
            if mapped or size > MAX_READ:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            else:
                view = memoryview(file.readall())
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}.", hint="Check the path.") from cause
    size, length = len(view), int.from_bytes(view[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise error(f"{path}: header of {length} bytes in a file of {size}: truncated or damaged.", hint=_FETCH)
    payload = view[8 + length :]
    try:
        metadata, table = _header(bytes(view[8 : 8 + length]), len(payload))
    except _BrokenError as broken:
        raise error(f"{path}: {broken.what}", hint=broken.hint) from broken
    return SafeFile(path, metadata, table, payload, 8 + length)


class _BrokenError(Exception):
    """Internal: what is wrong with a header, whosever it is."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


def _header(raw: bytes, size: int) -> tuple[dict[str, str], Table]:
    """Metadata and table of a header before ``size`` bytes of payload."""
    try:
        text = raw.decode()
        metadata, end = _DECODER.raw_decode(text, len(_FIRST) - 1) if text.startswith(_FIRST) else (None, 0)
    except (ValueError, RecursionError) as cause:
        raise _not_json(cause) from cause
    apart = text[end : end + 2] == ',"'
    text = "{" + text[end + 1 :] if apart else text
    table = (_table if len(text) <= _KEPT else _table.__wrapped__)(text, size)
    if not apart:
        metadata = table.metadata if table.metadata is not None else {}
    elif table.metadata is not None:
        raise _BrokenError(f"header names {_METADATA!r} twice.", "The file is forged.")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _BrokenError("metadata is not text by name.", _FETCH)
    return metadata, table


@lru_cache(maxsize=32)
def _table(text: str, size: int) -> Table:
    try:
        entries = _DECODER.decode(text)
    except (ValueError, RecursionError) as cause:
        raise _not_json(cause) from cause
    if not isinstance(entries, dict):
        raise _BrokenError("header is not a JSON object.", "Not a safetensors file, or damaged.")
    metadata = entries.pop(_METADATA, None)
    runs, end = _runs(entries, size), 0
    for start, stop in sorted([entry["data_offsets"] for entry in entries.values()]):
        if start != end:
            raise _BrokenError(f"tensors overlap or leave a gap at byte {end}.", _FETCH)
        end = stop
    if end != size:
        raise _BrokenError(f"{size} bytes of payload, {end} declared: truncated.", _FETCH)
    return Table(entries, runs, metadata)


def _runs(entries: Mapping[str, Any], size: int) -> Sequence[tuple[Sequence[str], tuple[int, ...], np.dtype[Any], int]]:
    """See `Table`; of ``size`` bytes of payload."""
    runs: list[tuple[list[str], tuple[int, ...], np.dtype[Any], int]] = []
    end = 0
    for name, entry in entries.items():
        shape, dtype, start, stop = _place(name, entry, size)
        if runs and start == end and (shape, dtype) == runs[-1][1:3]:
            runs[-1][0].append(name)
        else:
            runs.append(([name], shape, dtype, start))
        end = stop
    return runs


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # json would keep the last in silence, other readers the first
        names = [name for name, _ in pairs]
        raise _BrokenError(f"header names {max(names, key=names.count)!r} twice.", "The file is forged.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _not_json(cause: Exception) -> _BrokenError:
    return _BrokenError(f"header is not JSON ({cause}).", "Not a safetensors file, or damaged.")


def _place(name: str, entry: Any, size: int) -> tuple[tuple[int, ...], np.dtype[Any], int, int]:
    """Shape, dtype, first byte and the byte after the last."""
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape = entry["shape"]
        start, stop = entry["data_offsets"]
        whole, count, extent = type(shape) is list, 1, 1
        for number in (start, stop, *shape):
            whole = whole and type(number) is int and 0 <= number < 1 << 48
        for side in shape if whole else ():
            count *= side  # Python integers: no overflow for a forged shape
            extent *= side or 1
    except (KeyError, TypeError, ValueError) as cause:
        raise _BrokenError(f"entry of {name!r} is not a tensor: {entry!r:.200}.", _FORGED) from cause
    whole = whole and extent < 1 << 40  # numpy refuses a shape beside a side of 0 as it does any other
    if not whole or len(shape) > 8 or not start <= stop <= size or stop - start != count * dtype.itemsize:
        raise _BrokenError(
            f"{name!r} declares {entry['dtype']} {shape} at bytes {start}…{stop} of {size}: truncated or damaged.",
            _FORGED,
        )
    return tuple(shape), dtype, start, stop

"""safetensors files opened without trust: the header is checked in full before a byte of payload is touched.

The safetensors library reads well-formed files well; what it does not do is let a caller see the declared shapes
before mapping, report which tensor is out of bounds, or hand out zero-copy numpy views. Its own parser still
writes every file here (`safetensors.numpy`). Adapters and checkpoints both are read through it; each says which
error it raises.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeployError

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


@dataclass(frozen=True, slots=True, eq=False)
class SafeFile:
    """A mapped (or read) safetensors file.

    ``metadata`` str→str; ``table`` the header; ``tensors`` zero-copy read-only views; ``payload`` the bytes behind
    the header, which begin at ``start`` of the file.
    """

    path: Path
    metadata: Mapping[str, str]
    table: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, NDArray[Any]]
    payload: memoryview
    start: int

    @property
    def content(self) -> memoryview:
        """The whole file, header included."""
        return memoryview(self.payload.obj)

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
    hint = "Fetch or make the file again."
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise error(f"{path}: {size} bytes are no safetensors file.", hint=hint)
            if mapped or size > MAX_READ:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            else:
                view = memoryview(file.readall())
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}.", hint="Check the path.") from cause
    size, length = len(view), int.from_bytes(view[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise error(f"{path}: header of {length} bytes in a file of {size}: truncated or damaged.", hint=hint)
    header = _header(path, bytes(view[8 : 8 + length]), error)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise error(f"{path}: metadata is not text by name.", hint=hint)
    payload = view[8 + length :]
    tensors = {name: _tensor(path, name, entry, payload, error) for name, entry in header.items()}
    end = 0
    for start, stop in sorted([entry["data_offsets"] for entry in header.values()]):
        if start != end:
            raise error(f"{path}: tensors overlap or leave a gap at byte {end}.", hint=hint)
        end = stop
    if end != len(payload):
        raise error(f"{path}: {len(payload)} bytes of payload, {end} declared: truncated.", hint=hint)
    return SafeFile(path, metadata, header, tensors, payload, 8 + length)


def _header(path: Path, raw: bytes, error: type[DeployError]) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):  # json would keep the last in silence, other readers the first
            names = [name for name, _ in pairs]
            raise error(f"{path}: header names {max(names, key=names.count)!r} twice.", hint="The file is forged.")
        return found

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: header is not JSON ({cause}).", hint="Not a safetensors file, or damaged.") from cause
    if not isinstance(header, dict):
        raise error(f"{path}: header is not a JSON object.", hint="Not a safetensors file, or damaged.")
    return header


def _tensor(path: Path, name: str, entry: Any, payload: memoryview, error: type[DeployError]) -> NDArray[Any]:
    hint = "The file is damaged or forged."
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape = entry["shape"]
        start, stop = entry["data_offsets"]
        whole, count = type(shape) is list, 1
        for number in (start, stop, *shape):
            whole = whole and type(number) is int and 0 <= number < 1 << 48
        for side in shape if whole else ():
            count *= side  # Python integers: no overflow for a forged shape
    except (KeyError, TypeError, ValueError) as cause:
        raise error(f"{path}: entry of {name!r} is not a tensor: {entry!r:.200}.", hint=hint) from cause
    if not whole or len(shape) > 8 or not start <= stop <= len(payload) or stop - start != count * dtype.itemsize:
        raise error(
            f"{path}: {name!r} declares {entry['dtype']} {shape} at bytes {start}…{stop} of {len(payload)}: "
            "truncated or damaged.",
            hint=hint,
        )
    return np.ndarray(shape, dtype, payload, start)

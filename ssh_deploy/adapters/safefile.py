"""safetensors files opened without trust: the header is checked in full before a byte of payload is touched.

The safetensors library reads well-formed files well; what it does not do is let a caller see the declared shapes
before mapping, report which tensor is out of bounds, or hand out zero-copy numpy views. Its own parser still
writes every file here (`safetensors.numpy`).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import AdapterFileError

MAX_HEADER = 16 << 20
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
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


@dataclass(frozen=True, slots=True, eq=False)
class SafeFile:
    """A mapped safetensors file: ``metadata`` str→str, ``tensors`` zero-copy read-only views, ``payload`` bytes."""

    path: Path
    metadata: Mapping[str, str]
    table: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, NDArray[Any]]
    payload: memoryview


def open_safefile(path: Path) -> SafeFile:
    """Map ``path`` and check its header.

    Raises:
        AdapterFileError: missing, truncated, a header that is not JSON, or tensors outside the payload.
    """
    hint = "Fetch or make the file again."
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 8:
                raise AdapterFileError(f"{path}: {size} bytes are no safetensors file.", hint=hint)
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror}.", hint="Check the path.") from error
    length = int.from_bytes(view[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise AdapterFileError(
            f"{path}: header of {length} bytes in a file of {size}: truncated or damaged.", hint=hint
        )
    header = _header(path, bytes(view[8 : 8 + length]))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(f"{path}: metadata is not text by name.", hint=hint)
    payload = view[8 + length :]
    tensors = {name: _tensor(path, name, entry, payload) for name, entry in header.items()}
    spans = sorted((entry["data_offsets"][0], entry["data_offsets"][1]) for entry in header.values())
    end = 0
    for start, stop in spans:
        if start != end:
            raise AdapterFileError(f"{path}: tensors overlap or leave a gap at byte {end}.", hint=hint)
        end = stop
    if end != len(payload):
        raise AdapterFileError(f"{path}: {len(payload)} bytes of payload, {end} declared: truncated.", hint=hint)
    return SafeFile(path, metadata, header, tensors, payload)


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: header is not JSON ({error}).", hint="Not a safetensors file.") from error
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path}: header is not a JSON object.", hint="Not a safetensors file.")
    return header


def _tensor(path: Path, name: str, entry: Any, payload: memoryview) -> NDArray[Any]:
    hint = "The file is damaged or forged."
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape = entry["shape"]
        start, stop = entry["data_offsets"]
        whole = all(type(x) is int and 0 <= x < 1 << 48 for x in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: entry of {name!r} is not a tensor: {entry!r:.200}.", hint=hint) from error
    count = 1
    for side in shape:
        count *= side  # Python integers: no overflow for a forged shape
    if not whole or len(shape) > 8 or not start <= stop <= len(payload) or stop - start != count * dtype.itemsize:
        raise AdapterFileError(
            f"{path}: {name!r} declares {entry['dtype']} {shape} at bytes {start}…{stop} of {len(payload)}: "
            "truncated or damaged.",
            hint=hint,
        )
    return np.frombuffer(payload[start:stop], dtype=dtype).reshape(shape)

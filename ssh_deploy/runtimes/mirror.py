"""A bank's rows on the device: uploaded when an adapter was loaded since, lent to every run until then.

ONNX Runtime copies whatever host arrays it is fed to the GPU, so a bank of 256 MB would travel with each batch. Here
only the rows that were ever used travel, and only after one was written. Their number is rounded up to a power of two:
runs see few shapes, since ONNX Runtime plans memory anew for each.

An upload makes a new copy and leaves the old one to the runs that hold it. *What it costs*: the rows in use once more,
on the device, twice while one is uploaded. *Not covered*: ONNX Runtime's Python has no way to write a single row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

#: An array to ONNX Runtime's own value on the device.
Upload = Callable[[NDArray[Any]], Any]


class Mirror:
    """What is on the device of the arrays of a bank; safe from several threads."""

    def __init__(self, upload: Upload) -> None:
        """Nothing yet."""
        self._upload = upload
        self._lock = threading.Lock()
        self._version = -1
        self._values: dict[str, Any] = {}

    def values(self, arrays: Mapping[str, NDArray[Any]], *, used: int, version: int) -> dict[str, Any]:
        """``arrays`` [rows, …] on the device, at least their first ``used`` rows.

        Args:
            arrays: of the bank, by input name; rows that nobody holds may be written meanwhile.
            used: rows that were ever used, the empty one included.
            version: grows with every row that was written, after it was.
        """
        with self._lock:
            if version > self._version:
                rows = 1 << (used - 1).bit_length()
                self._values = {name: self._upload(array[:rows]) for name, array in arrays.items()}
                self._version = version
            return dict(self._values)

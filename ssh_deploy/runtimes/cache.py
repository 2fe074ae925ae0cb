"""The KV cache of rows that come and go: what ONNX Runtime gave back, and which of its columns are whose.

A run takes the past as `past_key_values.{i}.key|value` [rows, kv_heads, past, head_dim] and gives it back one longer;
from step to step the values are passed on as they are. Only when a row joins or leaves are they copied: rows are
picked, columns that no row uses any more are dropped, shorter rows are padded in front (in a packed cache behind). A
row's columns need not be adjacent (prompts padded behind leave a gap): the mask says which are its own, and its next
position is their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.runtimes.session import ort_value


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """The past of a batch.

    ``values``: an OrtValue [rows, kv_heads, past, head_dim] for each past input of the model, in its order.
    ``mask``: bool [rows, past], True where a column is the row's own token.
    ``packed``: a row's tokens are its first columns.
    """

    values: tuple[Any, ...]
    mask: NDArray[np.bool_]
    packed: bool = False

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.mask.shape[0]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [rows]."""
        return self.mask.sum(axis=1, dtype=np.int64)

    def only(self, rows: Sequence[int]) -> Cache:
        """The cache of ``rows``, in that order, as short as they allow."""
        mask = self.mask[list(rows)]
        used = mask.any(axis=0)
        values = tuple(ort_value(v.numpy()[list(rows)][:, :, used]) for v in self.values)
        return Cache(values, mask[:, used], self.packed)

    def beside(self, other: Cache) -> Cache:
        """The rows of this cache, then those of ``other``, as long as the longer."""
        past, packed = max(self.mask.shape[1], other.mask.shape[1]), self.packed
        mask = np.concatenate([_filled(one.mask, past, axis=1, behind=packed) for one in (self, other)])
        pairs = zip(self.values, other.values, strict=True)
        values = [np.concatenate([_filled(v.numpy(), past, axis=2, behind=packed) for v in pair]) for pair in pairs]
        return Cache(tuple(map(ort_value, values)), mask, packed)


def _filled(array: NDArray[Any], size: int, *, axis: int, behind: bool) -> NDArray[Any]:
    """``array`` with zeros in front or behind until ``axis`` has ``size``."""
    lack = size - array.shape[axis]
    if not lack:
        return array
    sides = list(array.shape)
    sides[axis] = lack
    zeros = np.zeros(sides, array.dtype)
    return np.concatenate([array, zeros] if behind else [zeros, array], axis=axis)

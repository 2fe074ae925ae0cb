"""ΔW of one weight in blocks of rows of the stored tensor: made where asked for, whole only where it must be.

Spectra and products of thin matrices give any rows of themselves on the CPU. Every other change (one that reads the
weight, one of a device) is summed whole in float32 first, one tensor at a time in this process: PEFT's own layers
draw from torch's one random state, and memory stays that of one tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.orientation import is_transposed, site_weight
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.transforms.cpu import RowSynthesis, block_rows, transposed

_WHOLE = threading.Lock()


class RowChange(Protocol):
    """Blocks of rows of a change; several threads may ask, each with a `scratch` of its own."""

    def scratch(self) -> Any:
        """One thread's own memory."""

    def block(self, start: int, count: int, scratch: Any) -> NDArray[Any]:
        """Rows ``start`` to ``start + count``, [count, columns]; may lie in ``scratch``."""


def row_change(
    checkpoint: Checkpoint,
    module: str,
    terms: Sequence[tuple[Delta, float]],
    *,
    rows: int,
    dtype: np.dtype[Any],
    device: str,
) -> RowChange:
    """``Σ wᵢ ΔWᵢ`` in the orientation in which ``module``'s weight is stored.

    Args:
        checkpoint: holds the weight, which some changes read.
        module: path of the weight in it.
        terms: each ΔWᵢ [out, in] with its weight wᵢ.
        rows: of the largest block that will be asked for.
        dtype: float32 or float64.
        device: ``cpu``, or ``cuda`` for everything whole.
    """
    turned = is_transposed(checkpoint, module)
    by_rows = [_by_rows(delta, scale, turned, rows, dtype) if device == "cpu" else None for delta, scale in terms]
    found: list[RowChange] = [change for change in by_rows if change is not None]
    rest = [term for term, change in zip(terms, by_rows, strict=True) if change is None]
    if rest:
        base = site_weight(checkpoint, module)
        total = np.zeros(rest[0][0].shape, dtype=dtype)
        with _WHOLE:
            for delta, scale in rest:
                accumulate(total, delta, scale, device, base)
        found.append(_Whole(total.T if turned else total))
    return found[0] if len(found) == 1 else _Sum(found)


def working_bytes(terms: Sequence[tuple[Delta, float]], shape: tuple[int, ...], *, threads: int, device: str) -> int:
    """About the most bytes that making one tensor of ``shape`` takes: blocks of each thread, and what is held whole."""
    block = 4 * shape[1] * block_rows((shape[0], shape[1]))
    size = 10 * block * threads
    for delta, _ in terms:
        if device == "cpu" and isinstance(delta, SpectralDelta):
            held = min(delta.values.size, shape[1])
            size += 2 * block * threads + (4 * shape[0] * held if delta.values.size > held else 0)
        elif device != "cpu" or not isinstance(delta, LowRankDelta):
            size += 8 * shape[0] * shape[1]
    return size


def _by_rows(delta: Delta, scale: float, turned: bool, rows: int, dtype: np.dtype[Any]) -> RowChange | None:
    if isinstance(delta, SpectralDelta):
        spectrum = delta.separable()
        out, inn = delta.shape
        shape, spectrum = ((inn, out), transposed(spectrum)) if turned else ((out, inn), spectrum)
        return RowSynthesis(shape, delta.axis, spectrum, gain=delta.gain * scale, rows=rows, dtype=dtype)
    if isinstance(delta, LowRankDelta):
        left, right = (delta.a.T, delta.b.T) if turned else (delta.b, delta.a)
        return _Product(left.astype(dtype) * dtype.type(delta.scaling * scale), np.ascontiguousarray(right, dtype))
    return None


class _Product:
    """``left @ right``."""

    def __init__(self, left: NDArray[Any], right: NDArray[Any]) -> None:
        self._left, self._right = left, right

    def scratch(self) -> None:
        """See `RowChange.scratch`."""

    def block(self, start: int, count: int, scratch: Any) -> NDArray[Any]:
        """See `RowChange.block`."""
        del scratch
        return self._left[start : start + count] @ self._right


class _Whole:
    """A change that is there as a whole."""

    def __init__(self, total: NDArray[Any]) -> None:
        self._total = total

    def scratch(self) -> None:
        """See `RowChange.scratch`."""

    def block(self, start: int, count: int, scratch: Any) -> NDArray[Any]:
        """See `RowChange.block`."""
        del scratch
        return self._total[start : start + count]


class _Sum:
    """Several changes added."""

    def __init__(self, changes: Sequence[RowChange]) -> None:
        self._changes = changes

    def scratch(self) -> list[Any]:
        """See `RowChange.scratch`."""
        return [change.scratch() for change in self._changes]

    def block(self, start: int, count: int, scratch: Any) -> NDArray[Any]:
        """See `RowChange.block`."""
        blocks = [change.block(start, count, own) for change, own in zip(self._changes, scratch, strict=True)]
        total = blocks[0] + blocks[1]
        for block in blocks[2:]:
            total += block
        return total


def accumulate(total: NDArray[Any], delta: Delta, scale: float, device: str, base: NDArray[Any]) -> None:
    """``total += scale·ΔW``; ``base`` is W [out, in] as stored, for changes that depend on it."""
    import torch

    if isinstance(delta, RelativeDelta):
        own = torch.from_numpy(base.astype(total.dtype)).to(device)
        total += scale * delta.change(own).cpu().numpy()
    elif device == "cpu":
        delta.add_to(torch.from_numpy(total), scale=scale)  # in place for float32 and float64
    else:
        total += scale * delta.dense(device=device, dtype=getattr(torch, total.dtype.name)).cpu().numpy()

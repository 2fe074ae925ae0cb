"""The sparse inverse transform on the CPU: only rows that hold coefficients, column blocks, added straight into W.

``ΔW = F_Mᵀ S F_N`` has two passes. The pass along N touches only the rows of S that hold coefficients (at most n
of M). The pass along M then runs over blocks of columns, so scratch stays a few MB whatever the matrix, and each
block is added to W while it is in cache: no ΔW is ever in memory. Where fewer columns than rows hold
coefficients the transposed problem is solved, since ``ΔWᵀ = F_Nᵀ Sᵀ F_M``. FFTs are ducc0's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms.base import Axis, Separable

_BLOCK = 256  # columns at once: 4096 × 256 f32 = 4 MB, as fast as the whole matrix (anchors.md)


def add_synthesis(weight: NDArray[Any], axis: Axis, spectrum: Separable, *, gain: float, threads: int = 0) -> None:
    """``weight += gain · factor · F_Mᵀ S F_N``, in place.

    Args:
        weight: [M, N], float32 or float64, any strides; the sum is formed in its dtype.
        axis: the 1-D kernel ``F``.
        spectrum: separable coefficients; rows below M, columns below N (checked by whoever read the file).
        gain: factor on the orthonormal synthesis.
        threads: of ducc0; 0 = all.
    """
    if spectrum.rows.size == 0:
        return
    rows = np.unique(spectrum.rows)
    cols = np.unique(spectrum.cols)
    if cols.size < rows.size:
        _add(weight.T, axis, cols, spectrum.cols, spectrum.rows, spectrum.values, gain * spectrum.factor, threads)
    else:
        _add(weight, axis, rows, spectrum.rows, spectrum.cols, spectrum.values, gain * spectrum.factor, threads)


def synthesis(
    shape: tuple[int, int], axis: Axis, spectrum: Separable, *, gain: float, dtype: Any = np.float32, threads: int = 0
) -> NDArray[Any]:
    """``gain · factor · F_Mᵀ S F_N`` as a new array [M, N] of ``dtype`` (float32 or float64)."""
    out = np.zeros(shape, dtype=dtype)
    add_synthesis(out, axis, spectrum, gain=gain, threads=threads)
    return out


def _add(
    weight: NDArray[Any],
    axis: Axis,
    held: NDArray[np.int64],
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    values: NDArray[Any],
    gain: float,
    threads: int,
) -> None:
    m, n = weight.shape
    dtype = weight.dtype
    stage = np.zeros((held.size, n), dtype=dtype)
    np.add.at(stage, (np.searchsorted(held, rows), cols), (values.astype(np.float64) * gain).astype(dtype))
    stage = axis.inverse_cpu(stage, 1, threads=threads)
    scratch = np.empty((m, min(_BLOCK, n)), dtype=dtype)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        block = scratch[:, : stop - start] if stop - start == scratch.shape[1] else np.empty((m, stop - start), dtype)
        block[:] = 0
        block[held] = stage[:, start:stop]
        weight[:, start:stop] += axis.inverse_cpu(block, 0, threads=threads)

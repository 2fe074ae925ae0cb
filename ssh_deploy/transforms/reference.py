"""The definitions, as plain float64 sums: slow, obvious, and what every fast path is tested against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms.base import Float


def cas(t: Float) -> Float:
    """``cos t + sin t``, elementwise."""
    return np.cos(t) + np.sin(t)


def basis(transform: str, u: int, v: int, shape: tuple[int, int], *, norm: str) -> Float:
    """The matrix of one coefficient at (u, v), float64 [M, N].

    ``norm="backward"``: ``1/(MN)`` times the bare basis function (SSH, FourierFT); ``norm="ortho"``: ``1/√(MN)`` times
    it, which has unit Frobenius norm and is an orthonormal basis (``fourier`` apart: its matrices are not one).
    """
    m, n = shape
    x, y = np.arange(m)[:, None], np.arange(n)[None, :]
    if transform == "hartley":
        bare = cas(2 * np.pi * u * x / m) * cas(2 * np.pi * v * y / n)
    elif transform == "hartley-joint":
        bare = cas(2 * np.pi * (u * x / m + v * y / n))
    elif transform == "fourier":
        bare = np.cos(2 * np.pi * (u * x / m + v * y / n))
    elif transform == "cosine":
        bare = np.cos(np.pi * (2 * x + 1) * u / (2 * m)) * np.cos(np.pi * (2 * y + 1) * v / (2 * n))
        bare = bare * (1 if u == 0 else np.sqrt(2)) * (1 if v == 0 else np.sqrt(2))
    else:
        raise ValueError(f"no definition of {transform!r}")
    return bare / (m * n) if norm == "backward" else bare / np.sqrt(m * n)


def delta(
    transform: str,
    rows: NDArray[Any],
    cols: NDArray[Any],
    values: NDArray[Any],
    shape: tuple[int, int],
    *,
    alpha: float,
    norm: str,
) -> Float:
    """``ΔW = α Σ_k s_k · basis(u_k, v_k)``, float64 [M, N]."""
    total = np.zeros(shape)
    for u, v, s in zip(rows.tolist(), cols.tolist(), values.astype(np.float64).tolist(), strict=True):
        total += s * basis(transform, u, v, shape, norm=norm)
    return alpha * total


def analysis(transform: str, weight: NDArray[Any]) -> Float:
    """Orthonormal forward transform by inner products with every basis matrix, float64 [M, N]; O(M²N²)."""
    m, n = weight.shape
    return np.array(
        [[np.sum(weight * basis(transform, u, v, (m, n), norm="ortho")) for v in range(n)] for u in range(m)]
    )

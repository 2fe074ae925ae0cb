"""The discrete Hartley transform, separable (`hartley`, SSH's released code) and joint (`hartley-joint`, its paper).

Separable: ``cas(2πux/M)·cas(2πvy/N)``; joint: ``cas(2π(ux/M + vy/N))``; ``cas t = cos t + sin t``. They are
different transforms (on a 64×64 Gaussian the 200 largest coefficients share 59 places), so files name theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ducc0
import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms.base import Axis, Float, Separable


class HartleyAxis(Axis):
    """``F = C/√n``, ``C[j, k] = cas(2πjk/n)``: symmetric and its own inverse (Bracewell 1983)."""

    name = "hartley"

    def weights(self, n: int) -> NDArray[np.complex128]:
        """``(1+i)/√n`` everywhere."""
        return np.full(n, (1 + 1j) / np.sqrt(n))

    def period(self, n: int) -> int:
        """See `Axis.period`."""
        return n

    def forward_cpu(self, a: NDArray[Any], dim: int, *, threads: int = 0) -> NDArray[Any]:
        """See `Axis.forward_cpu`."""
        return self.inverse_cpu(a, dim, threads=threads)

    def inverse_cpu(
        self, a: NDArray[Any], dim: int, *, threads: int = 0, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """See `Axis.inverse_cpu`."""
        # ducc0's separable_hartley is cos − sin; separable_fht is cos + sin, which is ours.
        out = a if out is None else out
        result: NDArray[Any] = ducc0.fft.separable_fht(a, axes=[dim], inorm=1, out=out, nthreads=threads)
        return result


@dataclass(frozen=True, slots=True)
class SeparableHartley:
    """``F_M W F_Nᵀ``; one coefficient is ``cas(a)·cas(b)``, rank 1."""

    name: str
    axis: Axis

    def separable(
        self, rows: NDArray[Any], cols: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]
    ) -> Separable:
        """Itself."""
        del shape
        return Separable(rows.astype(np.int64), cols.astype(np.int64), values, 1.0)

    def analyze(self, weight: NDArray[Any]) -> Float:
        """Orthonormal separable Hartley spectrum, float64 [M, N]."""
        a = np.array(weight, dtype=np.float64)
        return self.axis.forward_cpu(self.axis.forward_cpu(a, 0), 1)


@dataclass(frozen=True, slots=True)
class JointHartley:
    """``(Re − Im)(fft2 W)/√(MN)``; one coefficient is ``cas(a+b)``, rank 2."""

    name: str
    axis: Axis

    def separable(
        self, rows: NDArray[Any], cols: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]
    ) -> Separable:
        """``cas(a+b) = ½[(u,v) + (−u,v) + (u,−v) − (−u,−v)]``, −u meaning ``(M−u) mod M`` (run, 1e-14)."""
        u, v = rows.astype(np.int64), cols.astype(np.int64)
        minus_u, minus_v = (shape[0] - u) % shape[0], (shape[1] - v) % shape[1]
        return Separable(
            np.concatenate([u, minus_u, u, minus_u], axis=-1),
            np.concatenate([v, v, minus_v, minus_v], axis=-1),
            np.concatenate([values, values, values, -values], axis=-1),
            0.5,
        )

    def analyze(self, weight: NDArray[Any]) -> Float:
        """Orthonormal joint Hartley spectrum, float64 [M, N]."""
        a = np.array(weight, dtype=np.float64)
        result: Float = ducc0.fft.genuine_fht(a, inorm=1, out=a, nthreads=0)
        return result


_AXIS = HartleyAxis()
SEPARABLE = SeparableHartley("hartley", _AXIS)
JOINT = JointHartley("hartley-joint", _AXIS)

"""The real part of the 2-D Fourier transform (FourierFT): one coefficient is ``cos(a+b)``, two separable Hartley ones.

``Re(ifft2 S)`` of a real S has basis matrices ``cos(2π(ux/M + vy/N))``. They are no orthonormal basis: (u, v) and
(−u, −v) are the same matrix, sines cannot be made at all, and two coefficients on such a pair simply add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms.base import Axis, Float, Separable
from ssh_deploy.transforms.hartley import HartleyAxis


@dataclass(frozen=True, slots=True)
class Fourier:
    """``Re(fft2 W)/√(MN)``; one coefficient is ``cos(a+b)``, rank 2."""

    name: str
    axis: Axis

    def separable(
        self, rows: NDArray[Any], cols: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]
    ) -> Separable:
        """``cos(a+b) = ½[(u,−v) + (−u,v)]``, −u meaning ``(M−u) mod M`` (run, 1e-14)."""
        u, v = rows.astype(np.int64), cols.astype(np.int64)
        return Separable(
            np.concatenate([u, (shape[0] - u) % shape[0]], axis=-1),
            np.concatenate([(shape[1] - v) % shape[1], v], axis=-1),
            np.concatenate([values, values], axis=-1),
            0.5,
        )

    def analyze(self, weight: NDArray[Any]) -> Float:
        """Inner products with every ``cos(a+b)/√(MN)``, float64 [M, N]."""
        return np.ascontiguousarray(np.fft.fft2(np.asarray(weight, dtype=np.float64), norm="ortho").real)


FOURIER = Fourier("fourier", HartleyAxis())

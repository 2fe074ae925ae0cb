"""The orthonormal discrete cosine transform, DCT-II forward and DCT-III back (sDCTFT, MaCP, LoCA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ducc0
import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms.base import Axis, Float, Index, Separable


class CosineAxis(Axis):
    """``F[k, j] = c_k cos(π(2j+1)k/2n)``, ``c_0 = √(1/n)``, else ``√(2/n)`` (Ahmed, Natarajan, Rao 1974)."""

    name = "cosine"

    def weights(self, n: int) -> NDArray[np.complex128]:
        """``c_k·exp(−iπk/2n)``, the phases left over by Makhoul's permutation."""
        k = np.arange(n)
        weights = np.sqrt(2 / n) * np.exp(-0.5j * np.pi * k / n)
        weights[0] = np.sqrt(1 / n)
        return weights

    def permutation(self, n: int) -> Index | None:
        """Even places upwards, then odd places downwards (Makhoul 1980)."""
        j = np.arange(n)
        return np.concatenate([j[::2], j[1::2][::-1]])

    def period(self, n: int) -> int:
        """See `Axis.period`."""
        return 2 * n

    def forward_cpu(self, a: NDArray[Any], dim: int, *, threads: int = 0) -> NDArray[Any]:
        """See `Axis.forward_cpu`."""
        result: NDArray[Any] = ducc0.fft.dct(a, type=2, axes=[dim], inorm=1, out=a, nthreads=threads)
        return result

    def inverse_cpu(
        self, a: NDArray[Any], dim: int, *, threads: int = 0, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """See `Axis.inverse_cpu`."""
        out = a if out is None else out
        result: NDArray[Any] = ducc0.fft.dct(a, type=3, axes=[dim], inorm=1, out=out, nthreads=threads)
        return result


@dataclass(frozen=True, slots=True)
class Cosine:
    """``F_M W F_Nᵀ``; one coefficient is ``cos·cos``, rank 1."""

    name: str
    axis: Axis

    def separable(
        self, rows: NDArray[Any], cols: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]
    ) -> Separable:
        """Itself."""
        del shape
        return Separable(rows.astype(np.int64), cols.astype(np.int64), values, 1.0)

    def analyze(self, weight: NDArray[Any]) -> Float:
        """Orthonormal DCT-II spectrum, float64 [M, N]."""
        a = np.array(weight, dtype=np.float64)
        return self.axis.forward_cpu(self.axis.forward_cpu(a, 0), 1)


COSINE = Cosine("cosine", CosineAxis())

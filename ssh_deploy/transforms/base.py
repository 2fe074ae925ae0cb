"""What a transform is: one orthonormal 1-D kernel per axis, and how its 2-D spectra expand into separable ones.

Every spectrum this package reads is, or expands exactly into, a short sum of *separable* coefficients
``F_M[u, :]ᵀ F_N[v, :]`` of one orthonormal 1-D transform ``F`` (math.md, identities; checked to 1e-14). So one
kernel per axis serves them all::

    ΔW = gain · F_Mᵀ S F_N            S sparse, [M, N], entries (u, v, s)

Both 1-D transforms here are a phase-weighted discrete Fourier transform of a permuted input,

    y[k] = Re( w[k] · Σ_j x[perm[j]] · exp(−2πi·jk/N) )

with ``w = (1+i)/√N`` for Hartley (Re((1+i)e^{−iθ}) = cos θ + sin θ) and, after Makhoul's permutation, ``w[k] =
c_k·exp(−iπk/2N)`` for the DCT-II (Makhoul 1980, eq. 11). From that single line follow the torch path, and the
two-stage factorisation that the ONNX graph uses. ``F`` is orthonormal, so the way back is its transpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Float = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Separable:
    """A spectrum as separable coefficients of one axis kernel.

    ``rows``, ``cols`` int64 [k], ``values`` [k] in the dtype they were given in (signs only are changed, so f16
    values stay exact), ``factor``: what every value is still to be multiplied with. Duplicate places add.
    """

    rows: Index
    cols: Index
    values: NDArray[Any]
    factor: float


@dataclass(frozen=True, slots=True)
class TwoStage:
    """The 1-D transform of length ``n = p·q`` as two (batched) matrix products; ``p = 1`` means one dense product.

    Forward, ``x`` of shape [n, tokens] (rows first permuted by ``permutation`` where it is not None):

        Y = first @ x.reshape(p, q·tokens)                        first  [p, p]
        z[i] = second[i] @ Y.reshape(p/2, 2q, tokens)[i]          second [p/2, 2q, 2q]

    and ``z.reshape(n, tokens)[order[k]]`` is frequency ``k``. Backward is the transposes in reverse order. With
    ``p = 1`` there is only ``second`` of shape [1, n, n] and ``order`` is the identity. float64.

    ``first`` is a Hartley transform of length p, whose outputs k and p−k together hold the complex Fourier
    coefficient of both: real arithmetic all the way, half of what (cos, sin) rows for every k would cost. So its
    rows stand in pairs (0, p/2), (1, p−1), (2, p−2) …, and each block of ``second`` turns one pair.
    """

    n: int
    p: int
    q: int
    first: Float
    second: Float
    order: Index
    permutation: Index | None


class Axis(ABC):
    """An orthonormal 1-D transform ``F`` of any length."""

    name: str

    @abstractmethod
    def weights(self, n: int) -> NDArray[np.complex128]:
        """Phase weights ``w`` of the module's formula, complex128 [n], orthonormal scaling included."""

    def permutation(self, n: int) -> Index | None:
        """Input permutation of the module's formula, int64 [n], or None for the identity."""
        return None

    @abstractmethod
    def period(self, n: int) -> int:
        """P in ``F[k, j] = Re(w[k]·exp(−2πi·jk/P))``, the same kernel without a permutation: n, or 2n for cosines."""

    @abstractmethod
    def forward_cpu(self, a: NDArray[Any], dim: int, *, threads: int = 0) -> NDArray[Any]:
        """``F`` along ``dim`` of a real array (f32 or f64); may overwrite ``a``."""

    @abstractmethod
    def inverse_cpu(
        self, a: NDArray[Any], dim: int, *, threads: int = 0, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """``Fᵀ`` along ``dim`` of a real array (f32 or f64), into ``out`` of the same shape, else in place."""

    def matrix(self, n: int) -> Float:
        """``F`` itself, float64 [n, n]: ``y = F x``."""
        j = np.arange(n)
        angle = (2 * np.pi / n) * (np.outer(j, j) % n)  # the product reduced first: angles stay below 2π
        w = self.weights(n)[:, None]
        matrix = (w * np.exp(-1j * angle)).real
        perm = self.permutation(n)
        if perm is None:
            return np.ascontiguousarray(matrix)
        out = np.empty_like(matrix)
        out[:, perm] = matrix
        return out

    def forward(self, x: Tensor, dim: int = -1) -> Tensor:
        """``F x`` along ``dim``; any torch device, differentiable, computed and returned in f32 or f64."""
        import torch

        n = x.shape[dim]
        x = _real(x)
        perm = self.permutation(n)
        if perm is not None:
            x = x.index_select(dim, torch.from_numpy(perm).to(x.device))
        spectrum = torch.fft.fft(x, dim=dim) * self._phases(x, dim)
        return spectrum.real

    def inverse(self, y: Tensor, dim: int = -1) -> Tensor:
        """``Fᵀ y`` along ``dim``; any torch device, differentiable, computed and returned in f32 or f64."""
        import torch

        n = y.shape[dim]
        y = _real(y)
        x = torch.fft.ifft(y * self._phases(y, dim).conj(), dim=dim, norm="forward").real
        perm = self.permutation(n)
        if perm is None:
            return x
        return x.index_select(dim, torch.from_numpy(np.argsort(perm)).to(y.device))

    def _phases(self, x: Tensor, dim: int) -> Tensor:
        import torch

        shape = [1] * x.ndim
        shape[dim] = x.shape[dim]
        w = torch.from_numpy(self.weights(x.shape[dim])).to(x.device)
        return w.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64).reshape(shape)

    def two_stage(self, n: int, *, p: int | None = None) -> TwoStage:
        """Factors of the length-``n`` transform for the graph; dense where no factorisation is cheaper.

        Multiply-adds per token: ``n(p + 2q)`` against ``n²`` (math.md, the two-stage factorisation). ``p``: that one,
        even and a divisor of ``n``, whatever is cheapest.
        """
        (p, q), order = self.output_order(n, p=p)
        if p == 1:
            return TwoStage(n, 1, n, np.ones((1, 1)), self.matrix(n)[None], order, None)
        k1 = _pairs(p)
        angle = (2 * np.pi / p) * (np.outer(k1.reshape(-1), np.arange(p)) % p)
        first = np.cos(angle) + np.sin(angle)
        k = k1[:, :, None] + p * np.arange(q)  # [p/2, 2, q]
        theta = (2 * np.pi / n) * (k[..., None] * np.arange(q) % n)  # [p/2, 2, q, q]
        turned = self.weights(n)[k][..., None] * np.exp(-1j * theta)
        # Re(w e^{-i(a+θ)}) = cos a·Re + sin a·Im, with 2 cos a = cas a + cas(−a) and 2 sin a = cas a − cas(−a)
        own, other = (turned.real + turned.imag) / 2, (turned.real - turned.imag) / 2
        blocks = np.empty((p // 2, 2, q, 2, q))
        for side in (0, 1):
            blocks[1:, side, :, side], blocks[1:, side, :, 1 - side] = own[1:, side], other[1:, side]
            # 0 and p/2 are their own partners: the sines vanish
            blocks[0, side, :, side], blocks[0, side, :, 1 - side] = turned.real[0, side], 0.0
        return TwoStage(n, p, q, first, blocks.reshape(p // 2, 2 * q, 2 * q), order, self.permutation(n))

    def output_order(self, n: int, *, p: int | None = None) -> tuple[tuple[int, int], Index]:
        """``(p, q)`` and ``order`` of `two_stage` for length ``n``, without computing any factor."""
        p, q = _factor(n) if p is None else (p, n // p)
        if p == 1:
            return (1, n), np.arange(n)
        frequencies = _pairs(p)[:, :, None] + p * np.arange(q)
        order = np.empty(n, dtype=np.int64)
        order[frequencies.reshape(-1)] = np.arange(n)
        return (p, q), order


class Transform(Protocol):
    """A 2-D transform by name: its axis kernel, its scaling and its expansion into separable coefficients."""

    name: str
    axis: Axis

    def separable(
        self, rows: NDArray[Any], cols: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]
    ) -> Separable:
        """Separable coefficients of the spectrum; see `Separable`."""

    def analyze(self, weight: NDArray[Any]) -> Float:
        """Orthonormal 2-D forward transform of ``weight`` [M, N], float64 [M, N]."""


def _real(x: Tensor) -> Tensor:
    import torch

    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def _pairs(p: int) -> Index:
    """The first stage's outputs in pairs (0, p/2), (1, p−1), (2, p−2) …, int64 [p/2, 2]."""
    half = np.arange(1, p // 2)
    return np.stack([np.append(0, half), np.append(p // 2, p - half)], axis=1)


@lru_cache(maxsize=256)
def _factor(n: int) -> tuple[int, int]:
    """``(p, q)``, ``p·q = n``, p even, that cost least; ``(1, n)`` where ``n²`` multiply-adds are fewer than theirs.

    Cost: the ``n(p+2q)`` multiply-adds of a token, and the ``p²+2nq`` numbers of both factors, which a batch of one
    token reads for nothing else. q counts as the next multiple of 16: products that wide fill the processor's vectors.
    """

    def cost(pair: tuple[int, int]) -> tuple[int, int]:
        p, q = pair[0], -(-pair[1] // 16) * 16
        return n * (p + 2 * q) + p * p + 2 * n * q, p

    p, q = min(((p, n // p) for p in range(2, n + 1, 2) if n % p == 0), key=cost, default=(1, n))
    return (p, q) if p + 2 * q < n else (1, n)

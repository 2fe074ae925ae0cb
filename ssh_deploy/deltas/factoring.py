"""A change of a weight as a product of two thin matrices: the best one of a given rank, or an exact one.

``ΔW = L · C · Rᵀ`` with orthonormal columns in L and R has the singular values of C, and its singular vectors are
L and R times C's. So only a small C is decomposed: of a sparse spectrum the rows and columns that hold coefficients
(L and R are then inverse 1-D transforms, and no dense matrix is made), of a product the two triangles of its QRs.
Only of plain numbers C is the matrix itself. By Eckart and Young what is cut off is the least that any product of
that rank leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import FormulaDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.spectral import SpectralDelta

_Float = NDArray[np.float64]
_NOISE = 1e-6  # of float32 numbers that came out of a few sums, against the largest of them
_DOUBLE = 1e-9  # finer than this are float64 numbers alone
_SMALL = 64
#: Coordinates [core side, r] to vectors [side, r] of ΔW.
_Basis = Callable[[_Float], _Float]


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """A product, the energy ‖·‖² that it holds, and that of the change it was made of."""

    delta: LowRankDelta
    energy: float
    total: float


def factor(change: Delta | NDArray[Any], *, rank: int | None = None, energy: float | None = None) -> Factored:
    """``change`` as a product ``B A``, float32, singular values shared evenly between both.

    Args:
        change: [out, in]: a delta that needs no weight, or the numbers themselves.
        rank: at most so many.
        energy: share 0 < e ≤ 1 of the energy; the lowest rank that holds it. With ``rank`` too, the lower wins.
            With neither, the rank of ``change``, up to the rounding of its numbers.
    """
    left, core, right, precision = _split(change)
    u, s, vt = _decomposed(core, precision)
    squares = np.cumsum(np.square(s))
    total = float(squares[-1]) if s.size else 0.0
    # numpy's own rule for the rank of a matrix, in the precision its numbers are of
    r = int((s > s[0] * max(core.shape) * precision).sum()) if total else 1
    if energy is not None:
        r = min(r, int(np.searchsorted(squares, energy * total * (1 - 1e-12))) + 1)
    r = max(1, r if rank is None else min(r, rank))
    root = np.sqrt(s[:r])
    b, a = left(u[:, :r] * root), right(vt[:r].T * root).T
    delta = LowRankDelta(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32))
    return Factored(delta, float(squares[r - 1]), total)


def _decomposed(core: _Float, precision: float) -> tuple[_Float, _Float, _Float]:
    """The SVD of ``core``; of a large matrix of rounded numbers through ``C Cᵀ``, ten times faster.

    That loses what is below 1e-8 of the largest singular value, which is noise where numbers are float32.
    """
    if precision < _DOUBLE or min(core.shape) < _SMALL:
        return np.linalg.svd(core, full_matrices=False)
    wide = core if core.shape[0] <= core.shape[1] else core.T
    squares, u = np.linalg.eigh(wide @ wide.T)
    u, s = u[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0.0))
    vt = (u.T @ wide) / np.maximum(s, _DOUBLE * s[0] if s[0] else 1.0)[:, None]
    return (u, s, vt) if wide is core else (vt.T, s, u.T)


def _split(change: Delta | NDArray[Any]) -> tuple[_Basis, _Float, _Basis, float]:
    """L, C, R of the module's formula, and the relative rounding of C's numbers."""
    if isinstance(change, SpectralDelta):
        return _split_spectrum(change)
    if not isinstance(change, np.ndarray):
        change = exact_product(change) or change
    if isinstance(change, LowRankDelta):
        q_b, r_b = np.linalg.qr(change.b.astype(np.float64))
        q_a, r_a = np.linalg.qr(change.a.T.astype(np.float64))
        return (lambda x: q_b @ x), change.scaling * (r_b @ r_a.T), (lambda x: q_a @ x), float(np.finfo(np.float32).eps)
    if not isinstance(change, np.ndarray):
        import torch

        change = change.dense(dtype=torch.float64).numpy()
    return (lambda x: x), change.astype(np.float64), (lambda x: x), float(np.finfo(np.float32).eps)


def _split_spectrum(delta: SpectralDelta) -> tuple[_Basis, _Float, _Basis, float]:
    spectrum, axis = delta.separable(), delta.axis
    rows, row = np.unique(spectrum.rows, return_inverse=True)
    cols, col = np.unique(spectrum.cols, return_inverse=True)
    core = np.zeros((rows.size, cols.size))
    np.add.at(core, (row, col), spectrum.values.astype(np.float64) * (delta.gain * spectrum.factor))
    if not core.size:
        rows, cols, core = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, 1))

    def synthesis(held: NDArray[np.int64], side: int) -> _Basis:
        def vectors(x: _Float) -> _Float:
            full = np.zeros((side, x.shape[1]))
            full[held] = x
            made: _Float = axis.inverse_cpu(full, 0)
            return made

        return vectors

    return synthesis(rows, delta.shape[0]), core, synthesis(cols, delta.shape[1]), float(np.finfo(np.float64).eps)


def exact_product(delta: Delta) -> LowRankDelta | None:
    """``delta`` as a product of two thin matrices, exactly; None where it is none by its formula, or no thin one.

    Thin is what holds no more numbers than ΔW itself: rank · (out + in) ≤ out · in. Nothing is cut off, ever.
    """
    if isinstance(delta, LowRankDelta):
        return delta
    return delta.product() if isinstance(delta, FormulaDelta) and is_thin(delta, delta.shape) else None


def is_thin(delta: FormulaDelta, shape: tuple[int, int]) -> bool:
    """Whether `exact_product` of ``delta``, of a weight of ``shape``, is one."""
    (out, inn), rank = shape, delta.product_rank
    return rank is not None and rank * (out + inn) <= out * inn


def thin(dense: NDArray[Any], *, trained: int | None = None) -> LowRankDelta:
    """The product that ``dense`` [out, in], float32, is, up to its rounding; cheap where its rank is low.

    An orthonormal basis of its columns is found by random projection, of twice as many columns until nothing is left
    outside (Halko, Martinsson, Tropp 2011); only what is inside is decomposed. ``trained``: see `LowRankDelta`.
    """
    exact, rng = dense.astype(np.float64), np.random.default_rng(0)
    whole, side, columns = float(np.linalg.norm(exact)), min(dense.shape), 32
    if not whole:
        nothing = np.zeros((1, dense.shape[1]), np.float32), np.zeros((dense.shape[0], 1), np.float32)
        return LowRankDelta(*nothing, trained=trained)
    while True:
        basis = np.linalg.qr(exact @ rng.normal(size=(dense.shape[1], min(columns, side))))[0]
        inside = basis.T @ exact
        if columns >= side or np.linalg.norm(exact - basis @ inside) <= _NOISE * whole:
            break
        columns *= 2
    u, s, vt = np.linalg.svd(inside, full_matrices=False)
    r = int((s > _NOISE * s[0]).sum())
    root = np.sqrt(s[:r])
    b, a = basis @ (u[:, :r] * root), vt[:r] * root[:, None]
    return LowRankDelta(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32), trained=trained)

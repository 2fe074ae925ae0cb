"""Any change of a weight on the strongest coefficients of a transform, and how much of its energy they hold.

The transforms are orthonormal, so the energy ``‖ΔW‖²`` is the sum of the squared coefficients (Parseval), and among
all choices of n coefficients the n largest leave the smallest ``‖ΔW − ΔW′‖``. What is known already is not computed:
a spectrum in the same kernel is taken as it stands, and a product ``B A`` is transformed factor by factor,
``F_M (B A) F_Nᵀ = (F_M B)(F_N Aᵀ)ᵀ``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.selection import BANDS, band_of, select_by_bands, select_by_energy
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.transforms import get_transform
from ssh_deploy.transforms.base import Float, Index

#: A change of one weight [out, in]: a delta that needs no weight, or the numbers themselves.
Change = Delta | NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Coefficients of one change in an orthonormal basis.

    Attributes:
        shape: (out, in).
        rows, cols: int64 [n], distinct places.
        coefficients: float64 [n].
        total: energy ‖ΔW‖² of the change.
    """

    shape: tuple[int, int]
    rows: Index
    cols: Index
    coefficients: Float
    total: float

    @property
    def energy(self) -> float:
        """Energy of what is kept."""
        return float(np.square(self.coefficients).sum())


def spectrum_of(change: Change, transform: str) -> Float:
    """The orthonormal spectrum of ``change``, float64 [out, in].

    Args:
        change: no `RelativeDelta` (that has no ΔW of its own: give its numbers).
        transform: ``hartley``, ``hartley-joint`` or ``cosine``.
    """
    known = _known(change, transform)
    if known is not None:
        spectrum = np.zeros(known.shape)
        spectrum[known.rows, known.cols] = known.coefficients
        return spectrum
    kernel = get_transform(transform)
    if isinstance(change, LowRankDelta) and transform == kernel.axis.name:
        b, a = (np.array(part, dtype=np.float64) for part in (change.b, change.a.T))
        product: Float = kernel.axis.forward_cpu(b, 0) @ kernel.axis.forward_cpu(a, 0).T
        product *= change.scaling
        return product
    return kernel.analyze(dense_of(change))


def dense_of(change: Change) -> NDArray[Any]:
    """The numbers of ``change`` [out, in], float64 where they are computed."""
    if isinstance(change, np.ndarray):
        return change
    import torch

    numbers: NDArray[Any] = change.dense(dtype=torch.float64).numpy()
    return numbers


def keep_strongest(
    change: Change,
    transform: str,
    *,
    count: int | None = None,
    energy: float | None = None,
    bands: bool = False,
) -> Kept:
    """The strongest coefficients of ``change``; with neither ``count`` nor ``energy``, all that a spectrum holds.

    Args:
        change: as for `spectrum_of`.
        transform: as for `spectrum_of`.
        count: how many at most; zeros are not kept.
        energy: share 0 < e ≤ 1 of the energy; the fewest coefficients that hold it.
        bands: choose in each of sDCTFT's three bands of distance by itself: a third of ``count``, or the share of
            that band's energy.
    """
    known = _known(change, transform)
    if count is None and energy is None and known is not None:
        return known
    spectrum = spectrum_of(change, transform)
    if count is not None:
        choose = select_by_bands if bands else select_by_energy
        rows, cols = choose(spectrum, min(count, spectrum.size), delta=1.0, seed=0)
    else:
        picked = _holding(np.square(spectrum).reshape(-1), spectrum.shape, 1.0 if energy is None else energy, bands)
        rows, cols = np.divmod(picked, spectrum.shape[1])
    total = float(np.vdot(spectrum, spectrum))
    return _without_zeros(Kept((spectrum.shape[0], spectrum.shape[1]), rows, cols, spectrum[rows, cols], total))


def as_spectra(kept: Mapping[str, Kept], transform: str) -> dict[str, SpectralDelta]:
    """Deltas of one α, values float32 of at most 1 in size: a spectrum of any strength fits float16.

    Args:
        kept: by module.
        transform: as it was kept in; ``cosine`` is scaled as sDCTFT, the others as SSH.
    """
    norm = "ortho" if transform == "cosine" else "backward"
    gains = {m: 1.0 if norm == "ortho" else sqrt(k.shape[0] * k.shape[1]) for m, k in kept.items()}
    alpha = (
        max((float(np.abs(k.coefficients).max(initial=0.0)) * gains[m] for m, k in kept.items()), default=0.0) or 1.0
    )
    return {
        m: SpectralDelta(
            k.shape, transform, k.rows, k.cols, (k.coefficients * (gains[m] / alpha)).astype(np.float32), alpha, norm
        )
        for m, k in kept.items()
    }


def _known(change: Change, transform: str) -> Kept | None:
    """``change``'s own coefficients where it is a spectrum that ``transform`` expresses exactly."""
    if not isinstance(change, SpectralDelta) or transform not in (change.transform, change.axis.name):
        return None
    if transform == change.transform != "fourier":
        rows, cols, values, factor = change.rows, change.cols, change.values, 1.0
    else:
        expanded = change.separable()
        rows, cols, values, factor = expanded.rows, expanded.cols, expanded.values, expanded.factor
    flat = rows.astype(np.int64) * change.shape[1] + cols.astype(np.int64)
    places, place = np.unique(flat, return_inverse=True)  # where an expansion meets itself, values add
    summed = np.zeros(places.size)
    np.add.at(summed, place, values.astype(np.float64) * (change.gain * factor))
    kept = Kept(change.shape, *np.divmod(places, change.shape[1]), summed, float(np.square(summed).sum()))
    return _without_zeros(kept)


def _without_zeros(kept: Kept) -> Kept:
    """Without coefficients of 0, one of which is left where there is nothing else."""
    held = np.flatnonzero(kept.coefficients)
    held = held if held.size else np.arange(min(1, kept.coefficients.size))
    return Kept(kept.shape, kept.rows[held], kept.cols[held], kept.coefficients[held], kept.total)


def _holding(square: Float, shape: tuple[int, ...], share: float, bands: bool) -> Index:
    """Flat places, ascending, of the fewest entries of ``square`` that hold ``share`` of it, or of each band."""
    band = band_of(shape).reshape(-1) if bands else np.zeros(square.size, np.int8)
    picked = []
    for b in range(BANDS if bands else 1):
        inside = np.flatnonzero(band == b)
        order = inside[np.argsort(-square[inside], kind="stable")]
        held = np.cumsum(square[order])
        if held.size:
            picked.append(order[: int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1])
    return np.sort(np.concatenate(picked))

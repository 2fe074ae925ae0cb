"""Which coefficients an adapter trains: the largest of the base's spectrum, and some at random (numpy only).

SSH takes ``⌊δn⌋`` places by energy over the whole spectrum; sDCTFT does so in each of three distance bands
(math.md, "Which coefficients"). The random part cannot be rebuilt from a seed and a rounded base, so adapters
store their places; a seed only makes training repeatable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import AdapterMismatchError

Places = tuple[NDArray[np.int64], NDArray[np.int64]]
Seed = int | Sequence[int]
BANDS = 3


def select_by_energy(spectrum: NDArray[Any], n: int, *, delta: float, seed: Seed) -> Places:
    """The choice of SSH: the ``⌊δn⌋`` places of largest ``|spectrum|``, the rest uniformly from the others.

    Args:
        spectrum: real [M, N], the base weight's own transform.
        n: how many, 0 … M·N.
        delta: share δ chosen by energy, 0 … 1.
        seed: of the random part (an int or a sequence of ints).

    Returns:
        rows, cols: int64 [n], distinct places in row-major order.

    Raises:
        AdapterMismatchError: n or δ out of range.
    """
    _check(spectrum, n, delta)
    picked = _pick(np.abs(spectrum).reshape(-1), n, delta, np.random.default_rng(seed))
    return _places(picked, spectrum.shape[1])


def select_by_bands(spectrum: NDArray[Any], n: int, *, delta: float, seed: Seed) -> Places:
    """The choice of sDCTFT: a third of the places in each band of distance, in each the share δ by energy.

    The distance of (u, v) from the constant term is ``√(u²+v²)``; bands end at a third and two thirds of
    ``d_max = √((M/2)²+(N/2)²)``, and the high band reaches to the far corner (M−1, N−1), beyond ``d_max``. Where n
    is no multiple of three the lower bands take one more; what a small band cannot hold goes to the next that can.

    Arguments, result and errors as `select_by_energy`.
    """
    _check(spectrum, n, delta)
    band = band_of(spectrum.shape).reshape(-1)
    energy = np.abs(spectrum).reshape(-1)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(band == b) for b in range(BANDS)]
    picked = [
        inside[_pick(energy[inside], share, delta, rng)]
        for inside, share in zip(members, _shares(n, [m.size for m in members]), strict=True)
    ]
    return _places(np.concatenate(picked), spectrum.shape[1])


def band_of(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Band 0 (low), 1 or 2 (high) of every place, int64 [M, N]."""
    m, n = shape
    distance = np.hypot(np.arange(m)[:, None], np.arange(n)[None, :])
    edge = np.hypot(m / 2, n / 2)
    return (distance > edge / 3).astype(np.int64) + (distance > 2 * edge / 3)


def by_energy(n: int, delta: float) -> int:
    """``⌊δn⌋``, safe against the float product falling just short of a whole number."""
    return int(np.floor(delta * n + 1e-9))


def _check(spectrum: NDArray[Any], n: int, delta: float) -> None:
    if spectrum.ndim != 2 or not 0 <= n <= spectrum.size:
        raise AdapterMismatchError(
            f"{n} coefficients cannot be chosen from a spectrum of {'×'.join(map(str, spectrum.shape))}.",
            hint=f"Choose 0 to {spectrum.size}.",
        )
    if not 0 <= delta <= 1:
        raise AdapterMismatchError(f"A share of {delta} by energy is none.", hint="Choose 0 to 1.")


def _pick(energy: NDArray[Any], n: int, delta: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """``n`` distinct positions in ``energy``: the largest first, then random ones of the others."""
    top = by_energy(n, delta)
    largest = np.sort(np.argpartition(energy, energy.size - top)[energy.size - top :]) if top else np.empty(0, np.int64)
    drawn = rng.choice(energy.size - top, n - top, replace=False) if n > top else np.empty(0, np.int64)
    # The r-th position that is not among the largest: skip those of them that come before it.
    others = drawn + np.searchsorted(largest - np.arange(top), drawn, side="right")
    return np.concatenate([largest, others]).astype(np.int64)


def _shares(n: int, sizes: list[int]) -> list[int]:
    """``n`` split evenly over bands that hold ``sizes`` places each."""
    shares = [0] * len(sizes)
    left = n
    while left:
        open_bands = [b for b, size in enumerate(sizes) if shares[b] < size]
        for position, b in enumerate(open_bands):
            fair = left // len(open_bands) + (position < left % len(open_bands))
            shares[b] += min(fair, sizes[b] - shares[b])
        left = n - sum(shares)
    return shares


def _places(flat: NDArray[np.int64], width: int) -> Places:
    rows, cols = np.divmod(np.sort(flat), width)
    return rows, cols

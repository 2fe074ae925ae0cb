"""Which base an adapter was trained on: 256 sampled numbers of each adapted weight, compared with a tolerance.

A hash of the weights would tell an f32 copy of a base from its bf16 copy, which users rightly call the same base.
So a fingerprint holds *samples*: for each weight a site names, its canonical name, its shape and the values at 256
fixed positions, rounded to bf16. Two copies match when every pair of samples differs by at most two bf16
roundings: one that made the stored sample, one that may have made the copy. The sha256 over architecture, names,
shapes and samples is its short name (in graphs and reports); equality is decided by samples.

Cost: 512 bytes per site. Not covered: weights that no site names (embeddings, norms).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

SAMPLES = 256
_ROUNDING = 2.0**-8  # bf16 keeps 8 significant bits: rounding to nearest moves a value by at most 2⁻⁸ of itself


def sample_positions(size: int) -> NDArray[np.int64]:
    """The `SAMPLES` fixed flat positions in a weight of ``size`` elements, int64; all of them when it is smaller.

    Evenly spread with an odd stride offset so that neither a whole row nor a whole column is hit.
    """
    if size <= SAMPLES:
        return np.arange(size, dtype=np.int64)
    steps = np.arange(SAMPLES, dtype=np.int64)
    jitter = (steps * 2654435761) % max(1, size // SAMPLES)  # Knuth's multiplicative hash: no stride aligns with a row
    return steps * (size // SAMPLES) + jitter


@dataclass(frozen=True, slots=True, eq=False)
class SiteSample:
    """Samples of one weight: its shape as [out, in] and bf16 values at `sample_positions` (row-major [out, in])."""

    shape: tuple[int, ...]
    values: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Architecture (``model_type`` of the config) and samples by canonical site name (no model prefix, no .weight)."""

    architecture: str
    sites: Mapping[str, SiteSample]

    @cached_property
    def sha256(self) -> str:
        """Hex digest over architecture and, in name order, each site's name, shape and sample bytes."""
        parts = [f"{self.architecture}\n".encode()]
        for name in sorted(self.sites):
            site = self.sites[name]
            parts += [f"{name} {'x'.join(map(str, site.shape))}\n".encode(), site.values.tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def differences(self, other: Fingerprint) -> list[str]:
        """Why ``other`` is not a copy of the same base, over the sites both name; empty when it is."""
        if self.sites and self.sha256 == other.sha256:
            return []  # the very same, as nearly always
        if self.architecture != other.architecture:
            return [f"architecture {self.architecture} against {other.architecture}"]
        shared = sorted(set(self.sites) & set(other.sites))
        if not shared:
            return ["no site in common"]
        return [reason for name in shared if (reason := _differ(name, self.sites[name], other.sites[name]))]

    def restricted(self, names: Iterable[str]) -> Fingerprint:
        """The same with only the sites in ``names``."""
        keep = set(names)
        return Fingerprint(self.architecture, {k: v for k, v in self.sites.items() if k in keep})


def sample(weight: NDArray[Any]) -> SiteSample:
    """Samples of ``weight`` [out, in], any float dtype that numpy (with ml_dtypes) knows."""
    flat = weight.reshape(-1)
    picked = flat[sample_positions(flat.size)].astype(np.float32)
    return SiteSample(tuple(weight.shape), picked.astype(ml_dtypes.bfloat16))


def _differ(name: str, ours: SiteSample, theirs: SiteSample) -> str | None:
    if ours.shape != theirs.shape:
        return f"{name} is {list(theirs.shape)} instead of {list(ours.shape)}"
    if ours.values.tobytes() == theirs.values.tobytes():
        return None  # nothing to measure
    a, b = ours.values.astype(np.float64), theirs.values.astype(np.float64)
    # f16 copies flush values below 6e-8 to zero: an absolute floor beside the relative tolerance
    off = np.abs(a - b) > 2 * _ROUNDING * np.maximum(np.abs(a), np.abs(b)) + 1.2e-7
    return f"{name} differs at {int(off.sum())} of {a.size} sampled places" if off.any() else None

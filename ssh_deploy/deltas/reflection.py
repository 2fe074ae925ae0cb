"""Maps of thin rank on either side of a weight: reflections (ETHER, HRA) and their relaxations (ETHER+)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.formula import RelativeDelta

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class ThinMap:
    """``H = I + Pᵀ Q`` of side n, with ``p`` and ``q`` float64 [rank, n]; a reflection at u is p = −2u/|u|², q = u."""

    p: NDArray[np.float64]
    q: NDArray[np.float64]

    @property
    def side(self) -> int:
        """Its n."""
        return int(self.p.shape[1])

    @property
    def rank(self) -> int:
        """Rows of p and q."""
        return int(self.p.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class ReflectionDelta(RelativeDelta):
    """``W′ = H_outer W H_inner``; the bias stays: ``y′ = H_outer W (H_inner x) + b``.

    Attributes:
        size: (out, in) of the weight.
        vectors: what was trained, by the name its family gives it.
        inner: of side in, or None.
        outer: of side out, or None.
    """

    size: tuple[int, int]
    vectors: Mapping[str, NDArray[Any]]
    inner: ThinMap | None = None
    outer: ThinMap | None = None

    kind: ClassVar[str] = "reflection"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.size

    @property
    def rank(self) -> int:
        """Of the wider of both maps."""
        return max(side.rank for side in (self.inner, self.outer) if side is not None)

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(int(vector.size) for vector in self.vectors.values())

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """See `RelativeDelta.change`; two thin products a side, H is never formed."""
        import torch

        moved = weight
        for side, transposed in ((self.inner, False), (self.outer, True)):
            if side is None:
                continue
            p, q = (torch.from_numpy(np.array(part)).to(weight) for part in (side.p, side.q))
            moved = moved + (p.T @ (q @ moved) if transposed else (moved @ p.T) @ q)
        return moved - weight


def reflected(vectors: NDArray[Any]) -> ThinMap:
    """``Π (I − 2 uᵢuᵢᵀ/|uᵢ|²)``, from left to right.

    Args:
        vectors: float [rank, n], none of length zero.

    Each factor adds one row: ``H (I − 2uuᵀ) = H − 2 (H u) uᵀ``.
    """
    u = vectors.astype(np.float64)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    p = np.zeros_like(u)
    for i, row in enumerate(u):
        p[i] = -2 * (row + (u[:i] @ row) @ p[:i])
    return ThinMap(p, u)

"""Scales on either side of a weight and a shift of its bias: SSF, Propulsion, IA3."""

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
class DiagonalDelta(RelativeDelta):
    """``W′ = diag(outer) W diag(inner)`` and ``b′ = outer·b + shift``: ``y′ = outer·(W (inner·x) + b) + shift``.

    Attributes:
        size: (out, in) of the weight.
        vectors: what was trained, by the name its family gives it.
        outer: float [out], or None for ones.
        shift: float [out], or None for zeros.
        inner: float [in], or None for ones.
    """

    size: tuple[int, int]
    vectors: Mapping[str, NDArray[Any]]
    outer: NDArray[Any] | None = None
    shift: NDArray[Any] | None = None
    inner: NDArray[Any] | None = None

    kind: ClassVar[str] = "diagonal"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.size

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(int(vector.size) for vector in self.vectors.values())

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """See `RelativeDelta.change`."""
        moved = weight
        if self.outer is not None:
            moved = moved * _like(weight, self.outer)[:, None]
        if self.inner is not None:
            moved = moved * _like(weight, self.inner)
        return moved - weight

    def bias_change(self, bias: NDArray[Any] | None) -> NDArray[np.float64] | None:
        """See `RelativeDelta.bias_change`."""
        if self.outer is None and self.shift is None:
            return None
        scaled = np.zeros(self.size[0])
        if self.outer is not None and bias is not None:
            scaled = (self.outer.astype(np.float64) - 1) * bias
        return scaled if self.shift is None else scaled + self.shift


def _like(weight: torch.Tensor, vector: NDArray[Any]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(vector)).to(weight)

"""DoRA's change of one weight: ``W′ = m/‖W + s·BA‖ ⊙ (W + s·BA)``, norms along each row of [out, in]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.lowrank import LowRankDelta

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class DoRADelta(RelativeDelta):
    """A low-rank product and the length [out] that each row of W + product is brought to."""

    product: LowRankDelta
    magnitude: NDArray[Any]

    kind: ClassVar[str] = "dora"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.product.shape

    @property
    def parameters(self) -> int:
        """Trained numbers, magnitudes included."""
        return self.product.parameters + int(self.magnitude.size)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """See `RelativeDelta.change`."""
        import torch

        moved = self.product.add_to(weight.clone())
        length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        wanted = torch.from_numpy(np.array(self.magnitude)).to(weight)[:, None]
        return moved * (wanted / length) - weight

"""A delta given by two thin matrices, ``ΔW = s · B A``: LoRA and what expands into it exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.formula import FormulaDelta, work_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class LowRankDelta(FormulaDelta):
    """``ΔW = scaling · b @ a``.

    Attributes:
        a: float16 or float32 [rank, in], as in the file.
        b: the same float [out, rank].
        scaling: factor on the product (LoRA's α/r or α/√r).
        trained: how many of its numbers were trained, where a file holds fewer than a and b have.
    """

    a: NDArray[Any]
    b: NDArray[Any]
    scaling: float = 1.0
    trained: int | None = None

    kind: ClassVar[str] = "lowrank"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Rows of a, columns of b."""
        return int(self.a.shape[0])

    @property
    def parameters(self) -> int:
        """Trained numbers: those of a and b unless ``trained`` says otherwise."""
        return int(self.a.size + self.b.size) if self.trained is None else self.trained

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius) out of two rank × rank products, float64: ``‖BA‖² = ⟨BᵀB, AAᵀ⟩``."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return float(abs(self.scaling) * max(0.0, float(((b.T @ b) * (a @ a.T)).sum())) ** 0.5)

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """ΔW [out, in] on ``device``."""
        import torch

        zeros = torch.zeros(self.shape, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return self.add_to(zeros).to(dtype or torch.float32)

    def add_to(self, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """``weight + scale·ΔW`` as one fused product: in place for float32 and float64, else rounded once."""
        work = work_dtype(weight)
        a, b = self._factors(weight.device, work)
        full = weight if weight.dtype == work else weight.to(work)
        full.addmm_(b, a, alpha=self.scaling * scale)
        return full if full is weight else full.to(weight.dtype)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x ΔWᵀ = s · (x Aᵀ) Bᵀ`` for x [..., in]; float64 stays, all else float32."""
        work = work_dtype(x)
        a, b = self._factors(x.device, work)
        return (x.to(work) @ a.T) @ b.T * self.scaling

    def _factors(self, device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        a, b = (torch.from_numpy(np.array(part)).to(device, dtype) for part in (self.a, self.b))
        return a, b

"""A delta given by its own numbers at a few places: SHiRA, SPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.formula import FormulaDelta, work_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class SparseDelta(FormulaDelta):
    """``ΔW[rows, cols] = values``, zero elsewhere.

    Attributes:
        size: (out, in) of the weight.
        rows: integers [n], below out.
        cols: integers [n], below in; no place occurs twice.
        values: float16 or float32 [n].
    """

    size: tuple[int, int]
    rows: NDArray[Any]
    cols: NDArray[Any]
    values: NDArray[Any]

    kind: ClassVar[str] = "sparse"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.size

    @property
    def parameters(self) -> int:
        """Values at places."""
        return int(self.values.size)

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), float64."""
        return float(np.linalg.norm(self.values.astype(np.float64)))

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """ΔW [out, in] on ``device``."""
        import torch

        zeros = torch.zeros(self.shape, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return self.add_to(zeros).to(dtype or torch.float32)

    def add_to(self, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """``weight + scale·ΔW``, n numbers touched: in place for float32 and float64, else rounded once."""
        work = work_dtype(weight)
        full = weight if weight.dtype == work else weight.to(work)
        rows, cols, values = self._parts(weight.device, work)
        full.index_put_((rows, cols), values * scale, accumulate=True)
        return full if full is weight else full.to(weight.dtype)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x ΔWᵀ`` for x [..., in]: a product and a sum for each value; float64 stays, all else float32."""
        work = work_dtype(x)
        rows, cols, values = self._parts(x.device, work)
        y = x.new_zeros((*x.shape[:-1], self.shape[0]), dtype=work)
        return y.index_add_(-1, rows, x.to(work)[..., cols] * values)

    def _parts(self, device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        rows, cols = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (self.rows, self.cols))
        return rows, cols, torch.from_numpy(np.array(self.values)).to(device, dtype)

"""A delta made of small rank-1 patches that overlap and add: what local bases such as wavelets are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.formula import FormulaDelta

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1 << 20  # numbers of patches: 24 MB of places and values


@dataclass(frozen=True, slots=True, eq=False)
class PatchDelta(FormulaDelta):
    """``ΔW = scaling · Σ_k s_k · f_k g_kᵀ`` with ``f_k g_kᵀ`` laid down at ``starts``; what falls outside is dropped.

    Attributes:
        shape: (out, in).
        values: s, float16 or float32 [n].
        scaling: on all of them.
        starts: row and column where each patch begins, int64 [n] each; may be negative.
        sides: f and g, float64 [n, L] each.
    """

    shape: tuple[int, int]
    values: NDArray[Any]
    scaling: float
    starts: tuple[NDArray[np.int64], NDArray[np.int64]]
    sides: tuple[NDArray[np.float64], NDArray[np.float64]]

    kind: ClassVar[str] = "wavelet"

    @property
    def parameters(self) -> int:
        """n, the number of coefficients."""
        return int(self.values.size)

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `Delta.dense`; summed on the CPU."""
        import torch

        total = np.zeros(self.shape, np.float64 if dtype == torch.float64 else np.float32)
        length = self.sides[0].shape[1]
        step = max(1, _AT_ONCE // length**2)
        for first in range(0, self.values.size, step):
            some = slice(first, first + step)
            rows, cols = (start[some, None] + np.arange(length) for start in self.starts)
            patches = (self.values[some, None].astype(np.float64) * self.scaling * self.sides[0][some])[:, :, None]
            patches = patches * self.sides[1][some, None, :]
            rows, cols = np.broadcast_arrays(rows[:, :, None], cols[:, None, :])
            inside = (rows >= 0) & (rows < self.shape[0]) & (cols >= 0) & (cols < self.shape[1])
            np.add.at(total, (rows[inside], cols[inside]), patches[inside])
        return torch.from_numpy(total).to(device=device, dtype=dtype)

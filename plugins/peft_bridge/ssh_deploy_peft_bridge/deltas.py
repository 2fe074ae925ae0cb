"""Changes that PEFT's own layer works out: those that are what they are, and those that read the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.formula import FormulaDelta, RelativeDelta
from ssh_deploy_peft_bridge.one_module import OneModule

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(frozen=True, slots=True, eq=False)
class LayerDelta(FormulaDelta):
    """What PEFT's layer adds to any weight: what it makes of zeros."""

    module: OneModule
    parameters: int

    kind: ClassVar[str] = "peft"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.module.shape

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `Delta.dense`; computed in float32, on the CPU."""
        import torch

        return self.module.merged()[0].to(device, dtype or torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange(RelativeDelta):
    """What PEFT's layer makes of the weight it is given; computed in float32, on the CPU."""

    module: OneModule
    parameters: int

    kind: ClassVar[str] = "peft"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.module.shape

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """See `RelativeDelta.change`."""
        import torch

        own = weight.detach().to("cpu", torch.float32)
        return (self.module.merged(own)[0].to(weight.dtype) - own.to(weight.dtype)).to(weight.device)

    def bias_change(self, bias: NDArray[Any] | None) -> NDArray[Any] | None:
        """See `RelativeDelta.bias_change`."""
        return self.bias_change_beside(bias, lambda: np.zeros(self.shape, np.float32)) if self.module.biased else None

    def bias_change_beside(self, bias: NDArray[Any] | None, weight: Callable[[], NDArray[Any]]) -> NDArray[Any] | None:
        """See `RelativeDelta.bias_change_beside`."""
        import torch

        if not self.module.biased:
            return None
        before = np.zeros(self.shape[0], np.float32) if bias is None else bias.astype(np.float32)
        own = torch.from_numpy(np.array(weight(), dtype=np.float32))
        after = self.module.merged(own, torch.from_numpy(before))[1].numpy()
        change: NDArray[Any] = after.astype(np.float64) - before
        return change

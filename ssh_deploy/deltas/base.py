"""The contract of a delta: the change an adapter makes to one weight, in [out, in] order, always."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch


class Delta(Protocol):
    """The change ΔW of one weight W [out, in].

    `kind` says what the graph needs to hold it (``spectral``, ``lowrank``, …): a target that has no place for a
    kind refuses it by that name.
    """

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""

    @property
    def parameters(self) -> int:
        """How many trained numbers it holds."""

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """ΔW [out, in]; float32 unless ``dtype`` says otherwise."""

    def add_to(self, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """``weight + scale·ΔW``: in place for float32 and float64, else a new tensor rounded once from float32."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x ΔWᵀ`` for x [..., in] → [..., out], without forming ΔW; float32 or float64."""

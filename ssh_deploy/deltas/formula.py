"""Deltas that are a short formula: dense first, the rest of the contract follows; and those that read the weight.

Most families train a few numbers out of which ΔW is worked out whole. They inherit `FormulaDelta` and write `dense`.
Some (DoRA, reflections, scales of rows) have no ΔW of their own: theirs is a function of the weight they change. They
inherit `RelativeDelta` and write `change`; a merge gives them W. Scales change the bias with the rows: `bias_change`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from ssh_deploy.errors import AdapterMismatchError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ssh_deploy.deltas.lowrank import LowRankDelta


class FormulaDelta:
    """The methods of a `Delta` by its ``dense``, which subclasses write; they also set kind, shape and parameters."""

    __slots__ = ()

    @property
    def product_rank(self) -> int | None:
        """Rank of `product`; None: it is none by its formula."""
        return None

    def product(self) -> LowRankDelta:
        """The same ΔW as one product of two thin matrices, exactly; asked for where `product_rank` says so."""
        raise NotImplementedError

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `Delta.dense`."""
        raise NotImplementedError

    def add_to(self, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """See `Delta.add_to`."""
        work = work_dtype(weight)
        delta = self.dense(device=weight.device, dtype=work)
        return weight.add_(delta, alpha=scale) if weight.dtype == work else _once(weight, delta, scale)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x ΔWᵀ``; this one does form ΔW."""
        work = work_dtype(x)
        return x.to(work) @ self.dense(device=x.device, dtype=work).T


class RelativeDelta:
    """A change that depends on the weight it changes; subclasses write `change` and set kind, shape and parameters."""

    __slots__ = ()

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        raise NotImplementedError

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW [out, in] of the base's own ``weight`` [out, in], float32 or float64 as that is."""
        raise NotImplementedError

    def bias_change(self, bias: NDArray[Any] | None) -> NDArray[Any] | None:
        """Δb float64 [out] of the base's own ``bias`` [out] (None: it has none); None: it leaves biases alone."""
        return None

    def bias_change_beside(self, bias: NDArray[Any] | None, weight: Callable[[], NDArray[Any]]) -> NDArray[Any] | None:
        """`bias_change` of a ``bias`` beside a weight; ``weight()`` is the base's own [out, in], for those that ask."""
        del weight
        return self.bias_change(bias)

    def add_to(self, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """``weight + scale·ΔW(weight)``: see `Delta.add_to`; ``weight`` is the base's own, nothing merged into it."""
        work = work_dtype(weight)
        delta = self.change(weight.to(work))
        return weight.add_(delta, alpha=scale) if weight.dtype == work else _once(weight, delta, scale)

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> NoReturn:
        """Refused: there is none without W."""
        raise self._alone()

    def apply(self, x: torch.Tensor) -> NoReturn:
        """Refused: there is none without W."""
        raise self._alone()

    def _alone(self) -> AdapterMismatchError:
        return AdapterMismatchError(
            f"{type(self).__name__} has no ΔW of its own: its change depends on the weight it changes.",
            hint="Merge it into its base.",
        )


def work_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32: what sums are made in."""
    import torch

    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _once(weight: torch.Tensor, delta: torch.Tensor, scale: float) -> torch.Tensor:
    """The exact float32 sum, rounded once."""
    return weight.to(delta.dtype).add_(delta, alpha=scale).to(weight.dtype)

"""A change that ends in integers: trained on a quantised weight, merged into a quantised weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.deltas.formula import RelativeDelta

if TYPE_CHECKING:
    import torch

_TOP = 127


class IntegralDelta(RelativeDelta):
    """``W′ = scale ⊙ P`` with integers P; subclasses write `product` and set kind, shape and parameters.

    It carries the base's integers itself, so W′ does not depend on the stored W; `check_base` says whether it is of
    that base. Into floats it merges as any other change, ``ΔW = W′ − W``; into int8 by `integers`.
    """

    __slots__ = ()

    def product(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """P int64 [out, in] and the scale of each row, float64 [out]."""
        raise NotImplementedError

    def check_base(self, weight: NDArray[np.float64]) -> None:
        """Refuse a ``weight`` [out, in] that its integers were not made of.

        Raises:
            AdapterMismatchError: with how far it is.
        """
        raise NotImplementedError

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """See `RelativeDelta.change`."""
        import torch

        own = weight.detach().cpu().double().numpy()
        self.check_base(own)
        numbers, scale = self.product()
        return torch.from_numpy(numbers * scale[:, None] - own).to(weight)

    def integers(self) -> tuple[NDArray[np.int8], NDArray[np.float32], float]:
        """W′ in 8 bits: codes [out, in], the scale of each row [out], and ``‖codes·scale − W′‖²`` (Frobenius).

        Integers all the way: a row whose largest |P| is m gets ``sign(P) · ⌊(127·|P| + m/2) / m⌋`` and m/127 times
        its scale. Rows of |P| ≤ 127 with m = 127 stay as they are.
        """
        numbers, scale = self.product()
        size = np.abs(numbers)
        top = np.maximum(size.max(axis=1, initial=1), 1)[:, None]
        codes = np.sign(numbers) * ((2 * _TOP * size + top) // (2 * top))
        step = (scale * top[:, 0] / _TOP).astype(np.float32)
        lost = codes * step.astype(np.float64)[:, None] - numbers * scale[:, None]
        return codes.astype(np.int8), step, float(np.square(lost).sum())

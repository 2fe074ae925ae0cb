"""What brings a live weight back to its own bits: those in which taking ΔW away again misses them, and nothing more.

``W′ = round(W + ΔW)`` in the weight's dtype loses bits of W only where the sum has a larger exponent than W had; taking
ΔW away again gives W itself everywhere else. So beside the adapter, which is a few kilobytes, an undo needs only the
places that come back wrong, and what to flip there:

    undo = bits(W) xor bits(round(W′ − ΔW))

For SmolLM2-135M in bfloat16 with 750 coefficients in query and value of every layer that is 8 MB beside 326 MB of
model (a third of the weights that change). Where it would take more than the weight itself, and for changes that are a
function of the weight they change, the weight is kept.

It rests on ΔW being the same bits when it is computed again: the same device and the same number of threads. That is
checked by sums of the restored bits over every row and column, before anything is written: exact, or an error.
*Not covered:* a device that was out of memory at one of the two times only, so that another way summed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.transforms.cuda.fused import Addend
from ssh_deploy.transforms.device import add_on_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Flips:
    """``bits`` to flip at the flat ``places`` of a contiguous [out, in] weight; ``sums`` of the bits it must have then.

    ``places`` int32 or int64 [k], ``bits`` integers of the weight's width [k]; ``sums``: int64 [out] and [in].
    """

    places: torch.Tensor
    bits: torch.Tensor
    sums: tuple[torch.Tensor, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes held for it."""
        return sum(t.numel() * t.element_size() for t in (self.places, self.bits, *self.sums))

    def restored(self, back: torch.Tensor) -> torch.Tensor | None:
        """The weight's own bits out of ``back``, round(W′ − ΔW), in place; None when they are not."""
        flat = bits_of(back).view(-1)
        flat[self.places.long()] ^= self.bits
        same = all(bool((a == b).all()) for a, b in zip(_sums(back), self.sums, strict=True))
        return back if same else None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The weight itself [out, in]."""

    weight: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held for it."""
        return self.weight.numel() * self.weight.element_size()


Undo = Flips | Kept


def summed(weights: Sequence[torch.Tensor], deltas: Sequence[Delta], *, scale: float = 1.0) -> list[torch.Tensor]:
    """``round(W + scale·ΔW)`` of each pair as a new contiguous [out, in] tensor; spectra on a GPU all at once.

    Raises:
        torch.OutOfMemoryError: there is no room for the new tensors.
    """
    import torch

    new = [weight.detach().clone(memory_format=torch.contiguous_format) for weight in weights]
    spectral = [i for i, d in enumerate(deltas) if isinstance(d, SpectralDelta) and new[i].device.type != "cpu"]
    addends = [
        Addend(d.axis, d.separable(), d.gain * scale) for i in spectral if isinstance(d := deltas[i], SpectralDelta)
    ]
    add_on_device([new[i] for i in spectral], addends)
    for i in sorted(set(range(len(new))) - set(spectral)):
        new[i] = deltas[i].add_to(new[i], scale=scale)
    return new


def undo_of(weight: torch.Tensor, delta: Delta, back: torch.Tensor) -> Undo:
    """What turns ``back``, round(W′ − ΔW), into ``weight`` [out, in], both contiguous; ``back`` is used up."""
    import torch

    if isinstance(delta, RelativeDelta):
        return Kept(weight.clone())
    wrong = bits_of(back).bitwise_xor_(bits_of(weight)).view(-1)
    places = wrong.nonzero().view(-1)
    width = torch.int32 if wrong.numel() < 2**31 else torch.int64
    if places.numel() * (width.itemsize + weight.element_size()) >= weight.numel() * weight.element_size():
        return Kept(weight.clone())
    return Flips(places.to(width), wrong[places], _sums(weight))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a float tensor as integers of its width; a view."""
    import torch

    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _sums(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the bits over every row and over every column, modulo 2⁶⁴."""
    import torch

    bits = bits_of(tensor)
    return bits.sum(dim=1, dtype=torch.int64), bits.sum(dim=0, dtype=torch.int64)

"""A delta given by a few coefficients of its 2-D spectrum: SSH, sDCTFT and what expands into them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms import get_transform
from ssh_deploy.transforms.base import Axis, Separable

if TYPE_CHECKING:
    import torch

    from ssh_deploy.deltas.base import Delta

NORMS = ("backward", "ortho")
K = TypeVar("K")
L = TypeVar("L")
_PARTS = ("rows", "cols", "values")


@dataclass(frozen=True, slots=True, eq=False)
class _Spectrum:
    """What `SpectralDelta` and `Stack` have in common; the first says what the fields are."""

    shape: tuple[int, int]
    transform: str
    rows: NDArray[Any]
    cols: NDArray[Any]
    values: NDArray[Any]
    alpha: float
    norm: str

    @property
    def gain(self) -> float:
        """Factor on the orthonormal synthesis: ``α/√(MN)`` for ``backward``, ``α`` for ``ortho``."""
        return self.alpha / math.sqrt(self.shape[0] * self.shape[1]) if self.norm == "backward" else self.alpha

    @property
    def axis(self) -> Axis:
        """The 1-D kernel that synthesises it."""
        return get_transform(self.transform).axis

    def separable(self) -> Separable:
        """Its coefficients in the separable basis of `axis`: ``ΔW = gain·factor · F_Mᵀ S F_N``."""
        return get_transform(self.transform).separable(self.rows, self.cols, self.values, self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class SpectralDelta(_Spectrum):
    """``ΔW = α · T⁻¹(S)``, S sparse [out, in] with n entries.

    Attributes:
        shape: (out, in).
        transform: name of the 2-D transform.
        rows, cols: unsigned or signed integers [n], places in S: row (out) and column (in); distinct.
        values: float16 or float32 [n], as in the file.
        alpha: the adapter's scaling α.
        norm: ``backward``: the bare basis times ``1/(MN)`` (SSH); ``ortho``: the orthonormal basis (sDCTFT).
    """

    kind: ClassVar[str] = "spectral"

    @property
    def parameters(self) -> int:
        """n, the number of coefficients."""
        return int(self.values.size)

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """ΔW [out, in] on ``device``."""
        import torch

        if torch.device(device).type == "cpu":
            work = torch.float64 if dtype == torch.float64 else torch.float32
            return self.add_to(torch.zeros(self.shape, dtype=work)).to(dtype or work)
        from ssh_deploy.transforms.device import synthesis_torch

        return synthesis_torch(
            self.shape, self.axis, self.separable(), gain=self.gain, device=device, dtype=dtype or torch.float32
        )

    def add_to(self, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """``weight + scale·ΔW``: in place for float32 and float64, else a new tensor rounded once from float32."""
        import torch

        gain = self.gain * scale
        if weight.device.type == "cpu":
            from ssh_deploy.transforms.cpu import add_synthesis  # compiles: not for serving

            full = weight if weight.dtype in (torch.float32, torch.float64) else weight.to(torch.float32)
            add_synthesis(full.detach().numpy(), self.axis, self.separable(), gain=gain)
            return full if full is weight else full.to(weight.dtype)
        from ssh_deploy.transforms.cuda.fused import Addend
        from ssh_deploy.transforms.device import add_on_device

        full = weight if weight.dtype in (torch.float32, torch.float64) else weight.clone()
        add_on_device([full], [Addend(self.axis, self.separable(), gain)])
        return full

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x ΔWᵀ = gain · F_Mᵀ (S (F_N x))`` for x [..., in]; float64 stays, all else float32."""
        import torch

        spectrum = self.separable()
        z = self.axis.forward(x, -1)
        rows = torch.from_numpy(spectrum.rows).to(x.device)
        cols = torch.from_numpy(spectrum.cols).to(x.device)
        values = torch.from_numpy(spectrum.values.astype(np.float64) * (self.gain * spectrum.factor)).to(z)
        y = z.new_zeros((*z.shape[:-1], self.shape[0])).index_add_(-1, rows, z[..., cols] * values)
        return self.axis.inverse(y, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Stack(_Spectrum, Generic[K]):
    """Spectra of several sites that agree in all but their numbers, as one: an adapter's usual case.

    ``rows``, ``cols``, ``values`` [sites, n] (each [sites, …] of what the deltas hold); ``keys`` of the sites.
    """

    keys: tuple[K, ...]

    def at(self, keys: tuple[L, ...]) -> Stack[L]:
        """The same, its sites called ``keys``."""
        return Stack(self.shape, self.transform, self.rows, self.cols, self.values, self.alpha, self.norm, keys)

    def deltas(self) -> Iterator[tuple[K, SpectralDelta]]:
        """Each site's own, views of this."""
        for key, rows, cols, values in zip(self.keys, self.rows, self.cols, self.values, strict=True):
            yield key, SpectralDelta(self.shape, self.transform, rows, cols, values, self.alpha, self.norm)


class Stacks(Mapping[K, SpectralDelta]):
    """Deltas that were read as stacks: a site's own is made when somebody asks for it, which serving does not."""

    def __init__(self, keys: tuple[K, ...], stacks: Sequence[Stack[K]]) -> None:
        """Of ``keys``, in that order, each in one of ``stacks``."""
        self._keys, self.stacks = keys, stacks

    @cached_property
    def _deltas(self) -> dict[K, SpectralDelta]:
        return {key: delta for stack in self.stacks for key, delta in stack.deltas()}

    def __getitem__(self, key: K) -> SpectralDelta:
        return self._deltas[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def stacked(deltas: Mapping[K, Delta]) -> tuple[Sequence[Stack[K]], Mapping[K, Delta]]:
    """The spectra of ``deltas`` in as few stacks as they allow, and what is no spectrum.

    What is then done to a stack, numpy does to all its sites at once.
    """
    if isinstance(deltas, Stacks):
        return deltas.stacks, {}
    groups: dict[Any, list[K]] = {}
    others: dict[K, Delta] = {}
    for key, d in deltas.items():
        if isinstance(d, SpectralDelta):
            arrays = (d.rows.shape, d.cols.shape, d.values.shape, d.rows.dtype, d.cols.dtype, d.values.dtype)
            groups.setdefault((d.shape, d.transform, d.alpha, d.norm, arrays), []).append(key)
        else:
            others[key] = d
    stacks = []
    for (shape, transform, alpha, norm, _), keys in groups.items():
        rows, cols, values = (np.array([getattr(deltas[key], part) for key in keys]) for part in _PARTS)
        stacks.append(Stack(shape, transform, rows, cols, values, alpha, norm, tuple(keys)))
    return stacks, others

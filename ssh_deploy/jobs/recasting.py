"""Changes of weights recast as another kind: sparse Hartley or cosine spectra, or LoRA; and what energy that keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.projecting import Change, Kept, as_spectra, keep_strongest
from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.orientation import site_weight
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.factoring import factor
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.registry import get_family

#: Coefficients per matrix that the papers use (math.md), where nothing else is asked for.
COEFFICIENTS = {"ssh": 750, "sdctft": 700}
_TRANSFORMS = {"ssh": ("hartley", "hartley-joint"), "sdctft": ("cosine",)}
KINDS = ("ssh", "sdctft", "lora")


@dataclass(frozen=True, slots=True)
class Recast:
    """What changes are turned into, and how much of them at least.

    Attributes:
        kind: one of `KINDS`.
        transform: of the spectra; None: the kind's first.
        coefficients: per matrix, of spectra.
        energy: share of each matrix's energy (for sdctft: of each band's) to keep, with as little as that takes.
        rank: of a LoRA.
        min_energy: refuse to keep less than this share of all matrices' energy together.

    With none of coefficients, energy and rank, a spectrum that the kind expresses exactly is kept whole, a LoRA has
    the rank that the change has, and other changes keep `COEFFICIENTS`.
    """

    kind: str
    transform: str | None = None
    coefficients: int | None = None
    energy: float | None = None
    rank: int | None = None
    min_energy: float = 0.5

    @property
    def unit(self) -> str:
        """What `Share.size` counts."""
        return "rank" if self.kind == "lora" else "coefficients"

    def __post_init__(self) -> None:
        spectral = self.kind in _TRANSFORMS
        for name, fits in (("coefficients", spectral), ("transform", spectral), ("rank", not spectral)):
            if getattr(self, name) is not None and not fits:
                raise AdapterMismatchError(f"--{name} says nothing of --to {self.kind}.", hint="Leave it out.")
        if self.transform is not None and self.transform not in _TRANSFORMS[self.kind]:
            known = ", ".join(_TRANSFORMS[self.kind])
            raise AdapterMismatchError(f"--to {self.kind} with --transform {self.transform}.", hint=f"Known: {known}.")
        if self.coefficients is not None and self.energy is not None:
            raise AdapterMismatchError("Both --coefficients and --energy are given.", hint="Either says how many.")
        for name in ("coefficients", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AdapterMismatchError(f"--{name} {value} keeps nothing.", hint="Give 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterMismatchError(f"--energy {self.energy:g} is no share.", hint="Give more than 0, at most 1.")
        if not 0 <= self.min_energy <= 1:
            raise AdapterMismatchError(f"--min-energy {self.min_energy:g} is no share.", hint="Give 0 to 1.")


@dataclass(frozen=True, slots=True)
class Share:
    """What became of one change: ``size`` coefficients or rank; energies ‖·‖² of what is kept and of the whole."""

    module: str
    shape: tuple[int, int]
    size: int
    kept: float
    total: float

    @property
    def share(self) -> float:
        """Kept over total; 1 where there was nothing to keep."""
        return self.kept / self.total if self.total else 1.0


def recast(
    changes: Iterable[tuple[str, Change]], target: Recast, *, where: str
) -> tuple[dict[str, Delta], tuple[Share, ...]]:
    """``changes`` (module, ΔW), one at a time, as deltas of ``target``'s kind, and what each keeps.

    Args:
        changes: taken one after the other; none is held longer than it takes to recast it.
        target: kind and amount.
        where: names their source, for messages.

    Raises:
        AdapterMismatchError: less than ``target.min_energy`` is kept.
    """
    shares, products, spectra = [], {}, {}
    transform = target.transform or _TRANSFORMS.get(target.kind, ("",))[0]
    for module, change in changes:
        if target.kind == "lora":
            made = factor(change, rank=target.rank, energy=target.energy)
            products[module] = made.delta
            shares.append(Share(module, made.delta.shape, made.delta.rank, made.energy, made.total))
        else:
            kept = spectra[module] = _spectrum(change, transform, target)
            shares.append(Share(module, kept.shape, kept.coefficients.size, kept.energy, kept.total))
    check_energy(shares, target, where=where)
    deltas: Mapping[str, Delta] = products if target.kind == "lora" else as_spectra(spectra, transform)
    return dict(deltas), tuple(shares)


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The base of an adapter, and where its modules are there (by the adapter's own paths)."""

    checkpoint: Checkpoint
    places: Mapping[str, str]

    def weight(self, module: str) -> NDArray[Any]:
        """The weight [out, in] of ``module``, float64."""
        return site_weight(self.checkpoint, self.places[module]).astype(np.float64)

    def has_bias(self, module: str) -> bool:
        """Whether ``module`` has one."""
        return f"{self.places[module]}.bias" in self.checkpoint.places


def recast_adapter(adapter: Adapter, target: Recast, *, base: Base | None = None) -> tuple[Adapter, tuple[Share, ...]]:
    """``adapter`` as another kind, and what each of its matrices keeps; heads and descriptions come along.

    Args:
        adapter: of any family.
        target: kind and amount.
        base: for changes that depend on the weight; None: it is not at hand.

    Raises:
        AdapterMismatchError: too little is kept, a change depends on a weight that is not at hand, or changes a bias.
    """
    get_family(target.kind)  # said before the work where its plugin is missing

    def changes() -> Iterator[tuple[str, Change]]:
        for module, delta in adapter.deltas.items():
            yield module, _alone(f"{adapter.source}: {module}", module, delta, base)

    deltas, shares = recast(changes(), target, where=str(adapter.source))
    return replace(adapter, family=target.kind, deltas=deltas, settings=settings_of(target, shares)), shares


def _alone(where: str, module: str, delta: Delta, base: Base | None) -> Change:
    """``delta``, or the numbers of one that depends on its weight."""
    if not isinstance(delta, RelativeDelta):
        return delta
    if base is None:
        raise AdapterMismatchError(
            f"{where}: its change depends on the weight it changes ({delta.kind}).",
            hint="Give the base (--base BASE).",
        )
    shift = delta.bias_change(None)
    if shift is not None and (base.has_bias(module) or np.any(shift)):
        raise AdapterMismatchError(
            f"{where}: it changes the bias too ({delta.kind}), and spectra and LoRA change weights alone.",
            hint="Merge it: `ssh-deploy merge` takes biases along.",
        )
    import torch

    numbers: NDArray[Any] = delta.change(torch.from_numpy(base.weight(module))).numpy()
    return numbers


def check_energy(shares: Iterable[Share], target: Recast, *, where: str) -> None:
    """Refuse to keep less than ``target.min_energy``.

    Raises:
        AdapterMismatchError: with what is kept.
    """
    kept = energy_kept(shares)
    if kept < target.min_energy:
        floored = floor(kept * 1000) / 1000
        raise AdapterMismatchError(
            f"{where}: {target.kind} would keep {kept:.1%} of ΔW's energy, and {target.min_energy:.0%} must be kept.",
            hint=f"--energy {target.min_energy:g} takes as much as that needs; --min-energy {floored:.3f} takes this.",
        )


def energy_kept(shares: Iterable[Share]) -> float:
    """Share of all matrices' energy together that is kept."""
    every = list(shares)
    total = sum(s.total for s in every)
    return sum(s.kept for s in every) / total if total else 1.0


def table(shares: Iterable[Share], unit: str) -> list[str]:
    """A line for each matrix: how many ``unit`` (coefficients, rank) of it there are, and the energy kept."""
    rows = list(shares)
    width = max((len(s.module) for s in rows), default=0)
    head = f"{'module':{width}}  {unit:>12}  energy kept"
    return [head, *(f"{s.module:{width}}  {s.size:>12,}  {s.share:>11.2%}" for s in rows)]


def settings_of(target: Recast, shares: Iterable[Share]) -> dict[str, Any]:
    """What an adapter's settings say of it: n or r of its largest, and that no place was drawn at random."""
    size = max((s.size for s in shares), default=0)
    return {"r": size} if target.kind == "lora" else {"n": size, "delta_ratio": 1.0}


def _spectrum(change: Change, transform: str, target: Recast) -> Kept:
    count = target.coefficients
    exact = isinstance(change, SpectralDelta) and transform in (change.transform, change.axis.name)
    if count is None and target.energy is None and not exact:
        count = COEFFICIENTS[target.kind]
    return keep_strongest(change, transform, count=count, energy=target.energy, bands=target.kind == "sdctft")

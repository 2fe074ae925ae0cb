"""The families that are installed: where each comes from and what can be done with its adapters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ssh_deploy import registry
from ssh_deploy.errors import RegistryError

_HEADS = ("family", "from", "PEFT type", "merge", "slots", "trained by")


@dataclass(frozen=True, slots=True)
class FamilyView:
    """One family.

    Attributes:
        name: as files write it.
        packages: distributions that claim the name, with version; more than one is an error.
        peft_type: of the PEFT folders it reads; None when it cannot be loaded.
        merge: whether its adapters can be merged into a checkpoint.
        slots: kinds of slots of an exported graph that its deltas fill; empty: it is merged only.
        train: ``module:class`` of the PEFT config that trains it, None where nothing installed says so.
        error: why it cannot be used, or None.
    """

    name: str
    packages: tuple[str, ...]
    peft_type: str | None = None
    merge: bool = False
    slots: tuple[str, ...] = ()
    train: str | None = None
    error: str | None = None

    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        came = " and ".join(self.packages)
        if self.error is not None:
            return self.name, came, "broken"
        merge = "yes" if self.merge else "no"
        return self.name, came, self.peft_type or "–", merge, ", ".join(self.slots) or "–", self.train or "–"


@dataclass(frozen=True, slots=True)
class Listing:
    """All families by name."""

    families: tuple[FamilyView, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"families": [asdict(family) for family in self.families]}

    def lines(self) -> list[str]:
        """For people: a table, then what is wrong with the broken ones."""
        rows = [_HEADS, *(family.cells() for family in self.families)]
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(_HEADS))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows]
        return table + [f"{family.name}: {family.error}" for family in self.families if family.error is not None]


def list_families() -> Listing:
    """Every installed family; each is loaded, and one that fails is listed with its error."""
    return Listing(tuple(_view(name, claims) for name, claims in sorted(registry.families().items())))


def _view(name: str, claims: list[registry.Claim]) -> FamilyView:
    packages = tuple(_with_version(claim.package) for claim in claims)
    try:
        family = registry.get_family(name)
        return FamilyView(name, packages, family.peft_type, merge=True, slots=tuple(family.slots), train=_train(name))
    except RegistryError as error:
        return FamilyView(name, packages, error=str(error))
    except AttributeError as error:  # a plugin made for another release
        return FamilyView(name, packages, error=f"{type(error).__name__}: {error}")


def _train(name: str) -> str | None:
    """What is said to train it: listed and not imported, for it is PEFT and torch."""
    found = registry.claims(registry.TRAINING_GROUP).get(name, [])
    return " or ".join(claim.target for claim in found) or None


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package

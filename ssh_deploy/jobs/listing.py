"""The families that are installed: where each comes from and what can be done with its adapters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ssh_deploy import registry
from ssh_deploy.adapters.without_delta import REASONS
from ssh_deploy.errors import DependencyError, RegistryError

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


@dataclass(frozen=True, slots=True)
class PeftTypeView:
    """One type of PEFT: the family that reads it and what it comes to, or why there is none.

    Attributes:
        peft_type: as configs write it.
        family: name; None where no family reads it.
        package: distribution the family comes from.
        slots: kinds of slots that it fills beside being merged.
        reason: why no family reads it, or None.
    """

    peft_type: str
    family: str | None = None
    package: str | None = None
    slots: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PeftTypes:
    """Every type that the installed PEFT knows, by name, and ``version`` of PEFT."""

    version: str
    types: tuple[PeftTypeView, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A Markdown table, to read and to paste."""
        covered = sum(one.family is not None for one in self.types)
        rows = [
            f"| {one.peft_type} | ✓ | {', '.join(('merge', *one.slots))} | {one.package} |"
            if one.family is not None
            else f"| {one.peft_type} | – | {one.reason} | |"
            for one in self.types
        ]
        head = ["| PEFT type | | deployed by, or why not | from |", "|---|---|---|---|"]
        return [*head, *rows, "", f"{covered} of the {len(rows)} types of PEFT {self.version}."]


def list_peft_types() -> PeftTypes:
    """Every type of the installed PEFT: the family that reads it, or the reason that none can.

    Types that others registered with PEFT at run time (SSH, SDCTFT) are families of their own, and not PEFT's.

    Raises:
        DependencyError: PEFT is not installed.
    """
    try:
        from peft.utils.peft_types import PeftType
    except ImportError as error:
        raise DependencyError(
            f"PEFT is not installed ({error}).", hint="`pip install peft` to list its types."
        ) from error
    installed = {family.peft_type: family for family in list_families().families if family.error is None}
    own = {name.upper() for name in ("ssh", "sdctft")}
    views = [_type_view(kind.value, installed.get(kind.value)) for kind in PeftType if kind.value not in own]
    return PeftTypes(version("peft"), tuple(sorted(views, key=lambda view: view.peft_type)))


def _type_view(name: str, family: FamilyView | None) -> PeftTypeView:
    if family is not None:
        return PeftTypeView(name, family.name, family.packages[0].split()[0], family.slots)
    missing = "no installed family reads it; is a plugin missing?"
    return PeftTypeView(name, reason=REASONS.get(name, missing))


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

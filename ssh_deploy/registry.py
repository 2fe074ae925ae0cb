"""One lazy door to families and transforms: built-ins in a literal table, others by entry point.

Nothing is imported until it is asked for by name. Two claims on one name are refused when that name is asked
for, never settled by load order; a plugin that fails to import is reported with its package and the reason.
Entry points are install metadata, so built-ins stand in a literal table and go through the same loader.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ssh_deploy.errors import RegistryError, near_misses

FAMILY_GROUP = "ssh_deploy.families"
#: PEFT configs that train adapters of a family, by its name
TRAINING_GROUP = "ssh_deploy.training"

_BUILT_IN: dict[str, dict[str, str]] = {
    FAMILY_GROUP: {
        "ssh": "ssh_deploy.adapters.ssh:SSH",
        "sdctft": "ssh_deploy.adapters.ssh:SDCTFT",
    },
    "ssh_deploy.transforms": {
        "hartley": "ssh_deploy.transforms.hartley:SEPARABLE",
        "hartley-joint": "ssh_deploy.transforms.hartley:JOINT",
        "cosine": "ssh_deploy.transforms.cosine:COSINE",
        "fourier": "ssh_deploy.transforms.fourier:FOURIER",
    },
}


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim on a name: ``target`` is ``module:attribute``, ``package`` the distribution it comes from."""

    name: str
    target: str
    package: str


@cache
def _points(read: Callable[..., Iterable[EntryPoint]], group: str) -> tuple[Claim, ...]:
    """Claims of installed packages: read once, since it takes 9 ms and 0.2 ms for each package's name.

    An adapter of 12 sites asks a hundred times.
    """
    return tuple(
        Claim(point.name, point.value, point.dist.name if point.dist is not None else "unknown package")
        for point in read(group=group)
    )


def claims(group: str) -> dict[str, list[Claim]]:
    """All claims in a group, by name; nothing is imported."""
    found: dict[str, list[Claim]] = {}
    for name, target in _BUILT_IN.get(group, {}).items():
        found.setdefault(name, []).append(Claim(name, target, "ssh-deploy"))
    for claim in _points(entry_points, group):
        if claim not in found.setdefault(claim.name, []):
            found[claim.name].append(claim)
    return found


def load(group: str, name: str) -> Any:
    """Import and return the object that goes by ``name`` in ``group``.

    Raises:
        RegistryError: unknown name (what is installed is listed), two claims on it, or a plugin that fails.
    """
    known = claims(group)
    kind = group.rsplit(".", 1)[-1]
    if name not in known:
        raise RegistryError(
            f"{name!r} is not among the installed {kind}: {', '.join(sorted(known)) or 'none'}.",
            hint=f"{near_misses(name, known)} A plugin may be missing: families come with `pip install ssh-deploy-…`.",
        )
    if len(known[name]) > 1:
        owners = ", ".join(f"{c.package} ({c.target})" for c in known[name])
        raise RegistryError(f"{name!r} is claimed by {owners}.", hint="Uninstall all but one of them.")
    claim = known[name][0]
    module, _, attribute = claim.target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise RegistryError(
            f"{name!r} of package {claim.package} ({claim.target}) failed to load: {type(error).__name__}: {error}",
            hint=f"Reinstall or uninstall {claim.package}.",
        ) from error


def get_family(name: str) -> Any:
    """The family that goes by ``name`` (`ssh_deploy.adapters.base.Family`), loaded now."""
    return load(FAMILY_GROUP, name)


def families() -> dict[str, list[Claim]]:
    """Claims on family names; nothing is imported."""
    return claims(FAMILY_GROUP)

"""The error tree: every failure says what happened, which file or name, and what to do now.

    DeployError
     ├─ AdapterFileError       an adapter file that breaks the format (truncated, flipped, out of its limits)
     ├─ AdapterMismatchError   a good adapter that does not fit this base, graph or set of slots
     ├─ UnknownNameError       a name that nothing goes by (adapter, site, task)
     ├─ CheckpointError        a base that cannot be read (missing shard, escaping path, quantised)
     ├─ FingerprintError       an adapter made for another base
     ├─ GraphError             a model that cannot be traced, or a graph a pass refuses
     │   └─ SlotError          a site that cannot take a slot
     ├─ DeploymentError        an exported folder that is damaged, or asked for what it cannot do
     ├─ VerificationError      numbers that do not agree
     ├─ OutputError            an output that exists or cannot be written
     ├─ RegistryError          a family or transform that is not installed, is claimed twice, or is broken
     └─ DependencyError        a package that this step needs and that is not installed

None of them inherits `KeyError` (its `str` adds quotes) or is raised for a bug: a traceback that is not one of
these is a defect of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeployError(Exception):
    """Root of the tree. ``str(error)`` is the whole message: what and which, then the hint on what to do."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what = what
        self.hint = hint
        super().__init__(f"{what}\n  {hint}" if hint else what)


class AdapterFileError(DeployError):
    """An adapter file breaks its format or its declared limits."""


class AdapterMismatchError(DeployError):
    """A well-formed adapter does not fit the base, the graph or the slots it is asked into."""


class UnknownNameError(DeployError):
    """A name that nothing goes by."""


class CheckpointError(DeployError):
    """A base checkpoint cannot be read."""


class FingerprintError(DeployError):
    """An adapter was made for another base."""


class GraphError(DeployError):
    """A model cannot be traced or a graph cannot be edited."""


class SlotError(GraphError):
    """A site cannot take a slot."""


class DeploymentError(DeployError):
    """An exported folder is damaged or is asked for what it cannot do."""


class VerificationError(DeployError):
    """Numbers that should agree do not."""


class OutputError(DeployError):
    """An output exists already or cannot be written."""


class RegistryError(DeployError):
    """A family or transform is not installed, is claimed twice, or fails to load."""


class DependencyError(DeployError):
    """A package that this step needs is not installed."""


def near_misses(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Sentence that lists the names nearest to ``name`` among ``known``, or all of them when they are few.

    Args:
        name: what was asked for.
        known: what there is.
        limit: most names to list.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if near:
        return f"Did you mean {', '.join(near)}?"
    if not names:
        return "There is none."
    shown = ", ".join(names[: 2 * limit])
    return f"There is {shown}{', …' if len(names) > 2 * limit else ''}."

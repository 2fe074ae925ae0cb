"""A module trained whole and put in the place of the base's: classifier heads, PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class ReplacedModule:
    """Tensors by their name within the module, e.g. ``weight`` [labels, in] and ``bias`` [labels]; f16 or f32.

    Not a `Delta`: it does not add to the base's weight, it takes its place, and the base may have none.
    """

    tensors: Mapping[str, NDArray[Any]]

    kind: ClassVar[str] = "replaced"

    @property
    def parameters(self) -> int:
        """How many trained numbers it holds."""
        return sum(int(t.size) for t in self.tensors.values())

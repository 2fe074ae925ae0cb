"""The family `outer`, a template: ``ΔW = scaling · u vᵀ``, one trained number for each row and each column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_finite
from ssh_deploy.adapters.peft_folder import adapter_of, by_module, number
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterFileError


@dataclass(frozen=True, slots=True)
class Outer:
    """Tensors ``<module>.outer_u`` [out] and ``<module>.outer_v`` [in]; the config's ``scaling``."""

    name: str = "outer"
    peft_type: str = "OUTER"
    slots: tuple[str, ...] = ("lowrank",)

    def read(self, files: AdapterFiles) -> Adapter:
        """Every module's two vectors as a product of rank one; what is not theirs goes to `adapter_of`."""
        modules, rest = by_module(files, ("outer_u", "outer_v"))
        deltas = {module: self._delta(files, module, parts) for module, parts in modules.items()}
        return adapter_of(files, self.name, deltas, rest, {"scaling": number(files, "scaling")})

    def _delta(self, files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]]) -> LowRankDelta:
        u, v = parts.get("outer_u"), parts.get("outer_v")
        if u is None or v is None or u.ndim != 1 or v.ndim != 1:
            raise AdapterFileError(
                f"{files.folder}: {module} needs vectors outer_u and outer_v.", hint="Save it again."
            )
        for vector in (u, v):
            check_finite(f"{files.folder}: {module}", vector)
        return LowRankDelta(np.float32(v)[None], np.float32(u)[:, None], number(files, "scaling"))

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """The fields that `read` needs; the vectors tell the shapes."""
        return {"scaling": adapter.settings["scaling"], "module_shapes": None}

    def tensors(self, module: str, delta: LowRankDelta) -> dict[str, NDArray[Any]]:
        """The two vectors, float32."""
        return {f"{module}.outer_u": np.float32(delta.b[:, 0]), f"{module}.outer_v": np.float32(delta.a[0])}


OUTER = Outer()

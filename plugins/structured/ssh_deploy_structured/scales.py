"""SSF: ``y′ = γ·y + β`` for y = W x + b; and Propulsion: ``y′ = zᵏ·y``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_structured.folders import expect, modules_of, written

_SCALE, _SHIFT, _PROPULSION = "ssf_scale", "ssf_shift", "propulsion"
#: Of the released layer, where the config says nothing.
_DEGREE = 15


@dataclass(frozen=True, slots=True)
class ScaleShift:
    """Tensors ``<module>.ssf_scale`` γ and ``.ssf_shift`` β, both [out]: ``W′ = diag(γ) W``, ``b′ = γb + β``."""

    name: str = "ssf"
    peft_type: str = "SSF"
    slots: tuple[str, ...] = ("diagonal",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        modules, rest = modules_of(files, (_SCALE, _SHIFT), needed=(_SCALE, _SHIFT))
        deltas = {}
        for module, (where, shape, tensors) in modules.items():
            for name, tensor in tensors.items():
                expect(where, name, tensor, (shape[0],))
            deltas[module] = DiagonalDelta(shape, tensors, outer=tensors[_SCALE], shift=tensors[_SHIFT])
        return adapter_of(files, self.name, deltas, rest, {})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        return {}

    def tensors(self, module: str, delta: DiagonalDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return written(module, delta.vectors)


@dataclass(frozen=True, slots=True)
class Propulsion:
    """Tensor ``<module>.propulsion`` z [out], ``degree`` k of the config: ``W′ = diag(zᵏ) W``, ``b′ = zᵏb``."""

    name: str = "propulsion"
    peft_type: str = "PROPULSION"
    slots: tuple[str, ...] = ("diagonal",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        degree = files.config.get("degree", _DEGREE)
        if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= 1000:
            raise AdapterFileError(
                f"{files.folder}/{CONFIG}: degree is {degree!r:.40}, not a power from 1 to 1000.",
                hint=f"Write the degree it was trained with; without one it is {_DEGREE}.",
            )
        modules, rest = modules_of(files, (_PROPULSION,), needed=(_PROPULSION,))
        deltas = {}
        for module, (where, shape, tensors) in modules.items():
            expect(where, _PROPULSION, tensors[_PROPULSION], (shape[0],))
            with np.errstate(over="ignore", under="ignore"):
                scale = tensors[_PROPULSION].astype(np.float64) ** degree
            if not (np.abs(scale) <= np.finfo(np.float32).max).all():
                raise AdapterFileError(
                    f"{where}: {_PROPULSION} to the power of {degree} goes beyond float32.",
                    hint="Is it the degree it was trained with?",
                )
            deltas[module] = DiagonalDelta(shape, tensors, outer=scale)
        return adapter_of(files, self.name, deltas, rest, {"degree": degree})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        return {"degree": adapter.settings["degree"]}

    def tensors(self, module: str, delta: DiagonalDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return written(module, delta.vectors)


SSF, PROPULSION = ScaleShift(), Propulsion()

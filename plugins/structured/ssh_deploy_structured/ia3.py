"""IA3: a layer's answers scaled (``y′ = l·(W x + b)``), or a feed-forward layer's inputs (``y′ = W (l·x) + b``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_structured.folders import expect, modules_of, written

_L = "ia3_l"


@dataclass(frozen=True, slots=True)
class IA3Family:
    """Tensor ``<module>.ia3_l``: l as [out, 1], or as [1, in] for the config's ``feedforward_modules``."""

    name: str = "ia3"
    peft_type: str = "IA3"
    slots: tuple[str, ...] = ("diagonal",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        modules, rest = modules_of(files, (_L,), needed=(_L,))
        deltas = {}
        for module, (where, shape, tensors) in modules.items():
            if self._scales_inputs(files, where, module, tensors[_L]):
                expect(where, _L, tensors[_L], (1, shape[1]))
                deltas[module] = DiagonalDelta(shape, tensors, inner=tensors[_L].reshape(-1))
            else:
                expect(where, _L, tensors[_L], (shape[0], 1))
                deltas[module] = DiagonalDelta(shape, tensors, outer=tensors[_L].reshape(-1))
        return adapter_of(files, self.name, deltas, rest, {})

    @staticmethod
    def _scales_inputs(files: AdapterFiles, where: str, module: str, vector: NDArray[Any]) -> bool:
        """By the tensor's own shape, held against the config; a pattern (text) is PEFT's to match, not run here."""
        by_shape = vector.shape[:1] == (1,) and vector.size > 1
        names = files.config.get("feedforward_modules")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            if vector.size == 1 or not isinstance(names, str):
                raise AdapterFileError(
                    f"{files.folder}/{CONFIG}: feedforward_modules is {names!r:.60}; {_L} of {module} is "
                    f"{list(vector.shape)}.",
                    hint="Write the list of modules whose inputs are scaled; an empty one where none is.",
                )
            return by_shape
        listed = any(module.endswith(name) for name in names)  # PEFT's own rule
        if vector.size > 1 and listed != by_shape:
            raise AdapterFileError(
                f"{where}: {_L} is {list(vector.shape)}, and feedforward_modules {names!r:.60} "
                f"{'names' if listed else 'does not name'} it.",
                hint="Scales of inputs are [1, in], of answers [out, 1]: its config and its weights do not belong "
                "together.",
            )
        return listed

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        inputs = [m for m, d in adapter.deltas.items() if isinstance(d, DiagonalDelta) and d.inner is not None]
        return {"feedforward_modules": sorted(inputs)}

    def tensors(self, module: str, delta: DiagonalDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return written(module, delta.vectors)


IA3 = IA3Family()

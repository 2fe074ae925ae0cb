"""LoRTA: one CP tensor for all matrices, over outputs, inputs, heads, layers and matrices; it expands exactly to LoRA.

``ΔW_head = s · B diag(c_head ∘ c_layer ∘ c_matrix) Aᵀ`` [d, in], and the blocks of all heads stand above one another in
ΔW [out, in]. So row (h, i) of ΔW is ``Σ_k c_head[h, k] B[i, k] · (s c_layer c_matrix)[k] · A[:, k]``: a product of a
matrix [heads·d, r] and Aᵀ, whatever the layer. Of matrices that gather heads (an attention's output) the blocks stand
side by side instead, along the inputs.

The formula is inferred from the idea, and we know of no published files: the names of tensors are ours (FORMAT.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of, number
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy_lowrank.folders import all_of, floats

_A, _B = "lorta_in", "lorta_out"
_HEADS, _LAYERS, _MATRICES = "lorta_heads", "lorta_layers", "lorta_matrices"
_PARTS = (_A, _B, _HEADS, _LAYERS, _MATRICES)


@dataclass(frozen=True, slots=True)
class LoRTA:
    """Tensors ``lorta_in`` [in, r], ``_out`` [d, r], ``_heads`` [heads, r], ``_layers``, ``_matrices``, one of each.

    The config says which module is which: ``modules`` {path: [layer, matrix]}; ``gathering`` [matrix, …] names those
    whose heads lie along the inputs.
    """

    name: str = "lorta"
    peft_type: str = "LORTA"
    slots: tuple[str, ...] = ("lowrank",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        rest = dict(files.tensors)
        parts = {name: rest.pop(name) for name in _PARTS if name in rest}
        where = str(files.folder)
        if not parts:
            return adapter_of(files, self.name, {}, rest, {})  # which says what there is instead
        all_of(where, parts, _PARTS)
        found = {name: part.astype(np.float64) for name, part in floats(where, parts).items()}
        rank, scaling = number(files, "r"), number(files, "scaling")
        widths = {name: part.shape[1] for name, part in found.items()}
        if set(widths.values()) != {rank}:
            raise AdapterFileError(
                f"{where}: r is {rank:g} in {CONFIG}, its factors have {widths} columns.",
                hint="Its config and its weights do not belong together.",
            )
        rows, gathering = found[_MATRICES].shape[0], files.config.get("gathering") or []
        modules = _modules(files, found[_LAYERS].shape[0], rows)
        if not isinstance(gathering, list) or any(type(m) is not int or not 0 <= m < rows for m in gathering):
            raise AdapterFileError(
                f"{where}/{CONFIG}: gathering is {gathering!r:.80}, not matrices of 0…{rows - 1}.",
                hint="It lists the matrices whose heads lie along the inputs.",
            )
        heads = (found[_HEADS][:, None] * found[_B]).reshape(-1, int(rank))  # [heads·d, r], head by head
        numbers = sum(part.size for part in found.values())
        deltas = {}
        for i, (module, (layer, matrix)) in enumerate(modules.items()):
            middle = found[_LAYERS][layer] * found[_MATRICES][matrix]
            b, a = (found[_A] * middle, heads.T) if matrix in gathering else (heads * middle, found[_A].T)
            own = numbers * (i + 1) // len(modules) - numbers * i // len(modules)  # a fair share of what all have
            factors = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
            deltas[module] = LowRankDelta(*factors, scaling, trained=own)
        return adapter_of(files, self.name, deltas, rest, {"r": int(rank)})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """Refused: what was read is the products, not the tensor that they share."""
        raise AdapterMismatchError(
            f"{adapter.source}: a LoRTA is read, merged and lent to slots, not written.",
            hint="Copy its folder, or write it as the LoRA that it is (--to lora).",
        )

    def tensors(self, module: str, delta: LowRankDelta) -> dict[str, NDArray[Any]]:
        """Both factors as they stand in ΔW (for comparisons; `config` refuses to write them)."""
        return {f"{module}.a": delta.a, f"{module}.b": delta.b}


def _modules(files: AdapterFiles, layers: int, matrices: int) -> Mapping[str, tuple[int, int]]:
    """(layer, matrix) by module, as the config says.

    Raises:
        AdapterFileError: missing, or numbers that the factors have no row for.
    """
    given = files.config.get("modules")
    if not isinstance(given, dict) or not given:
        raise AdapterFileError(
            f"{files.folder}/{CONFIG}: modules is {given!r:.80}.",
            hint="It says which module is which: {path: [layer, matrix]}.",
        )
    for module, place in given.items():
        whole = isinstance(place, list) and len(place) == 2 and all(type(i) is int for i in place)
        if not whole or not (0 <= place[0] < layers and 0 <= place[1] < matrices):
            raise AdapterFileError(
                f"{files.folder}/{CONFIG}: {module} is at {place!r:.40}; there are {layers} layers and {matrices} "
                "matrices.",
                hint="Write [layer, matrix], both counted from 0.",
            )
    return {module: (place[0], place[1]) for module, place in given.items()}


LORTA = LoRTA()

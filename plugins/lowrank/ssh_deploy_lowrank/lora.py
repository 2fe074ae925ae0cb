"""LoRA: ``ΔW = α/r · B A`` (α/√r with rsLoRA), and DoRA, which rescales the rows of W + ΔW.

SLoRA trains in two stages and saves what LoRA saves; so does PiSSA once it is converted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import adapter_of, by_module
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_lowrank.dora import DoRADelta
from ssh_deploy_lowrank.folders import all_of, alpha_and_rank, alphas_and_ranks, floats, refuse

_A, _B, _M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_REASONS = {
    "lora_bias": "it changes biases, and deltas change weights.",
    "layer_replication": "its layers are copies that the base does not have.",
    "target_parameters": "its targets are stacks of matrices (experts), which are not covered.",
    "trainable_token_indices": "rows of the embedding are trained, which are not covered.",
    "alora_invocation_tokens": "it is active on some tokens only, which no merged weight and no slot can be.",
    "arrow_config": "it chooses among adapters by token, which no merged weight and no slot can do.",
    "use_qalora": "its input is pooled in groups, which is not covered.",
    "use_bdlora": "its factors are block-diagonal, which is not covered.",
    "monteclora_config": "its factors are random variables, which are not covered.",
    "kasa_config": "it has singular values of its own, which are not covered.",
}


@dataclass(frozen=True, slots=True)
class LoRA:
    """Tensors ``<module>.lora_A.weight`` [r, in], ``.lora_B.weight`` [out, r], DoRA's ``.lora_magnitude_vector``."""

    name: str = "lora"
    peft_type: str = "LORA"
    slots: tuple[str, ...] = ("lowrank",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        refuse(files, _REASONS)
        refuse(files, {"bias": "it changes biases, and deltas change weights."}, harmless=["none"])
        changed = "this start changes the base's weights too, which the file does not hold."
        refuse(files, {"init_lora_weights": changed}, harmless=[True, "gaussian", "eva", "orthogonal"])
        modules, rest = by_module(files, (_A, _B, f"{_M}.weight", _M))
        for name in rest:
            if ".lora_embedding_" in name:
                raise AdapterFileError(
                    f"{files.folder}: {name} adapts an embedding.", hint="Only linear modules take a delta."
                )
        deltas = {module: self._delta(files, module, parts) for module, parts in modules.items()}
        settings = {k: files.config.get(k) for k in ("r", "lora_alpha", "use_rslora", "use_dora")}
        return adapter_of(files, self.name, deltas, rest, {k: v for k, v in settings.items() if v})

    def _delta(self, files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]]) -> LowRankDelta | DoRADelta:
        where = f"{files.folder}: {module}"
        all_of(where, parts, [_A, _B])
        pair = floats(where, {name: parts[name] for name in (_A, _B)})
        a, b = pair[_A], pair[_B]
        alpha, rank = alpha_and_rank(files, module, alpha="lora_alpha")
        if a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterFileError(
                f"{where}: rank {rank} in the config, {_A} is {list(a.shape)}, {_B} {list(b.shape)}.",
                hint="Its config and its weights do not belong together.",
            )
        product = LowRankDelta(a, b, alpha / (sqrt(rank) if files.config.get("use_rslora") else rank))
        magnitudes = [parts[name] for name in (_M, f"{_M}.weight") if name in parts]
        if len(magnitudes) != bool(files.config.get("use_dora")):
            raise AdapterFileError(
                f"{where}: use_dora is {files.config.get('use_dora')!r}, with {len(magnitudes)} magnitude vectors.",
                hint="A DoRA has one for each module, a LoRA none; save the adapter again.",
            )
        if not magnitudes:
            return product
        magnitude = floats(where, {_M: magnitudes[0]}, dims=1)[_M]
        if magnitude.shape[0] != b.shape[0]:
            raise AdapterFileError(
                f"{where}: {magnitude.shape[0]} magnitudes for {b.shape[0]} rows.", hint="The file is damaged."
            )
        return DoRADelta(product, magnitude)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        every = {m: d.product if isinstance(d, DoRADelta) else d for m, d in adapter.deltas.items()}
        products = {m: d for m, d in every.items() if isinstance(d, LowRankDelta)}
        shared = alphas_and_ranks({m: (d.scaling, d.rank) for m, d in products.items()}, alpha="lora_alpha")
        return {**shared, "use_dora": any(isinstance(d, DoRADelta) for d in adapter.deltas.values())}

    def tensors(self, module: str, delta: LowRankDelta | DoRADelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`; float32."""
        product = delta.product if isinstance(delta, DoRADelta) else delta
        found = {f"{module}.{_A}": product.a, f"{module}.{_B}": product.b}
        if isinstance(delta, DoRADelta):
            found[f"{module}.{_M}"] = delta.magnitude
        return {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in found.items()}


LORA = LoRA()

"""PEFT tuners that put an `SSHLinear` in the place of each target module, and route rows to adapters."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ssh_deploy_train.config import SpectralConfig
from ssh_deploy_train.layer import SSHLayer, SSHLinear

BASE_ROW = "__base__"  # PEFT's own name for a row without adapter


class SSHModel(BaseTuner):
    """SSH on a transformers model; made by `peft.get_peft_model`."""

    prefix = "ssh_"
    tuner_layer_cls = SSHLayer
    target_module_mapping = cast("dict[str, list[str]]", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        prepared: SpectralConfig = super()._prepare_adapter_config(peft_config, model_config)  # type: ignore[assignment]
        prepared.labels = prepared.labels or _label_names(model_config)
        return prepared

    def _create_and_replace(
        self,
        peft_config: Any,  # a SpectralConfig
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *_: Any,
        **__: Any,
    ) -> None:
        # Every module draws its own random places; the path, not the order of visiting, decides which.
        seed = (peft_config.seed, zlib.crc32(current_key.encode()))
        layer: SSHLayer
        if isinstance(target, SSHLayer):
            layer = target
            layer.update_layer(adapter_name, peft_config, key=current_key, seed=seed)
        else:
            if isinstance(target, BaseTunerLayer):
                raise TypeError(
                    f"{current_key} already carries a {type(target).__name__}; PEFT methods do not nest here."
                )
            layer = made = SSHLinear(target, adapter_name, peft_config, key=current_key, seed=seed)
            if adapter_name not in self.active_adapters:  # an adapter that is only added does not train
                made.requires_grad_(False)
            self._replace_module(parent, target_name, made, target)
        peft_config.module_shapes = {
            **(peft_config.module_shapes or {}),
            current_key: [layer.out_features, layer.in_features],
        }

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` to every adapted layer and replaced module for the time of one forward."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be used in training mode; call model.eval() first.")
        known = {name for layer in self.modules() if isinstance(layer, SSHLayer) for name in layer.ssh_spectrum}
        unknown = sorted(set(names) - known - {BASE_ROW})
        if unknown:
            raise ValueError(f"adapter_names asks for {', '.join(unknown)}; there is {', '.join(sorted(known))}.")
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:  # generation repeats each row once per beam
            names = [name for name in names for _ in range(beams)]
        handles = [
            module.register_forward_pre_hook(partial(_give_names, adapter_names=names), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, SSHLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class SDCTFTModel(SSHModel):
    """sDCTFT on a transformers model; the layers are SSH's with the cosine transform."""


def _give_names(module: nn.Module, args: Any, kwargs: dict[str, Any], *, adapter_names: list[str]) -> tuple[Any, Any]:
    del module
    return args, {**kwargs, "adapter_names": adapter_names}


def _label_names(model_config: dict[str, Any]) -> list[str] | None:
    """Names of ``id2label`` in order, or None where they are transformers' own ``LABEL_0``, …."""
    table = {int(i): str(name) for i, name in (model_config.get("id2label") or {}).items()}
    names = [table[i] for i in sorted(table)]
    return None if not names or all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names

"""PEFT's own layer around one weight: built, given its tensors, merged, thrown away; no model is ever in memory.

What a method does to a weight is PEFT's business alone. A tree that holds nothing but one ``nn.Linear``, under the
path that it has in the model (patterns in configs are matched against it), is handed to PEFT as the model; the
module's tensors are loaded as PEFT loads them, and the layer merges itself. Methods whose modules share tensors as
large as the largest module get a second layer of that size, whose weight is one number seen everywhere.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import AdapterFileError

if TYPE_CHECKING:
    import torch

_ADAPTER = "default"
_WIDEST = "ssh_deploy_widest"
_MODEL = "base_model.model."


@dataclass(frozen=True, slots=True, eq=False)
class OneModule:
    """One adapted module.

    Attributes:
        where: file and module, for messages.
        path: of the module in its model.
        config: adapter_config.json.
        tensors: of this module, and those that it shares with others, by name as saved without ``base_model.model.``.
        shape: (out, in) of the weight.
        widest: (out, in) of the largest sides of all modules, where tensors are shared that are so large; else None.
        biased: whether the layer needs a bias to have a place for its tensors.
    """

    where: str
    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]]
    shape: tuple[int, int]
    widest: tuple[int, int] | None
    biased: bool

    def merged(
        self, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What PEFT makes of ``weight`` [out, in] and ``bias`` [out] (each zeros by default), float32.

        Raises:
            AdapterFileError: PEFT refuses the config or the tensors, or they do not belong together.
        """
        import torch

        out, inn = self.shape
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of concerns training, or models that it expects here
            linear = torch.nn.Linear(inn, out, bias=self.biased, device="meta")
            own = torch.zeros(out, inn) if weight is None else weight.detach().to(torch.float32, copy=True)
            linear.weight = torch.nn.Parameter(own, requires_grad=False)
            if self.biased:
                shift = torch.zeros(out) if bias is None else bias.detach().to(torch.float32, copy=True)
                linear.bias = torch.nn.Parameter(shift, requires_grad=False)
            try:
                layer = self._layer(linear, own)
                layer.merge()
            except AdapterFileError:
                raise
            except Exception as error:  # PEFT raises whatever its layers raise
                text = " ".join(str(error).split())
                raise AdapterFileError(
                    f"{self.where}: PEFT's own {self.config['peft_type']} layer refuses it: "
                    f"{type(error).__name__}: {text:.300}",
                    hint="Its config and its weights do not belong together, or PEFT is older than what saved it.",
                ) from error
            base = layer.get_base_layer()
            return base.weight.detach(), (base.bias.detach() if self.biased else torch.zeros(out))

    def _layer(self, linear: torch.nn.Linear, weight: torch.Tensor) -> Any:
        """PEFT's layer around ``linear``, with its tensors."""
        import peft
        import torch

        model = torch.nn.Module()
        _put(model, self.path, linear)
        targets = [self.path]
        if self.widest is not None and self.widest != self.shape:
            large = torch.nn.Linear(self.widest[1], self.widest[0], bias=False, device="meta")
            seen = torch.zeros(1, 1).expand(*self.widest)
            large.weight = torch.nn.Parameter(seen, requires_grad=False)
            model.add_module(_WIDEST, large)
            targets.append(_WIDEST)
        wrapped: Any = peft.PeftModel(model, self._config(targets), adapter_name=_ADAPTER)  # type: ignore[arg-type]
        prefix = wrapped.base_model.prefix
        state = {
            name if name.startswith("base_model.") else f"{_MODEL}{name}": torch.from_numpy(np.array(t))
            for name, t in self.tensors.items()
        }
        found = peft.set_peft_model_state_dict(wrapped, state, adapter_name=_ADAPTER)
        own = f"{_MODEL}{self.path}."
        stray = [key for key in found.unexpected_keys if key.startswith(own) or not key.startswith("base_model.frod_")]
        shared = tuple(f".{name.split('.')[1]}." for name in self.tensors if name.startswith("base_model."))
        missing = [key for key in found.missing_keys if key.startswith(own) and f".{prefix}" in key]
        missing = [key for key in missing if not any(name in key for name in shared)]  # layers refer to them
        if stray or missing:
            raise AdapterFileError(
                f"{self.where}: {'no ' + missing[0] if missing else stray[0] + ' has no place'} in PEFT's own layer.",
                hint="Its config and its weights do not belong together.",
            )
        layer: Any = wrapped.base_model.model.get_submodule(self.path)
        if hasattr(layer, "frod_U"):  # worked out of W and the projection: of the one in the file, as it was trained
            layer.frod_U[_ADAPTER] = layer._calculate_frod_u_and_lambda(layer.frod_V[_ADAPTER], weight)[0]
        return layer.eval()

    def _config(self, targets: list[str]) -> Any:
        """The file's config for a model of ``targets`` alone."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kind = PEFT_TYPE_TO_CONFIG_MAPPING[self.config["peft_type"]]
        known = {field.name for field in dataclasses.fields(kind) if field.init}
        none = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "task_type")
        none += ("megatron_core",)  # the name of a module, which PEFT would import
        changed: dict[str, Any] = {name: None for name in none if name in known}
        changed |= {"target_modules": targets, "inference_mode": True, "progressbar": False, "fan_in_fan_out": False}
        fields = {**self.config, **changed}
        return kind(**{name: value for name, value in fields.items() if name in known and name != "peft_type"})


def _put(model: torch.nn.Module, path: str, leaf: torch.nn.Module) -> None:
    """``leaf`` under ``path``, through empty modules."""
    import torch

    *parents, last = path.split(".")
    for name in parents:
        if name not in dict(model.named_children()):
            model.add_module(name, torch.nn.Module())
        model = model.get_submodule(name)
    model.add_module(last, leaf)

"""One adapted weight: the base layer, its spectra by adapter name, and how they add to it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssh_deploy.adapters.selection import select_by_bands, select_by_energy
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.transforms import get_transform
from ssh_deploy_train.config import SpectralConfig
from ssh_deploy_train.sparse import Plan, apply_spectrum


class SSHLayer(BaseTunerLayer):
    """Spectra of any number of adapters on one weight; PEFT finds its parts by the two tuples below."""

    adapter_layer_names = ("ssh_spectrum",)
    other_param_names = ("ssh_indices", "ssh_configs")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        #: f32 [n] by adapter name, whatever the base's dtype: an update below bf16's rounding must not be lost.
        self.ssh_spectrum = nn.ParameterDict({})
        #: int32 [2, n] by adapter name, row 0 = out index, row 1 = in index; saved, for no seed rebuilds them.
        self.ssh_indices = BufferDict({}, persistent=True)
        self.ssh_configs: dict[str, SpectralConfig] = {}
        self._plans: dict[str, tuple[tuple[Any, ...], Plan]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        if isinstance(base, nn.Linear):
            self.in_features, self.out_features = base.in_features, base.out_features
        elif isinstance(base, Conv1D):  # stores [in, out]
            self.in_features, self.out_features = base.weight.shape
        else:
            raise TypeError(f"{type(base).__name__} is not supported; nn.Linear and transformers' Conv1D are.")

    def update_layer(self, adapter_name: str, config: SpectralConfig, *, key: str, seed: tuple[int, int]) -> None:
        """Make a zero spectrum for ``adapter_name`` at places chosen from the base weight.

        Args:
            adapter_name: as in PEFT.
            config: checked already; n against this weight is checked here.
            key: module path, for messages.
            seed: the config's seed and a number of this module's own.

        Raises:
            ValueError: more coefficients than the weight has places.
        """
        size = self.out_features * self.in_features
        if config.n_frequency > size:
            raise ValueError(
                f"n_frequency is {config.n_frequency}, but {key} is {self.out_features}×{self.in_features} = {size}; "
                "choose fewer coefficients or exclude this module."
            )
        rows, cols = self._places(config, seed)
        weight = self.get_base_layer().weight
        self.ssh_configs[adapter_name] = config
        self.ssh_spectrum[adapter_name] = nn.Parameter(torch.zeros(config.n_frequency, dtype=torch.float32))
        self.ssh_indices[adapter_name] = torch.from_numpy(np.stack([rows, cols]).astype(np.int32))
        if weight.device.type != "meta" and self.ssh_spectrum[adapter_name].device.type != "meta":
            # Only the device is the base's: PEFT's own mover would also round the spectrum to the base's dtype.
            self.ssh_spectrum[adapter_name].data = self.ssh_spectrum[adapter_name].data.to(weight.device)
            self.ssh_indices[adapter_name] = self.ssh_indices[adapter_name].to(weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _places(self, config: SpectralConfig, seed: tuple[int, int]) -> tuple[Any, Any]:
        base: Any = self.get_base_layer()
        weight = base.weight
        if config.inference_mode or weight.device.type == "meta":
            # About to be overwritten by a file's places: distinct and inside, and no spectrum is computed for them.
            rows, cols = np.divmod(np.arange(config.n_frequency), self.in_features)
            return rows, cols
        dense = weight.detach().to("cpu", torch.float64).numpy()
        spectrum = get_transform(config.transform).analyze(dense.T if isinstance(base, Conv1D) else dense)
        select = select_by_bands if config.norm == "ortho" else select_by_energy
        return select(spectrum, config.n_frequency, delta=config.delta_ratio, seed=seed)

    def plan(self, adapter_name: str) -> Plan:
        """What stays the same from step to step, made once and again when the places or the device change."""
        indices = self.ssh_indices[adapter_name]
        state = (indices.data_ptr(), indices._version, indices.device, tuple(indices.shape))
        cached = self._plans.get(adapter_name)
        if cached is None or cached[0] != state:
            config = self.ssh_configs[adapter_name]
            shape = (self.out_features, self.in_features)
            gain = config.scaling / float(np.sqrt(shape[0] * shape[1])) if config.norm == "backward" else config.scaling
            cached = (state, Plan.make(indices, shape=shape, transform=config.transform, gain=gain))
            self._plans[adapter_name] = cached
        return cached[1]

    def spectral_delta(self, adapter_name: str) -> SpectralDelta:
        """The adapter's change to this weight in the core's own terms (places and values on the CPU)."""
        config = self.ssh_configs[adapter_name]
        rows, cols = self.ssh_indices[adapter_name].cpu().numpy()
        values = self.ssh_spectrum[adapter_name].detach().to("cpu", torch.float32).numpy()
        shape = (self.out_features, self.in_features)
        return SpectralDelta(shape, config.transform, rows, cols, values, config.scaling, config.norm)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Dense ΔW [out, in], float32, on the device of the spectrum; for merging, never for training."""
        return self.spectral_delta(adapter_name).dense(device=self.ssh_spectrum[adapter_name].device)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `BaseTunerLayer`."""
        super().delete_adapter(adapter_name)
        self._plans.pop(adapter_name, None)


class SSHLinear(nn.Module, SSHLayer):
    """`SSHLayer` on ``nn.Linear`` or transformers' ``Conv1D``."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SpectralConfig, *, key: str, seed: tuple[int, int]
    ) -> None:
        super().__init__()
        SSHLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, key=key, seed=seed)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the (active) adapters into the base weight; bf16 and f16 are rounded once.

        Raises:
            ValueError: ``safe_merge`` and a result that is not finite; the weight is then untouched.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.ssh_spectrum:
                self._shift(name, 1.0, safe=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.ssh_spectrum:
                self._shift(name, -1.0, safe=False)

    @torch.no_grad()
    def _shift(self, name: str, scale: float, *, safe: bool) -> None:
        base: Any = self.get_base_layer()
        stored = base.weight.data.T if isinstance(base, Conv1D) else base.weight.data
        shifted = self.spectral_delta(name).add_to(stored.clone(), scale=scale)
        if safe and not torch.isfinite(shifted).all():
            raise ValueError(f"Merging adapter {name} gives NaN or infinite weights; it seems to be broken.")
        stored.copy_(shifted)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """``base(x) + Σ x ΔWᵀ`` over the active adapters, or one adapter per row with ``adapter_names``."""
        if adapter_names is not None:
            return self._forward_rows(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.ssh_spectrum:
                result = (result + apply_spectrum(x, self.ssh_spectrum[name], self.plan(name))).to(result.dtype)
        return result

    def _forward_rows(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for {len(x)} rows; give one for each.")
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name not in self.ssh_spectrum:  # "__base__", or an adapter that leaves this module alone
                continue
            rows = torch.tensor([i for i, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            change = apply_spectrum(x[rows], self.ssh_spectrum[name], self.plan(name))
            result[rows] = (result[rows] + change).to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True for ``nn.Linear``, as PEFT asks."""
        return not isinstance(self.get_base_layer(), Conv1D)

    def __repr__(self) -> str:
        return "ssh." + super().__repr__()

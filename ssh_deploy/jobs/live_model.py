"""A live torch model as adapters see a base: its weights [out, in], their samples, and which may not be touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.checkpoints.fingerprint import Fingerprint, SiteSample, sample_positions
from ssh_deploy.checkpoints.names import canonical, match_modules
from ssh_deploy.errors import AdapterMismatchError, FingerprintError
from ssh_deploy.graph.patching import weighted_modules

if TYPE_CHECKING:
    import torch


class LiveModel:
    """A view of a torch model of transformers; it owns nothing and changes nothing.

    Attributes:
        model: the model.
        config: its config as a mapping.
        modules: its modules by path.
    """

    def __init__(self, model: Any) -> None:
        """Look at ``model``.

        Raises:
            AdapterMismatchError: it is no torch model with a config.
        """
        if not hasattr(model, "named_modules") or not hasattr(getattr(model, "config", None), "to_dict"):
            raise AdapterMismatchError(
                f"{type(model).__name__} is no torch model of transformers: it has no modules or no config.",
                hint="Give the model itself, as from_pretrained returned it.",
            )
        self.model = model
        self.config: dict[str, Any] = model.config.to_dict()
        self.modules: dict[str, Any] = dict(model.named_modules())
        self._known = weighted_modules(model)
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)

    def places(self, modules: Iterable[str]) -> dict[str, str]:
        """Path in the model of each of an adapter's module paths.

        Raises:
            AdapterMismatchError: some match nothing.
        """
        return match_modules(modules, self._known, config=self.config)

    def weight(self, path: str) -> torch.Tensor:
        """The weight of ``path`` as [out, in]; a view that may be written.

        Raises:
            AdapterMismatchError: it is quantised, sharded, not in memory, or another module's too.
        """
        module = self.modules[path]
        own = module.weight
        self.check(f"{path}.weight", own)
        return own.detach().T if type(module).__name__ == "Conv1D" else own.detach()

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor whose numbers are not simply here, or not only its own.

        Raises:
            AdapterMismatchError: as `weight`.
        """
        if tensor.device.type == "meta":
            raise AdapterMismatchError(
                f"{name} is on the meta device: its numbers are offloaded or were never loaded.",
                hint="Load the model whole onto one device, without offloading.",
            )
        if hasattr(tensor, "device_mesh") or hasattr(tensor, "_local_tensor"):
            raise AdapterMismatchError(
                f"{name} is sharded ({type(tensor).__name__}): no process holds all of it.",
                hint="Swap before the model is sharded, or merge into a checkpoint with `ssh-deploy merge`.",
            )
        if str(tensor.dtype) not in ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"):
            raise AdapterMismatchError(
                f"{name} holds {tensor.dtype}: the model is quantised or packed, and no ΔW can be added to codes.",
                hint="Load it in float32, float16 or bfloat16.",
            )
        others = [other for other in self._names.get(id(tensor), []) if other != name]
        if others:
            raise AdapterMismatchError(
                f"{name} is {others[0]} too (they are tied): a change would reach both.",
                hint="`ssh-deploy merge` unties them; load what it writes.",
            )

    def sample(self, path: str) -> SiteSample:
        """Samples of the weight of ``path``, as fingerprints hold them."""
        import torch

        weight = self.weight(path)
        rows, cols = np.divmod(sample_positions(weight.numel()), weight.shape[1])
        picked = weight[torch.from_numpy(rows).to(weight.device), torch.from_numpy(cols).to(weight.device)]
        return SiteSample(tuple(weight.shape), picked.float().cpu().numpy().astype(ml_dtypes.bfloat16))

    def verify(self, adapter: Adapter, places: Mapping[str, str], changed: Mapping[str, SiteSample]) -> bool:
        """Whether the base was told to be ``adapter``'s: False where it stores no fingerprint.

        Args:
            adapter: to be put in.
            places: of its modules.
            changed: samples of the base's weights that hold something else at the moment, by path.

        Raises:
            FingerprintError: it was trained on another base.
        """
        stored = adapter.fingerprint
        if stored is None:
            return False
        try:
            sites = self.places(stored.sites)
        except AdapterMismatchError as error:
            raise FingerprintError(
                f"{adapter.source} was trained on another base: {error.what}", hint="Use the base it was trained on."
            ) from error
        here = {site: changed[path] if path in changed else self.sample(path) for site, path in sites.items()}
        reasons = stored.differences(Fingerprint(str(self.config.get("model_type", "")), here))
        named = {canonical(path, self.config) for path in sites.values()}
        lacking = sorted(path for path in places.values() if canonical(path, self.config) not in named)
        reasons += [f"{path} has no samples in the adapter" for path in lacking]
        if reasons:
            raise FingerprintError(
                f"{adapter.source} was trained on another base than this model: {'; '.join(reasons[:3])}.",
                hint="Use the base it was trained on; merged or fine-tuned copies of a base are other bases.",
            )
        return True


class LiveShapes(Mapping[str, tuple[int, int]]):
    """(out, in) of a live model's weights by an adapter's own module paths; see `adapters.fitting.BaseShapes`."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live

    def __getitem__(self, module: str) -> tuple[int, int]:
        """Shape of ``module``'s weight.

        Raises:
            AdapterMismatchError: it matches nothing.
        """
        weight = self._live.weight(self._live.places([module])[module])
        return weight.shape[0], weight.shape[1]

    def __iter__(self) -> Iterator[str]:
        """Paths of the model."""
        return iter(self._live.modules)

    def __len__(self) -> int:
        """How many modules the model has."""
        return len(self._live.modules)

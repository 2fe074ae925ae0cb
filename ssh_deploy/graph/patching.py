"""An adapter put into a torch model's own weights: the reference that every exported graph is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.checkpoints.names import match_modules
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterMismatchError

if TYPE_CHECKING:
    import torch


#: By module path: weight [out, in] and bias float64 [out] of the base, before any adapter.
Originals = dict[str, tuple["torch.Tensor", NDArray[np.float64] | None]]


def weighted_modules(model: Any) -> list[str]:
    """Paths of the modules of a torch model that own a matrix called ``weight``."""
    return [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]


def model_places(adapter: Adapter, model: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Module path in the torch model by the adapter's module path.

    Args:
        adapter: any.
        model: a torch model of transformers.
        config: config.json of the base.

    Raises:
        AdapterMismatchError: some match nothing.
    """
    return match_modules(adapter.deltas, weighted_modules(model), config=config)


def apply_adapter(
    model: Any,
    adapter: Adapter,
    places: Mapping[str, str],
    *,
    scale: float = 1.0,
    head: bool = True,
    originals: Originals | None = None,
) -> None:
    """Add every ΔW to the model's weights and put the adapter's heads in the place of the model's, in place.

    Args:
        model: a torch model of transformers, float32.
        adapter: what to apply.
        places: as `model_places` gave them.
        scale: factor on ΔW.
        head: whether heads are replaced too.
        originals: one dict for several adapters in a row: changes that depend on the weight then read the base's own.

    Raises:
        AdapterMismatchError: a head that the model has no place for, or of another shape.
    """
    import torch

    modules = dict(model.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            module = modules[places[path]]
            transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores [in, out]
            weight = module.weight.detach().T if transposed else module.weight.detach()
            own, bias = weight, _bias_of(module)
            if originals is not None:
                own, bias = originals.setdefault(places[path], (weight.clone(), bias))
            if isinstance(delta, RelativeDelta):
                _change_bias(module, delta.bias_change_beside(bias, own.float().numpy), scale)
                after = weight + scale * delta.change(own)
            else:
                after = delta.add_to(weight.clone(memory_format=torch.contiguous_format), scale=scale)
            module.weight.copy_(after.T if transposed else after)
        for path, replaced in adapter.replaced.items() if head else ():
            _replace(modules, adapter, path, replaced)


def _bias_of(module: Any) -> NDArray[np.float64] | None:
    bias = getattr(module, "bias", None)  # an embedding has none
    return None if bias is None else bias.detach().double().numpy().copy()


def _change_bias(module: Any, change: NDArray[np.float64] | None, scale: float) -> None:
    import torch

    own = _bias_of(module)
    if change is None or (own is None and not np.any(change)):
        return
    after = torch.from_numpy(scale * change if own is None else own + scale * change).to(module.weight.dtype)
    module.bias = torch.nn.Parameter(after, requires_grad=False)


def rounded(adapter: Adapter, dtype: str) -> Adapter:
    """``adapter`` with its values at places rounded to ``dtype``, as a graph of that adapter dtype holds them."""
    deltas: dict[str, Delta] = {}
    for path, delta in adapter.deltas.items():
        if isinstance(delta, SpectralDelta | SparseDelta):
            deltas[path] = replace(delta, values=delta.values.astype(np.dtype(dtype)))
        else:
            deltas[path] = delta
    return replace(adapter, deltas=deltas)


def label_count(adapter: Adapter, model: Any) -> int | None:
    """Rows of the adapter's head module that gives the labels: the last of them in the model; None without heads."""
    rows = {m: int(r.tensors["weight"].shape[0]) for m, r in adapter.replaced.items() if "weight" in r.tensors}
    return next((rows[name] for name in reversed([n for n, _ in model.named_modules()]) if name in rows), None)


def _replace(modules: Mapping[str, Any], adapter: Adapter, path: str, replaced: ReplacedModule) -> None:
    import torch

    for name, tensor in replaced.tensors.items():
        there = getattr(modules.get(path), name, None)
        if there is None or tuple(there.shape) != tensor.shape:
            shape = "nothing" if there is None else f"{list(there.shape)}"
            raise AdapterMismatchError(
                f"{adapter.source}: head {path}.{name} is {list(tensor.shape)}, the model has {shape} there.",
                hint="The head was trained on another architecture or number of labels.",
            )
        there.copy_(torch.from_numpy(np.array(tensor, dtype=np.float32)))

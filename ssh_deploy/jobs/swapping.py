"""Hot swap on a live torch model: another adapter in its weights, without a copy of it, and the base back bit by bit.

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="bfloat16")
    swap(model, None, "pirate.safetensors")                  # base → pirate
    swap(model, "pirate.safetensors", "chatterbot")          # pirate → chatterbot, never through pirate's rounding
    swap(model, "chatterbot", None)                          # the base's own bits again

The weights hold round(W + ΔW), as a merged checkpoint does, so the model answers at the speed of the base. What undoes
it (`jobs.undoing`) is kept here, beside the model and as long as the model lives; heads, biases and labels are put back
as they were, the very same parameters. An adapter goes in whole or not at all.

Weights are written in place: optimisers, compiled functions and CUDA graphs that hold them see the new numbers. *Not
covered:* a forward pass that runs at the same time (it sees some layers changed), and a copy of a model that holds an
adapter (it is a base with changed weights and knows of no adapter).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.fingerprint import SiteSample
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.errors import AdapterMismatchError, VerificationError
from ssh_deploy.graph.patching import label_count
from ssh_deploy.jobs.live_model import LiveModel, LiveShapes
from ssh_deploy.jobs.undoing import Kept, Undo, summed, undo_of

if TYPE_CHECKING:
    import torch

_AT_ONCE = 256 << 20  # bytes of weights on a GPU that are changed together


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What a swap did.

    ``weights``: changed for the new adapter; ``weight_bytes``: theirs; ``undo_bytes``: kept to bring them back;
    ``heads``: tensors put in the place of the base's; ``verified``: the adapter's fingerprint matched the base
    (False: it stores none; None: there is no adapter now); ``labels``: of the head that answers now.
    """

    weights: int
    weight_bytes: int
    undo_bytes: int
    heads: int
    verified: bool | None
    labels: tuple[str, ...]
    seconds: float


@dataclass(slots=True, eq=False)
class _Held:
    """An adapter in a model, and all that it took the place of."""

    adapter: Adapter
    given: str | None
    undo: dict[str, tuple[Delta, Undo]] = field(default_factory=dict)
    samples: dict[str, SiteSample] = field(default_factory=dict)
    parameters: list[tuple[Any, str, Any]] = field(default_factory=list)  # module, name, the base's own
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)  # owner, name, value


_held: WeakKeyDictionary[Any, _Held] = WeakKeyDictionary()


def swap(
    model: Any, from_: str | Path | Adapter | None, to: str | Path | Adapter | None, *, head: bool = True
) -> SwapReport:
    """Take ``from_`` out of ``model`` and put ``to`` in, in place.

    Args:
        model: of transformers, any device and float dtype; not called while it is swapped.
        from_: the adapter that it holds now, by path or as read; None: the base.
        to: the adapter that it shall hold, likewise.
        head: put the adapter's head in as well. A head of another number of labels is a new parameter, and the
            config's labels change with it.

    Raises:
        AdapterMismatchError: ``from_`` is not what the model holds; ``to`` names modules that the model has not, or
            whose weights are tied, quantised, sharded or not in memory; a head that it has no place for.
        AdapterFileError: a broken file.
        FingerprintError: ``to`` was trained on another base.
        VerificationError: weights were changed by others since, so that the base cannot be restored.
    """
    import torch

    began = time.perf_counter()
    live = LiveModel(model)
    held = _held.get(model)
    _check_holds(held, from_)
    given = str(to) if isinstance(to, str | Path) else None
    adapter = to if isinstance(to, Adapter) or to is None else read_adapter(to, shapes=LiveShapes(live))
    places: dict[str, str] = {}
    verified: bool | None = None
    if adapter is not None:
        places = _fitting(live, adapter)
        verified = live.verify(adapter, places, held.samples if held is not None else {})
        if head:
            _check_heads(live, adapter)
    with torch.no_grad():
        if held is not None:
            _take_out(live, held)
            del _held[model]
        if adapter is None:
            return SwapReport(0, 0, 0, 0, None, _labels(model), round(time.perf_counter() - began, 4))
        new = _Held(adapter, given)
        try:
            _put_in(LiveModel(model), new, places, head=head)
        except BaseException:
            _take_out(live, new)
            raise
    _held[model] = new
    undone = sum(undo.nbytes for _, undo in new.undo.values())
    size = sum(live.weight(path).numel() * live.weight(path).element_size() for path in new.undo)
    heads = sum(len(r.tensors) for r in adapter.replaced.values()) if head else 0
    seconds = round(time.perf_counter() - began, 4)
    return SwapReport(len(new.undo), size, undone, heads, verified, _labels(model), seconds)


def held_by(model: Any) -> Adapter | None:
    """The adapter that `swap` put into ``model``, or None."""
    held = _held.get(model)
    return None if held is None else held.adapter


def _check_holds(held: _Held | None, from_: str | Path | Adapter | None) -> None:
    """Refuse when ``from_`` is not what the model holds."""
    if held is None and from_ is None:
        return
    there = "the base" if held is None else str(held.given or held.adapter.source)
    if held is not None and from_ is not None:
        if isinstance(from_, Adapter):
            same = from_ is held.adapter or (bool(from_.digest) and from_.digest == held.adapter.digest)
        else:
            same = str(from_) == held.given or read_adapter(from_).digest == held.adapter.digest
        if same:
            return
    said = "the base" if from_ is None else str(from_.source if isinstance(from_, Adapter) else from_)
    raise AdapterMismatchError(
        f"The model holds {there}, not {said}.", hint="`from_` says what is to be taken out: give what it holds now."
    )


def _fitting(live: LiveModel, adapter: Adapter) -> dict[str, str]:
    """Places of ``adapter``'s modules in the model, with weights of the right shapes."""
    places = live.places(adapter.deltas)
    for module, delta in adapter.deltas.items():
        shape = tuple(live.weight(places[module]).shape)
        if shape != delta.shape:
            raise AdapterMismatchError(
                f"{adapter.source}: {module} is for a weight of {delta.shape[0]}×{delta.shape[1]}; the model has "
                f"{shape[0]}×{shape[1]}.",
                hint="This adapter belongs to a base of another size.",
            )
    return places


def _check_heads(live: LiveModel, adapter: Adapter) -> None:
    for path, replaced in adapter.replaced.items():
        for name, tensor in replaced.tensors.items():
            there = getattr(live.modules.get(path), name, None)
            if there is None or tuple(there.shape[1:]) != tensor.shape[1:]:
                shape = "nothing" if there is None else f"{list(there.shape)}"
                raise AdapterMismatchError(
                    f"{adapter.source}: head {path}.{name} is {list(tensor.shape)}, the model has {shape} there.",
                    hint="Load the model with its task's class (AutoModelForSequenceClassification), or swap with "
                    "head=False.",
                )
            live.check(f"{path}.{name}", there)


def _put_in(live: LiveModel, new: _Held, places: dict[str, str], *, head: bool) -> None:
    """Change the weights; what was done so far stands in ``new``, should it fail."""
    deltas = {places[module]: delta for module, delta in new.adapter.deltas.items()}
    for path in deltas:
        new.samples[path] = live.sample(path)
    for group in _groups(live, list(deltas)):
        weights, own = [live.weight(path) for path in group], [deltas[path] for path in group]
        after = summed(weights, own)
        backs = _back(after, own)
        for path, weight, delta, made, back in zip(group, weights, own, after, backs, strict=True):
            if isinstance(delta, RelativeDelta):
                _change_bias(live.modules[path], delta, weight, new)
            new.undo[path] = (delta, undo_of(weight.contiguous(), delta, back))
            weight.copy_(made)
    if head:
        _put_heads_in(live, new)


def _take_out(live: LiveModel, held: _Held) -> None:
    """The base's own bits, parameters and labels; what is restored is struck from ``held``."""
    while held.attributes:
        owner, name, value = held.attributes.pop()
        setattr(owner, name, value)
    while held.parameters:
        module, name, parameter = held.parameters.pop()
        setattr(module, name, parameter)
    for group in _groups(live, list(held.undo)):
        weights, deltas = [live.weight(path) for path in group], [held.undo[path][0] for path in group]
        for path, weight, back in zip(group, weights, _back(weights, deltas), strict=True):
            undo = held.undo[path][1]
            base = undo.weight if isinstance(undo, Kept) else undo.restored(back)
            if base is None:
                raise VerificationError(
                    f"{path}.weight is not what swap left there, so the base's own bits cannot be told from it.",
                    hint="It was changed since, or torch was given another number of threads: load the model again.",
                )
            weight.copy_(base)
            del held.undo[path]


def _back(weights: Sequence[torch.Tensor], deltas: Sequence[Delta]) -> list[torch.Tensor]:
    """``round(W′ − ΔW)`` of each pair; for changes that depend on W, which has gone, W′ itself."""
    fixed = [i for i, delta in enumerate(deltas) if not isinstance(delta, RelativeDelta)]
    found = dict(zip(fixed, summed([weights[i] for i in fixed], [deltas[i] for i in fixed], scale=-1.0), strict=True))
    return [found.get(i, weight) for i, weight in enumerate(weights)]


def _groups(live: LiveModel, paths: Sequence[str]) -> Iterator[list[str]]:
    """``paths`` in parts that are changed together: on a GPU as many as `_AT_ONCE` bytes are, else one by one."""
    part: list[str] = []
    size = 0
    for path in paths:
        weight = live.weight(path)
        own = weight.numel() * weight.element_size()
        if part and (weight.device.type == "cpu" or size + own > _AT_ONCE):
            yield part
            part, size = [], 0
        part.append(path)
        size += own
    if part:
        yield part


def _change_bias(module: Any, delta: RelativeDelta, weight: torch.Tensor, new: _Held) -> None:
    import torch

    bias = getattr(module, "bias", None)
    before = None if bias is None else bias.detach().double().cpu().numpy()
    change = delta.bias_change_beside(before, lambda: weight.float().cpu().numpy())
    if change is None or (before is None and not np.any(change)):
        return
    after = torch.from_numpy(change if before is None else before + change).to(weight.device, weight.dtype)
    _replace(module, "bias", after, new)


def _put_heads_in(live: LiveModel, new: _Held) -> None:
    import torch

    adapter, model = new.adapter, live.model
    labels = label_count(adapter, model)
    for path, replaced in adapter.replaced.items():
        module = live.modules[path]
        for name, tensor in replaced.tensors.items():
            there = getattr(module, name)
            made = torch.from_numpy(np.array(tensor, dtype=np.float32)).to(there.device, there.dtype)
            _replace(module, name, made, new)
        if hasattr(module, "out_features") and "weight" in replaced.tensors:
            _set(module, "out_features", int(replaced.tensors["weight"].shape[0]), new)
    if labels is None or not hasattr(model.config, "id2label"):
        return
    names = list(adapter.labels) if len(adapter.labels) == labels else [f"LABEL_{i}" for i in range(labels)]
    _set(model.config, "id2label", dict(enumerate(names)), new)
    _set(model.config, "label2id", {name: i for i, name in enumerate(names)}, new)
    _set(model.config, "problem_type", "regression" if labels == 1 else "single_label_classification", new)
    if hasattr(model, "num_labels"):
        _set(model, "num_labels", labels, new)


def _replace(module: Any, name: str, made: torch.Tensor, new: _Held) -> None:
    """A new parameter in the place of the base's, whose like it is trained or not."""
    import torch

    there = getattr(module, name, None)
    new.parameters.append((module, name, there))
    setattr(module, name, torch.nn.Parameter(made, requires_grad=there is not None and there.requires_grad))


def _set(owner: Any, name: str, value: Any, new: _Held) -> None:
    new.attributes.append((owner, name, getattr(owner, name, None)))
    setattr(owner, name, value)


def _labels(model: Any) -> tuple[str, ...]:
    """Labels of the head that answers, by the config; none where the model has no head."""
    found = getattr(model.config, "id2label", None) if hasattr(model, "num_labels") else None
    return tuple(str(found[i]) for i in sorted(found)) if found else ()

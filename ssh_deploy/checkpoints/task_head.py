"""The task model a head belongs to: its class, its config, and the names a checkpoint of it must have.

An adapter brings a head under the names of the model it was trained in (``classifier.weight``); the base may be the
bare model (``encoder.layer.0…``). Only transformers knows which class has such a head and which tensors it wants,
so the class is built on the ``meta`` device with a number of labels that no head has; where its shapes show that
number, the head's shapes show the labels. The merged checkpoint then holds exactly the tensors of that class: it
loads with nothing missing and nothing unexpected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssh_deploy.checkpoints.architecture import SENTINEL, base_prefix, meta_model, renaming
from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.errors import AdapterMismatchError, CheckpointError

_CLASSES = {
    "text-classification": ("AutoModelForSequenceClassification",),
    "causal-lm": ("AutoModelForCausalLM",),
}
_ANY_CLASS = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
)


@dataclass(frozen=True, slots=True)
class TaskHead:
    """How a base becomes a task model.

    Attributes:
        config: the new config.json.
        names: new name by stored name, of the tensors that stay.
        dropped: stored tensors that the task model has no place for.
    """

    config: dict[str, Any]
    names: dict[str, str]
    dropped: tuple[str, ...]


def fit_head(
    checkpoint: Checkpoint, tensors: Mapping[str, tuple[int, ...]], *, task: str | None, labels: Sequence[str]
) -> TaskHead:
    """Find the task model that ``tensors`` are the head of, and what the base's tensors are called in it.

    Args:
        checkpoint: the base.
        tensors: shapes of the head's tensors by name in the task model.
        task: of the adapter, or None.
        labels: names of its classes, or none.

    Raises:
        AdapterMismatchError: no task model has such a head, the labels do not fit it, or it needs tensors that
            neither the base nor the head has.
        CheckpointError: transformers does not know the architecture.
    """
    config = checkpoint.config
    model, count = _task_model(config, tensors, task)
    if labels and count is not None and len(labels) != count:
        raise AdapterMismatchError(
            f"The head has {count} rows and the adapter names {len(labels)} labels.", hint="Save the adapter again."
        )
    wanted = set(model.state_dict())
    rename, prefix = renaming(model), base_prefix(config)
    names, dropped, covered = {}, [], set(tensors)
    for stored in checkpoint.names():
        loaded = rename(stored)
        inside, bare = f"{prefix}.{loaded}", loaded.removeprefix(f"{prefix}.")
        if {loaded, inside, bare} & set(tensors):
            continue
        if loaded in wanted:
            names[stored] = stored
            covered.add(loaded)
        elif prefix and inside in wanted:
            names[stored] = f"{prefix}.{stored}"
            covered.add(inside)
        elif bare in wanted:
            names[stored] = stored.removeprefix(f"{prefix}.")
            covered.add(bare)
        else:
            dropped.append(stored)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    missing = sorted(name for name in wanted - covered if ties.get(name) not in covered)
    if missing:
        raise AdapterMismatchError(
            f"{type(model).__name__} needs {', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}, which neither "
            f"{checkpoint.folder} nor the adapter's head has.",
            hint="Train with these modules in modules_to_save, or merge without the head (--head none).",
        )
    untied = any(name in tensors for name in ties)
    return TaskHead(_config(config, type(model).__name__, count, labels, untied=untied), names, tuple(dropped))


def _task_model(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], task: str | None) -> tuple[Any, Any]:
    """The first class that has every tensor of the head, and the number of labels its shapes show (or None)."""
    tried = []
    for auto_class in (None, *_CLASSES.get(task or "", _ANY_CLASS)):
        try:
            model = meta_model(config, auto_class, num_labels=SENTINEL)
        except CheckpointError as error:
            last = error
            continue
        tried.append(type(model).__name__)
        fits, count = _labels_of(model, tensors)
        if fits:
            return model, count
    if not tried:
        raise last
    raise AdapterMismatchError(
        f"No task model has a head {', '.join(f'{n} {list(s)}' for n, s in sorted(tensors.items()))}; tried "
        f"{', '.join(dict.fromkeys(tried))}.",
        hint="The head was trained on another architecture or size; merge without it (--head none).",
    )


def _labels_of(model: Any, tensors: Mapping[str, tuple[int, ...]]) -> tuple[bool, int | None]:
    state = model.state_dict()
    counts = set()
    for name, shape in tensors.items():
        if name not in state or len(state[name].shape) != len(shape):
            return False, None
        for want, have in zip(state[name].shape, shape, strict=True):
            if want == SENTINEL:
                counts.add(have)
            elif want != have:
                return False, None
    return len(counts) <= 1, next(iter(counts), None)


def _config(
    config: Mapping[str, Any], architecture: str, count: int | None, labels: Sequence[str], *, untied: bool
) -> dict[str, Any]:
    new = {**config, "architectures": [architecture]}
    if count is not None:
        names = list(labels) or [f"LABEL_{i}" for i in range(count)]
        new["id2label"] = {str(i): name for i, name in enumerate(names)}
        new["label2id"] = {name: i for i, name in enumerate(names)}
        new["problem_type"] = "regression" if count == 1 else "single_label_classification"
        for key in ("num_labels", "_num_labels"):
            if key in new:
                new[key] = count
    if untied:
        new["tie_word_embeddings"] = False
    return new

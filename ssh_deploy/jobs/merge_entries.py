"""The tensors of a merged checkpoint: which are computed, which are taken as they are, and which shard each goes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssh_deploy.adapters.fitting import Fitted
from ssh_deploy.checkpoints.architecture import tied_modules
from ssh_deploy.checkpoints.index import FLOATS, Checkpoint
from ssh_deploy.checkpoints.safefile import DTYPES
from ssh_deploy.checkpoints.task_head import TaskHead, fit_head
from ssh_deploy.checkpoints.writer import Entry, Made, Stored, entry_bytes
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.jobs import merging_integers
from ssh_deploy.jobs.rounding import Tally, casting, merging, merging_bias
from ssh_deploy.jobs.row_changes import working_bytes

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Given:
    """An adapter that fits, by the name it goes by here, and the factor on its ΔW."""

    name: str
    weight: float
    fitted: Fitted


def changed_tensors(
    checkpoint: Checkpoint, given: Sequence[Given], dtype: str, *, device: str, integral: bool, threads: int
) -> tuple[dict[str, Made], dict[str, Tally], bool]:
    """Adapted tensors by name, their tallies, and whether an output embedding comes apart from the input's."""
    by_place: dict[tuple[str, str], list[tuple[str, Delta, float]]] = {}
    for g in given:
        for module, delta in g.fitted.adapter.deltas.items():
            stored = g.fitted.places[module]
            target = module if module in g.fitted.untied else stored
            by_place.setdefault((target, stored), []).append((g.name, delta, g.weight))
    made: dict[str, Made] = {}
    tallies = {}
    for (target, stored), terms in by_place.items():
        name, source = f"{target}.weight", f"{stored}.weight"
        code = checkpoint.dtype(source) if dtype == "keep" else CODES[dtype]
        tally = tallies[name] = Tally(tuple(dict.fromkeys(n for n, _, _ in terms)))
        if integral:
            made |= merging_integers.integral_entries(checkpoint, target, stored, terms, tally=tally)
            continue
        plain = [(delta, weight) for _, delta, weight in terms]
        parts = merging(checkpoint, stored, plain, code, device=device, tally=tally, threads=threads)
        shape = checkpoint.shape(source)
        made[name] = Made(code, shape, parts, working_bytes(plain, shape, threads=threads, device=device))
        biased = [(n, d, w) for n, d, w in terms if isinstance(d, RelativeDelta) and d.bias_change(None) is not None]
        if biased:
            _bias(checkpoint, target, stored, biased, dtype, made, tallies)
    outside = [target for target, _ in by_place if not any(part.isdigit() for part in target.split("."))]
    return made, tallies, bool(outside) and bool(set(tied_modules(checkpoint.config)) & set(outside))


def _bias(
    checkpoint: Checkpoint,
    target: str,
    stored: str,
    terms: Sequence[tuple[str, RelativeDelta, float]],
    dtype: str,
    made: dict[str, Made],
    tallies: dict[str, Tally],
) -> None:
    """Put the changed bias of one module into ``made`` and ``tallies``."""
    name, source = f"{target}.bias", f"{stored}.bias"
    if source not in checkpoint.places:
        shifted = [n for n, d, _ in terms if np.any(d.bias_change(None))]
        if shifted:
            raise AdapterMismatchError(
                f"{shifted[0]} shifts the answers of {stored}, which has no bias in {checkpoint.folder} to take it.",
                hint="Slots take it: `ssh-deploy export --onnx`.",
            )
        return
    width = terms[0][1].shape[0]
    if checkpoint.shape(source) != (width,):
        raise AdapterMismatchError(
            f"{checkpoint.folder}: {source} is {list(checkpoint.shape(source))}, its weight has {width} rows.",
            hint="The checkpoint is damaged.",
        )
    code = checkpoint.dtype(source) if dtype == "keep" else CODES[dtype]
    tally = tallies[name] = Tally(tuple(dict.fromkeys(n for n, _, _ in terms)))
    parts = merging_bias(checkpoint, stored, [(d, w) for _, d, w in terms], code, tally=tally)
    made[name] = Made(code, (width,), parts)


def replaced_tensors(replaced: Mapping[str, ReplacedModule], dtype: str) -> dict[str, Made]:
    """Tensors of a head that takes the place of the base's, by name."""
    made = {}
    for module, new in replaced.items():
        for part, tensor in new.tensors.items():
            code = next(c for c, d in DTYPES.items() if np.dtype(d) == tensor.dtype)
            code = code if dtype == "keep" or code not in FLOATS else CODES[dtype]
            made[f"{module}.{part}"] = Made(code, tensor.shape, casting(f"{module}.{part}", tensor, code))
    return made


def task_of(
    checkpoint: Checkpoint, made: Mapping[str, Made], given: Sequence[Given], owner: Given | None, *, untied: bool
) -> TaskHead | None:
    """The task model the result is, when it is another than the base."""
    head: dict[str, tuple[int, ...]] = {}
    if owner is not None:
        replaced = owner.fitted.adapter.replaced
        head = {f"{module}.{part}": t.shape for module, new in replaced.items() for part, t in new.tensors.items()}
    loose = {name for g in given for name in (f"{module}.weight" for module in g.fitted.untied)}
    if untied:
        head |= {name: made[name].shape for name in made if name in loose or name not in checkpoint.places}
    if not head and not untied:
        return None
    if not head:  # the file holds both embeddings already; only the config ties them
        config = {**checkpoint.config, "tie_word_embeddings": False}
        return TaskHead(config, {name: name for name in checkpoint.names()}, ())
    adapter = owner.fitted.adapter if owner is not None else None
    return fit_head(
        checkpoint,
        head,
        task=adapter.task if adapter is not None else "causal-lm",
        labels=adapter.labels if adapter is not None else (),
    )


def shard_entries(
    checkpoint: Checkpoint, made: Mapping[str, Made], task: TaskHead | None, dtype: str
) -> dict[str, dict[str, Entry]]:
    """Entries of each output shard. Tensors that the base does not hold go into the last one."""
    shards: dict[str, dict[str, Entry]] = {name: {} for name in checkpoint.shards}
    left = dict(made)
    for stored, shard in checkpoint.places.items():
        if task is not None and stored not in task.names and stored not in made:
            continue
        name = task.names.get(stored, stored) if task is not None else stored
        if stored in left:
            shards[shard][name] = left.pop(stored)
            continue
        file, code = checkpoint.shards[shard], checkpoint.dtype(stored)
        if dtype == "keep" or code == CODES[dtype] or code not in FLOATS:
            shards[shard][name] = Stored(file, stored)
        else:
            parts = casting(stored, file.tensors[stored], CODES[dtype], shard=file)
            shards[shard][name] = Made(CODES[dtype], checkpoint.shape(stored), parts)
    shards[max(shards)] |= merging_integers.scales_renamed(left, task.names if task is not None else {})
    return {name: entries for name, entries in shards.items() if entries}


def index_of(index: Mapping[str, Any], shards: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    """The base's ``index`` for the merged ``shards``."""
    metadata = dict(index.get("metadata") or {})
    every = [entry for entries in shards.values() for entry in entries.values()]
    metadata["total_size"] = sum(entry_bytes(entry) for entry in every)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(_count(entry) for entry in every)
    places = {name: shard for shard, entries in shards.items() for name in entries}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(places.items()))}


def _count(entry: Entry) -> int:
    shape: Iterable[int] = entry.shape if isinstance(entry, Made) else entry.shard.table[entry.name]["shape"]
    return int(np.prod(list(shape), dtype=np.int64))

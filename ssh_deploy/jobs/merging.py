"""Merge adapters into a checkpoint: stream shards, add ΔW in float32, round once, say how much survived.

The model is never in memory. Each shard is cloned or copied by the kernel and the adapted tensors are written over
the copy (`checkpoints.writer`); at any moment there is one ΔW in float32 and a few rows beside it.

What one update loses to rounding is measured on the way (`jobs.rounding`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy.adapters.fitting import Fitted, fit
from ssh_deploy.checkpoints.architecture import tied_modules
from ssh_deploy.checkpoints.index import FLOATS, INDEX, OTHER_WEIGHTS, Checkpoint, contained, open_checkpoint
from ssh_deploy.checkpoints.safefile import DTYPES
from ssh_deploy.checkpoints.task_head import TaskHead, fit_head
from ssh_deploy.checkpoints.whole import whole_folder
from ssh_deploy.checkpoints.writer import Entry, Made, Stored, copy_into, entry_bytes, write_shard
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.errors import AdapterMismatchError, DependencyError, OutputError, UnknownNameError, near_misses
from ssh_deploy.jobs import merging_integers
from ssh_deploy.jobs.merge_report import UNVERIFIED, VERIFIED, MergedAdapter, MergeReport, SiteReport
from ssh_deploy.jobs.naming import named_paths
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.rounding import Tally, casting, merging, merging_bias, survival

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class _Given:
    name: str
    weight: float
    fitted: Fitted


def merge_adapters(
    base: str | Path,
    adapters: Sequence[str],
    out: str | Path,
    *,
    weights: Sequence[float] = (),
    dtype: str = "keep",
    device: str = "auto",
    head: str | None = None,
    require_fingerprint: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Merge ``adapters`` into ``base`` and write the result to the new folder ``out``, all or nothing.

    Args:
        base: local folder or hub id.
        adapters: ``PATH`` or ``NAME=PATH`` each.
        out: new folder.
        weights: factor on each adapter's ΔW, one per adapter; none means 1 for all. Heads are not scaled.
        dtype: ``keep``, or ``float32``, ``float16``, ``bfloat16`` for every float tensor; ``int8`` for the adapted
            weights of adapters that were trained on integers, all else kept.
        device: where ΔW is computed: ``cpu``, ``cuda``, or ``auto`` (cuda where there is one).
        head: whose head to write, ``none`` for no head; None takes the only one there is.
        require_fingerprint: refuse adapters that store no fingerprint.
        progress: told of bytes written.

    Raises:
        AdapterFileError, AdapterMismatchError, CheckpointError, FingerprintError: something does not fit.
        UnknownNameError: ``head`` names none of the adapters.
        OutputError: ``out`` exists or cannot be written.
    """
    began = time.perf_counter()
    out = Path(out)
    if out.exists() or out.is_symlink():  # before any work; whole_folder asks again
        raise OutputError(f"{out} exists already.", hint="Choose another name or remove it first.")
    checkpoint = open_checkpoint(base)
    given = _given(named_paths(adapters), checkpoint, weights, require_fingerprint=require_fingerprint)
    device = _device(device)
    owner, replaced = _head(given, head)
    asked, integral = dtype, dtype == "int8"
    dtype = "keep" if integral else dtype
    made, tallies, untied = _deltas(checkpoint, given, dtype, device, integral=integral)
    made |= _replacements(replaced, dtype)
    task = _task(checkpoint, made, given, owner, untied=untied)
    config = task.config if task is not None else dict(checkpoint.config)
    if dtype != "keep":
        config = _typed(config, dtype)
    shards = _shards(checkpoint, made, task, dtype)
    if integral:
        config = {**config, "quantization_config": merging_integers.quantization(shards)}
    files, left_out = _files(checkpoint)
    need = sum(entry_bytes(e) for entries in shards.values() for e in entries.values())
    need += sum(contained(checkpoint.folder, f).stat().st_size for f in files)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("merge", min(done, need), need)

    with whole_folder(out, need=need) as partial:
        for name, entries in shards.items():
            write_shard(partial / name, checkpoint.shards[name], entries, advance=advance)
        for relative in files:
            if str(relative) not in ("config.json", INDEX):
                copy_into(contained(checkpoint.folder, relative), partial / relative, advance=advance)
        if config == checkpoint.config:
            copy_into(contained(checkpoint.folder, Path("config.json")), partial / "config.json", advance=advance)
        else:
            _write_json(partial / "config.json", config)
        if checkpoint.index is not None:
            _write_json(partial / INDEX, _index(checkpoint.index, shards))
        written = sorted(p for p in partial.rglob("*") if p.is_file())
        size = sum(p.stat().st_size for p in written)
        names = tuple(str(p.relative_to(partial)) for p in written)
    return MergeReport(
        out=str(out),
        dtype=asked,
        adapters=tuple(_merged_adapter(g) for g in given),
        head=owner.name if owner is not None else None,
        sites=tuple(_site(tensor, tally) for tensor, tally in sorted(tallies.items())),
        survival=survival(tallies.values()),
        renamed=sum(a != b for a, b in task.names.items()) if task is not None else 0,
        dropped=task.dropped if task is not None else (),
        files=names,
        left_out=left_out,
        bytes=size,
        changed_bytes=sum(entry_bytes(e) for s in shards.values() for e in s.values() if isinstance(e, Made)),
        seconds=round(time.perf_counter() - began, 3),
    )


def _merged_adapter(given: _Given) -> MergedAdapter:
    adapter = given.fitted.adapter
    base = VERIFIED if given.fitted.verified else UNVERIFIED
    return MergedAdapter(given.name, given.weight, adapter.family, adapter.digest, base)


def _site(tensor: str, tally: Tally) -> SiteReport:
    return SiteReport(tensor, tally.adapters, tally.largest, tally.delta**0.5, tally.survival, tally.unchanged)


def _given(
    paths: Mapping[str, Path], checkpoint: Checkpoint, weights: Sequence[float], *, require_fingerprint: bool
) -> list[_Given]:
    if not paths:
        raise AdapterMismatchError("No adapter to merge.", hint="Give at least one.")
    if weights and len(weights) != len(paths):
        raise AdapterMismatchError(
            f"{len(weights)} weights for {len(paths)} adapters.", hint="Give --weight once per adapter, in their order."
        )
    if not all(np.isfinite(weight) for weight in weights):
        raise AdapterMismatchError(f"Weights {list(weights)} are not all finite.", hint="Give numbers such as 0.5.")
    factors = list(weights) or [1.0] * len(paths)
    fitted = [fit(path, checkpoint, require_fingerprint=require_fingerprint) for path in paths.values()]
    return [_Given(n, w, f) for n, w, f in zip(paths, factors, fitted, strict=True)]


def _device(device: str) -> str:
    nvidia = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()  # spares CPU machines the import of torch
    if device == "cpu" or (device == "auto" and not nvidia):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    raise DependencyError(
        f"--device {device}: torch {torch.__version__} sees no CUDA device.", hint="Use --device cpu, or a CUDA build."
    )


def _head(given: Sequence[_Given], wanted: str | None) -> tuple[_Given | None, Mapping[str, ReplacedModule]]:
    """Whose head is written, and its modules."""
    owners = [g for g in given if g.fitted.adapter.replaced]
    if wanted == "none":
        return None, {}
    if wanted is not None:
        chosen = [g for g in given if g.name == wanted]
        if not chosen:
            raise UnknownNameError(
                f"--head {wanted}: no adapter here goes by that name.",
                hint=near_misses(wanted, [g.name for g in given]),
            )
        if chosen[0] not in owners:
            raise UnknownNameError(f"--head {wanted}: that adapter has no head.", hint="Use --head none.")
        return chosen[0], chosen[0].fitted.adapter.replaced
    if not owners:
        return None, {}
    first = owners[0]
    if any(not _same_head(first.fitted, other.fitted) for other in owners[1:]):
        raise AdapterMismatchError(
            f"Adapters {', '.join(g.name for g in owners)} bring different heads; one checkpoint has one.",
            hint=f"Choose with --head {first.name} (or another), or --head none to merge only their deltas.",
        )
    return first, first.fitted.adapter.replaced


def _same_head(one: Fitted, two: Fitted) -> bool:
    a, b = ({f"{m}.{n}": t for m, r in f.adapter.replaced.items() for n, t in r.tensors.items()} for f in (one, two))
    return (
        one.adapter.labels == two.adapter.labels
        and set(a) == set(b)
        and all(a[n].shape == b[n].shape and np.array_equal(a[n], b[n]) for n in a)
    )


def _deltas(
    checkpoint: Checkpoint, given: Sequence[_Given], dtype: str, device: str, *, integral: bool
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
        parts = merging(checkpoint, stored, [(d, w) for _, d, w in terms], code, device=device, tally=tally)
        made[name] = Made(code, checkpoint.shape(source), parts)
        biased = [(n, d, w) for n, d, w in terms if isinstance(d, RelativeDelta) and d.bias_change(None) is not None]
        if biased:
            _bias(checkpoint, target, stored, biased, dtype, made, tallies)
    plain = [target for target, _ in by_place if not any(part.isdigit() for part in target.split("."))]
    return made, tallies, bool(plain) and bool(set(tied_modules(checkpoint.config)) & set(plain))


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


def _replacements(replaced: Mapping[str, ReplacedModule], dtype: str) -> dict[str, Made]:
    made = {}
    for module, new in replaced.items():
        for part, tensor in new.tensors.items():
            code = next(c for c, d in DTYPES.items() if np.dtype(d) == tensor.dtype)
            code = code if dtype == "keep" or code not in FLOATS else CODES[dtype]
            made[f"{module}.{part}"] = Made(code, tensor.shape, casting(f"{module}.{part}", tensor, code))
    return made


def _task(
    checkpoint: Checkpoint, made: Mapping[str, Made], given: Sequence[_Given], owner: _Given | None, *, untied: bool
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


def _shards(
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


def _files(checkpoint: Checkpoint) -> tuple[list[Path], tuple[str, ...]]:
    """Files of the base that come along, and weights in other forms that do not."""
    keep, left = [], []
    for path in checkpoint.files():
        name = str(path)
        stale = path.suffix in OTHER_WEIGHTS or name.endswith(tuple(f"{suffix}.index.json" for suffix in OTHER_WEIGHTS))
        if stale or (path.suffix == ".safetensors" and path.parent == Path() and name not in checkpoint.shards):
            left.append(name)
        elif name not in checkpoint.shards:
            keep.append(path)
    return keep, tuple(left)


def _index(index: Mapping[str, Any], shards: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
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


def _typed(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: dtype}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""What a merge is going to do, worked out before a byte is written: tensors, files, bytes, memory, and its digest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy import __version__
from ssh_deploy.adapters.fitting import Fitted, fit
from ssh_deploy.checkpoints.copying import clones_into
from ssh_deploy.checkpoints.index import OTHER_WEIGHTS, Checkpoint, contained, open_checkpoint
from ssh_deploy.checkpoints.resumable import finished_bytes, partial_path
from ssh_deploy.checkpoints.task_head import TaskHead
from ssh_deploy.checkpoints.writer import Entry, Made, entry_bytes, keeps_layout
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.errors import AdapterMismatchError, CheckpointError, DependencyError, UnknownNameError, near_misses
from ssh_deploy.jobs import merging_integers
from ssh_deploy.jobs.merge_entries import Given, changed_tensors, replaced_tensors, shard_entries, task_of
from ssh_deploy.jobs.naming import named_paths
from ssh_deploy.jobs.rounding import Tally
from ssh_deploy.transforms.cpu import cores

_PROCESS = 60_000_000  # bytes of Python, numpy and this package


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge; see `merging.merge_adapters`."""

    weights: Sequence[float] = ()
    dtype: str = "keep"
    device: str = "auto"
    head: str | None = None
    require_fingerprint: bool = False
    jobs: int | None = None
    fresh: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """Everything that is known of a merge before it begins.

    Attributes:
        checkpoint: the base.
        given: adapters with their factors.
        options: as asked, device and jobs settled.
        owner: whose head is written.
        task: the task model the result is, when it is another than the base.
        config: of the result.
        shards: entries of each output shard.
        tallies: by adapted tensor; filled while shards are written.
        files: of the base that come along.
        left_out: weights in other forms, which do not.
        stamps: size, time and inode of each shard of the base when it was opened.
    """

    checkpoint: Checkpoint
    given: tuple[Given, ...]
    options: MergeOptions
    owner: Given | None
    task: TaskHead | None
    config: dict[str, Any]
    shards: dict[str, dict[str, Entry]]
    tallies: dict[str, Tally]
    files: list[Path]
    left_out: tuple[str, ...]
    stamps: dict[str, tuple[int, ...]]

    @property
    def jobs(self) -> int:
        """Shards at once."""
        return self.options.jobs or 1

    @property
    def need(self) -> int:
        """Bytes of the result."""
        tensors = sum(entry_bytes(e) for entries in self.shards.values() for e in entries.values())
        return tensors + sum(contained(self.checkpoint.folder, f).stat().st_size for f in self.files)

    def space(self, out: Path) -> int:
        """Bytes that the result takes of the disk of ``out``: less than `need` where it can share those of the base."""
        folder = _folder(out)
        shards = self.checkpoint.shards
        if self.need <= shutil.disk_usage(folder).free or not all(
            clones_into(shard.path, folder) for shard in shards.values()
        ):
            return self.need
        return sum(
            entry_bytes(entry)
            for name, entries in self.shards.items()
            for entry in entries.values()
            if isinstance(entry, Made) or not keeps_layout(shards[name], entries)
        )

    @property
    def computed(self) -> int:
        """Bytes of tensors that are computed."""
        return sum(entry_bytes(e) for entry in self.shards.values() for e in entry.values() if isinstance(e, Made))

    @property
    def memory(self) -> int:
        """About the most anonymous memory it takes, in bytes."""
        most = [max((e.memory for e in s.values() if isinstance(e, Made)), default=0) for s in self.shards.values()]
        return _PROCESS + sum(sorted(most)[-self.jobs :])

    @property
    def key(self) -> str:
        """sha256 of all that the result depends on: base, adapters, options and this release."""
        base, options = self.checkpoint, self.options
        parts = {
            "release": __version__,
            "base": str(base.folder.resolve()),
            "config": self.config,
            "shards": {name: [self.stamps[name], shard.header.canonical] for name, shard in base.shards.items()},
            "adapters": [[g.name, g.fitted.adapter.digest, g.weight] for g in self.given],
            "options": [options.dtype, options.device, options.head],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tensors_of(self, shard: str) -> list[str]:
        """Names of the tallies that are filled while ``shard`` is written."""
        last = max(self.checkpoint.shards)
        return [name for name in self.tallies if self.checkpoint.places.get(name, last) == shard]

    def refuse_changed(self, shard: str) -> None:
        """Refuse a shard of the base that is no longer what was opened.

        Raises:
            CheckpointError: it is another file, or was written to.
        """
        path = self.checkpoint.shards[shard].path
        if _stamp(path) != self.stamps[shard]:
            raise CheckpointError(
                f"{path}: changed while it was read.", hint="Let whoever writes the base finish, then merge again."
            )

    def as_dict(self, out: Path) -> dict[str, Any]:
        """As JSON, for a merge into ``out``."""
        options = {k: v for k, v in asdict(self.options).items() if k in ("dtype", "device", "jobs")}
        return {
            "out": str(out),
            **options,
            "adapters": [{"name": g.name, "weight": g.weight} for g in self.given],
            "tensors": sum(len(entries) for entries in self.shards.values()),
            "adapted": sorted(self.tallies),
            "shards": {name: sum(entry_bytes(e) for e in entries.values()) for name, entries in self.shards.items()},
            "files": [str(path) for path in self.files],
            "left_out": list(self.left_out),
            "bytes": self.need,
            "computed_bytes": self.computed,
            "finished_bytes": 0 if self.options.fresh else finished_bytes(out, self.key),
            "space_bytes": self.space(out),
            "free_bytes": shutil.disk_usage(_folder(out)).free,
            "memory_bytes": self.memory,
            "partial": str(partial_path(out, self.key)),
        }

    def lines(self, out: Path) -> list[str]:
        """For people."""
        found = self.as_dict(out)
        left = found["space_bytes"] - found["finished_bytes"]
        lines = [f"{name}  {size:,} bytes" for name, size in found["shards"].items()]
        names = ", ".join(f"{g.name} × {g.weight:g}" for g in self.given)
        size = f"{found['bytes']:,} bytes, {found['computed_bytes']:,} of them computed"
        lines += [
            f"Would merge {names} into {out}: {found['tensors']} tensors, {len(self.tallies)} of them adapted.",
            f"{size}; {found['free_bytes']:,} bytes are free.",
            f"{self.jobs} of {len(self.shards)} shards at once, in about {self.memory / 1e6:,.0f} MB of memory.",
        ]
        if found["space_bytes"] < found["bytes"]:
            lines.append(f"They take {found['space_bytes']:,} bytes of the disk: the rest is shared with the base.")
        if found["finished_bytes"]:
            lines.append(f"{found['finished_bytes']:,} bytes are there from a run that was cut short: it would go on.")
        if left > found["free_bytes"]:
            lines.append(f"Too little space: {left:,} bytes are needed.")
        return lines


def plan_merge(base: str | Path, adapters: Sequence[str], options: MergeOptions) -> MergePlan:
    """Open everything, check that it fits, and work out what would be written; see `merging.merge_adapters`."""
    checkpoint = open_checkpoint(base)
    stamps = {name: _stamp(shard.path) for name, shard in checkpoint.shards.items()}
    fingerprint = options.require_fingerprint
    given = _given(named_paths(adapters), checkpoint, options.weights, require_fingerprint=fingerprint)
    device = chosen_device(options.device)
    jobs = min(options.jobs or cores(), len(checkpoint.shards))
    owner, replaced = _head(given, options.head)
    integral = options.dtype == "int8"
    dtype = "keep" if integral else options.dtype
    threads = max(1, cores() // jobs)
    made, tallies, untied = changed_tensors(checkpoint, given, dtype, device=device, integral=integral, threads=threads)
    made |= replaced_tensors(replaced, dtype)
    task = task_of(checkpoint, made, given, owner, untied=untied)
    config = task.config if task is not None else dict(checkpoint.config)
    if dtype != "keep":
        config = _typed(config, dtype)
    shards = shard_entries(checkpoint, made, task, dtype)
    if integral:
        config = {**config, "quantization_config": merging_integers.quantization(shards)}
    files, left_out = _files(checkpoint)
    settled = MergeOptions(options.weights, options.dtype, device, options.head, fingerprint, jobs, options.fresh)
    return MergePlan(checkpoint, tuple(given), settled, owner, task, config, shards, tallies, files, left_out, stamps)


def _given(
    paths: Mapping[str, Path], checkpoint: Checkpoint, weights: Sequence[float], *, require_fingerprint: bool
) -> list[Given]:
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
    return [Given(n, w, f) for n, w, f in zip(paths, factors, fitted, strict=True)]


def chosen_device(device: str) -> str:
    """``cpu`` or ``cuda`` for ``cpu``, ``cuda`` or ``auto``.

    Raises:
        DependencyError: CUDA asked for where there is none.
    """
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


def _head(given: Sequence[Given], wanted: str | None) -> tuple[Given | None, Mapping[str, ReplacedModule]]:
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


def _typed(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: dtype}


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _folder(out: Path) -> Path:
    """The innermost folder above ``out`` that exists."""
    return next(folder for folder in out.absolute().parents if folder.exists())

"""Merge adapters into a checkpoint: stream shards, add ΔW in float32, round once, say how much survived.

The model is never in memory. Several shards are written at once, each by the kernel but for its adapted tensors, which
are made in blocks of rows in their place (`checkpoints.writer`, `jobs.rounding`), and each is fsynced once, when it
is whole. A journal keeps what is finished (`checkpoints.resumable`): a merge that was killed goes on where it was.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ssh_deploy.checkpoints.copying import copy_into
from ssh_deploy.checkpoints.index import INDEX, contained
from ssh_deploy.checkpoints.resumable import JOURNAL, Partial, resumable_folder
from ssh_deploy.checkpoints.whole import refuse_existing, system_errors_of
from ssh_deploy.checkpoints.writer import entry_bytes, write_shard
from ssh_deploy.jobs.merge_entries import Given, index_of
from ssh_deploy.jobs.merge_plan import MergeOptions, MergePlan, plan_merge
from ssh_deploy.jobs.merge_report import UNVERIFIED, VERIFIED, MergedAdapter, MergeReport, SiteReport
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.rounding import Tally, survival


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
    jobs: int | None = None,
    fresh: bool = False,
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
        jobs: shards at once; None: as many as there are cores.
        fresh: begin anew where the same merge was killed before.
        progress: told of bytes written.

    Raises:
        AdapterFileError, AdapterMismatchError, CheckpointError, FingerprintError: something does not fit, or the base
            changed while it was read.
        UnknownNameError: ``head`` names none of the adapters.
        OutputError: ``out`` exists or cannot be written.
    """
    began = time.perf_counter()
    out = Path(out)
    refuse_existing(out)  # before any work
    options = MergeOptions(weights, dtype, device, head, require_fingerprint, jobs, fresh)
    plan = plan_merge(base, adapters, options)
    with system_errors_of(out):
        space = plan.space(out)
    with resumable_folder(out, key=plan.key, need=space, fresh=fresh) as partial:
        resumed = [name for name in plan.shards if name in partial.finished]
        for name in resumed:
            for tensor, sums in partial.finished[name]["tallies"].items():
                plan.tallies[tensor].add(Tally((), **sums))
        count = _Count(plan.need, progress, sum(_size(plan, name) for name in resumed))
        _write_shards(plan, partial, count)
        _write_rest(plan, partial.folder, count)
        written = sorted(p for p in partial.folder.rglob("*") if p.is_file() and p.name != JOURNAL)
        size = sum(p.stat().st_size for p in written)
        names = tuple(str(p.relative_to(partial.folder)) for p in written)
    task = plan.task
    return MergeReport(
        out=str(out),
        dtype=dtype,
        adapters=tuple(_merged_adapter(g) for g in plan.given),
        head=plan.owner.name if plan.owner is not None else None,
        sites=tuple(_site(tensor, tally) for tensor, tally in sorted(plan.tallies.items())),
        survival=survival(plan.tallies.values()),
        renamed=sum(a != b for a, b in task.names.items()) if task is not None else 0,
        dropped=task.dropped if task is not None else (),
        files=names,
        left_out=plan.left_out,
        bytes=size,
        changed_bytes=plan.computed,
        resumed=tuple(resumed),
        infinite=tuple(sorted(name for name, tally in plan.tallies.items() if tally.infinite)),
        seconds=round(time.perf_counter() - began, 3),
    )


class _StoppedError(Exception):
    """Internal: another shard failed."""


class _Count:
    """Bytes written by all threads together; ends them when one of them has failed."""

    def __init__(self, total: int, progress: Progress, done: int) -> None:
        self.stopped = False
        self._total, self._progress, self._done, self._lock = total, progress, done, threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            if self.stopped:
                raise _StoppedError
            self._done += count
            self._progress("merge", min(self._done, self._total), self._total)


def _write_shards(plan: MergePlan, partial: Partial, count: _Count) -> None:
    def write(name: str) -> None:
        plan.refuse_changed(name)
        write_shard(partial.folder / name, plan.checkpoint.shards[name], plan.shards[name], advance=count)
        plan.refuse_changed(name)
        partial.finish(name, {"tallies": {tensor: plan.tallies[tensor].sums() for tensor in plan.tensors_of(name)}})

    with ThreadPoolExecutor(plan.jobs, thread_name_prefix="shard") as pool:
        futures = [pool.submit(write, name) for name in plan.shards if name not in partial.finished]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            count.stopped = True
            pool.shutdown(cancel_futures=True)
            raise


def _write_rest(plan: MergePlan, folder: Path, count: _Count) -> None:
    """Everything but the shards."""
    base = plan.checkpoint
    for relative in plan.files:
        if str(relative) not in ("config.json", INDEX):
            copy_into(contained(base.folder, relative), folder / relative, advance=count)
    if plan.config == base.config:
        copy_into(contained(base.folder, Path("config.json")), folder / "config.json", advance=count)
    else:
        _write_json(folder / "config.json", plan.config)
    if base.index is not None:
        _write_json(folder / INDEX, index_of(base.index, plan.shards))


def _size(plan: MergePlan, shard: str) -> int:
    return sum(entry_bytes(entry) for entry in plan.shards[shard].values())


def _merged_adapter(given: Given) -> MergedAdapter:
    adapter = given.fitted.adapter
    base = VERIFIED if given.fitted.verified else UNVERIFIED
    return MergedAdapter(given.name, given.weight, adapter.family, adapter.digest, base)


def _site(tensor: str, tally: Tally) -> SiteReport:
    return SiteReport(tensor, tally.adapters, tally.largest, tally.delta**0.5, tally.survival, tally.unchanged)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

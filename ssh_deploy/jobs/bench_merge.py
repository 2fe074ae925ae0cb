"""`bench merge`: a merge beside a plain copy of the same files, and beside PEFT's merge of the model in memory.

Each is a process of its own, watched from outside: its wall time, the most memory it ever had (VmHWM) and the most
that was its own (anonymous, sampled). A round runs a copy (`cp -r --reflink=never`, then `sync -f`), the transforms
of all adapted weights, and a merge, in random order, with the base in the page cache and nothing left to write back.
``over_cp`` is merge / (copy + transforms) of the same round. PEFT's time counts from behind its imports until all is
on the disk, and so does the merge's where both are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.errors import OutputError, UnknownNameError, VerificationError, near_misses
from ssh_deploy.jobs.bench_checkpoint import SyntheticBase, build_base
from ssh_deploy.jobs.benching import Bench, describe_machine
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.timing import median_interval
from ssh_deploy.transforms.cpu import add_synthesis

PARTS = ("copy", "peft")
COLUMNS = ("gigabytes", "variant", "seconds", "inside", "ratio", "low", "high", "peak_mb", "anonymous_mb", "rounds")
_LOOK = 0.01  # seconds between two looks at a process's memory
_MERGE = """
import json, sys, time
from ssh_deploy.jobs.merging import merge_adapters
base, adapter, out, jobs = sys.argv[1:]
began = time.perf_counter()
merge_adapters(base, [adapter], out, jobs=int(jobs) or None)
print(json.dumps(time.perf_counter() - began))
"""
_PEFT = """
import json, os, sys, time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
os.sync()
print(json.dumps(time.perf_counter() - began))
"""


@dataclass(frozen=True, slots=True)
class MergeBenchOptions:
    """What `bench merge` measures.

    Attributes:
        gigabytes: of the checkpoint; several sizes one after the other, the summary is of the first.
        parts: of `PARTS`.
        rounds: of copy and merge; `peft_rounds` of PEFT's way.
        jobs: shards at once; None: as many as there are cores.
    """

    gigabytes: tuple[float, ...] = (4.0,)
    parts: tuple[str, ...] = PARTS
    rounds: int = 5
    peft_rounds: int = 2
    jobs: int | None = None


@dataclass(slots=True)
class _Runs:
    """What several runs of one variant took: seconds of each, inside and outside, and the most memory in bytes."""

    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    peak: int = 0
    anonymous: int = 0


def measure_merge(
    work: Path,
    *,
    options: MergeBenchOptions | None = None,
    progress: Progress = silent,
    grown: Callable[[Bench], None] = lambda bench: None,
) -> Bench:
    """Measure what ``options`` say, with checkpoints kept under ``work`` for the next time.

    Raises:
        UnknownNameError: a part that is none.
        OutputError: ``work`` cannot be written, or its disk cannot hold base and result; a process failed.
        VerificationError: the merged checkpoint is wrong: nothing is timed then.
    """
    options = options or MergeBenchOptions()
    strange = next((part for part in options.parts if part not in PARTS), None)
    if strange is not None:
        raise UnknownNameError(f"No part {strange!r} of bench merge.", hint=near_misses(strange, PARTS))
    bench = Bench("merge", describe_machine())
    for size in options.gigabytes:
        base = build_base(work, size, progress=progress)
        out = work / "out"
        _refuse_small_disk(work, base.nbytes)
        try:
            merged = _merge(base, out, options.jobs, _Runs())
            check_merged(base, merged)
            ours = _copy(bench, base, out, options, progress) if "copy" in options.parts else None
            grown(bench)
            if "peft" in options.parts:
                _peft(bench, base, out, options, progress, ours)
                grown(bench)
        finally:
            _clear(out)
    return bench


def check_merged(base: SyntheticBase, out: Path) -> None:
    """Adapted weights are the float64 sum rounded once (but for a few ties); all else is the base's, byte for byte.

    Raises:
        VerificationError: which tensor is not.
    """
    before, after = open_checkpoint(base.folder), open_checkpoint(out)
    for name in before.names():
        old, new = before.read(name), after.read(name)
        delta = base.deltas.get(name.removesuffix(".weight"))
        if delta is None:
            right = bool(np.array_equal(_bits(old), _bits(new)))
        else:
            rows = np.r_[:128, old.shape[0] - 128 : old.shape[0]]  # its first and its last: float64 is slow
            axis, whole = delta.axis, np.zeros(delta.shape)
            whole[delta.rows, delta.cols] = delta.values
            exact = delta.gain * axis.inverse_cpu(axis.inverse_cpu(whole, 0)[rows], 1)
            want = old[rows].astype(np.float64) + exact
            off = np.abs(new[rows].astype(np.float64) - want) > 2.0**-8 * np.abs(want) + 1e-7  # half a step of bf16
            other = np.count_nonzero(new[rows] != want.astype(new.dtype))  # float32 is another side of a few ties
            right = bool(not off.any() and other <= 1e-3 * want.size and not np.array_equal(_bits(old), _bits(new)))
        before.shards[before.places[name]].forget()
        after.shards[after.places[name]].forget()
        if not right:
            raise VerificationError(f"{name} of the merged checkpoint is wrong.", hint="Report this.")


def _copy(bench: Bench, base: SyntheticBase, out: Path, options: MergeBenchOptions, progress: Progress) -> _Runs:
    """Rounds of copy, transforms and merge; what the merges took."""
    ours, copy, transforms = _Runs(), _Runs(), []
    rng = np.random.default_rng(0)
    for done in range(options.rounds):
        _warm(base.folder)
        took = {}
        for step in rng.permutation(["copy", "merge", "transforms"]).tolist():
            if step == "transforms":
                transforms.append(_transforms(base))
                continue
            _clear(out)
            if step == "merge":
                _merge(base, out, options.jobs, ours)
            else:
                words = ["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync -f "$1"', str(base.folder), str(out)]
                took[step] = _watched(words, copy)
        progress(f"copy and merge {base.gigabytes:g} GB", done + 1, options.rounds)
    over = [m / (c + t) for m, c, t in zip(ours.seconds, copy.seconds, transforms, strict=True)]
    size = base.gigabytes
    _row(bench, size, "cp + sync", copy)
    bench.results.append(
        {"gigabytes": size, "variant": "transforms", "seconds": round(statistics.median(transforms), 4),
         "rounds": len(transforms)}
    )  # fmt: skip
    low, high = median_interval(over)
    ratio = round(statistics.median(over), 4)
    _row(bench, size, "merge", ours, ratio=ratio, low=round(low, 4), high=round(high, 4))
    if "over_cp" not in bench.summary:
        bench.summary |= {"over_cp": ratio, "peak_rss_mb": _mb(ours.anonymous)}
    return ours


def _peft(
    bench: Bench, base: SyntheticBase, out: Path, options: MergeBenchOptions, progress: Progress, ours: _Runs | None
) -> None:
    """PEFT's way beside ours, each from behind its imports until all is on the disk."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    cached = 2.5 * base.nbytes
    if cached > free + _cached():
        bench.notes.append(f"{base.gigabytes:g} GB: PEFT's way does not fit in memory.")
        return
    theirs, ours = _Runs(), ours or _Runs()
    for done in range(options.peft_rounds):
        for ran, runs in ((_peft_merge, theirs), (_merge, ours)):
            _warm(base.folder)
            _clear(out)
            ran(base, out, options.jobs, runs)
        progress(f"PEFT {base.gigabytes:g} GB", done + 1, options.peft_rounds)
    speedup = statistics.median(theirs.inside) / statistics.median(ours.inside)
    _row(bench, base.gigabytes, "peft", theirs, inside=round(statistics.median(theirs.inside), 3))
    _row(bench, base.gigabytes, "merge beside peft", ours, inside=round(statistics.median(ours.inside), 3))
    if "speedup_vs_peft" not in bench.summary:
        bench.summary |= {
            "speedup_vs_peft": round(speedup, 3),
            "memory_vs_peft": round(theirs.peak / ours.peak, 3),
        }


def _merge(base: SyntheticBase, out: Path, jobs: int | None, runs: _Runs) -> Path:
    words = [sys.executable, "-c", _MERGE, str(base.folder), str(base.adapter), str(out), str(jobs or 0)]
    _watched(words, runs, inside=True)
    return out


def _peft_merge(base: SyntheticBase, out: Path, jobs: int | None, runs: _Runs) -> Path:
    del jobs
    words = [sys.executable, "-c", _PEFT, str(base.folder), str(base.peft), str(out), str(os.cpu_count() or 1)]
    _watched(words, runs, inside=True)
    return out


def _transforms(base: SyntheticBase) -> float:
    """Seconds of ``W += ΔW`` of every adapted weight, float32 in memory."""
    weights = {delta.shape: np.zeros(delta.shape, np.float32) for delta in base.deltas.values()}
    began = time.perf_counter()
    for delta in base.deltas.values():
        add_synthesis(weights[delta.shape], delta.axis, delta.separable(), gain=delta.gain)
    return time.perf_counter() - began


def _watched(words: Sequence[str], runs: _Runs, *, inside: bool = False) -> float:
    """Run a process to its end; its seconds, and the most memory it had, go into ``runs``."""
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        while process.poll() is None:
            for line in _status(process.pid):
                if line.startswith("VmHWM:"):
                    runs.peak = max(runs.peak, int(line.split()[1]) * 1024)
                elif line.startswith("RssAnon:"):
                    runs.anonymous = max(runs.anonymous, int(line.split()[1]) * 1024)
            try:
                process.wait(_LOOK)
            except subprocess.TimeoutExpired:
                continue
        seconds = time.perf_counter() - began
        said, wrong = process.communicate()
    if process.returncode:
        last = (wrong.strip().splitlines() or ["it says nothing"])[-1]
        raise OutputError(f"A process of the bench ended with {process.returncode}: {last}", hint="See what it says.")
    runs.seconds.append(seconds)
    if inside:
        runs.inside.append(float(json.loads(said.strip().splitlines()[-1])))
    return seconds


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _row(bench: Bench, size: float, variant: str, runs: _Runs, **more: float) -> None:
    about = {"gigabytes": size, "variant": variant, "seconds": round(statistics.median(runs.seconds), 3)}
    memory = {"peak_mb": _mb(runs.peak), "anonymous_mb": _mb(runs.anonymous)}
    bench.results.append(about | more | memory | {"rounds": len(runs.seconds)})


def _mb(size: int) -> float:
    return round(size / 1e6, 1)


def _cached() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Cached:"))
    except (OSError, StopIteration, ValueError):
        return 0


def _bits(tensor: Any) -> Any:
    return tensor.view(np.uint8)


def _warm(folder: Path) -> None:
    """Read every file, so that it is in the page cache."""
    buffer = bytearray(1 << 24)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _clear(out: Path) -> None:
    """Remove a result and have everything written back that still is to be."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def _refuse_small_disk(work: Path, need: int) -> None:
    free = shutil.disk_usage(work).free
    if need > free:
        raise OutputError(
            f"{work}: {need:,} bytes are needed for a result, {free:,} are free.", hint="Give another folder: --work."
        )

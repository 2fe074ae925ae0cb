"""Timing that can be trusted: variants run in turn, ratios pair by pair, repeated until their interval is narrow.

A machine's speed drifts by more than the effects that are measured here. So every round runs each variant once, in
a new random order, and a ratio is the median over rounds of variant / base *of the same round*. Its interval is the
percentile bootstrap of that median (Efron and Tibshirani 1993, chapter 13). Rounds go on until every interval is
narrow enough, or the time is up: then the interval says how much the figure is worth.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ssh_deploy.jobs.progress import Progress, silent

#: What is timed; round ``i`` is passed, so that a variant may use another session or another adapter each time.
Variant = Callable[[int], object]
#: Rounds before the first look at the intervals.
LEAST_ROUNDS = 8
# Seconds after which threads of what ran before have stopped waiting for more: onnxruntime's do so in a loop for some
# 40 ms, and take a core from whoever comes next.
_SPIN = 0.1
_DRAWS = 1000
_LOOK_AGAIN = 1.25  # a look costs as much as many rounds: the next comes after a quarter more of them


@dataclass(frozen=True, slots=True)
class Timed:
    """One variant beside the base: ``ms`` median, ``ratio`` median of the pairs, ``low`` to ``high`` 95 %.

    ``cpu_ratio``: likewise, of processor time; ``difference_ms``: median of variant − base, pair by pair.
    """

    name: str
    ms: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    difference_ms: float
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


def spun_down(variant: Variant, i: int, *, seconds: float = _SPIN) -> None:
    """Run ``variant`` until the threads of what ran before have stopped, once at least."""
    until = time.perf_counter() + seconds
    variant(i)
    while time.perf_counter() < until:
        variant(i)


def interleaved(
    variants: Mapping[str, Variant],
    *,
    base: str,
    seconds: float = 600.0,
    width: float = 0.01,
    least: int = LEAST_ROUNDS,
    seed: int = 0,
    progress: Progress = silent,
    stage: str = "time",
    before: Mapping[str, Variant] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, Timed]:
    """Time ``variants`` in turn until each ratio's 95 % interval is narrower than ``width``, or ``seconds`` are up.

    Args:
        variants: by name; each is called once before anything counts.
        base: name of what the others are divided by.
        seconds: most time, of all rounds together; ``least`` rounds are run in any case.
        width: of the interval, as a part of the base.
        least: rounds before the first look at the intervals.
        seed: of the order and of the bootstrap.
        progress: told of rounds as seconds spent.
        stage: what to tell it.
        before: what is called, untimed, right before a variant. A model that ran last finds its weights in the cache:
            where variants are of different sessions, each must be given that, or none.
        clock: of wall time, in seconds.
        cpu_clock: of processor time, in seconds.
    """
    rng = np.random.default_rng(seed)
    names = list(variants)
    for name in names:
        variants[name](0)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    started, rounds, look = clock(), 0, least
    while True:
        for i in rng.permutation(len(names)).tolist():
            name = names[i]
            if before and name in before:
                before[name](rounds)
            begun, cpu_begun = clock(), cpu_clock()
            variants[name](rounds)
            ended, cpu_ended = clock(), cpu_clock()
            wall[name].append(ended - begun)
            cpu[name].append(cpu_ended - cpu_begun)
        rounds += 1
        spent = clock() - started
        progress(stage, int(min(spent, seconds) * 1000), int(seconds * 1000))
        if rounds < least:
            continue
        if spent >= seconds:
            break
        if rounds >= look:
            if _settled(wall, base, width, seed):
                break
            look = math.ceil(rounds * _LOOK_AGAIN)
    progress(stage, int(seconds * 1000), int(seconds * 1000))
    return {name: _timed(name, wall, cpu, base, seed) for name in names}


def median_interval(values: Sequence[float], *, seed: int = 0, draws: int = _DRAWS) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median of ``values``."""
    sample = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(seed).integers(0, sample.size, (draws, sample.size))
    low, high = np.percentile(np.median(sample[picked], axis=1), [2.5, 97.5])
    return float(low), float(high)


def _settled(wall: Mapping[str, Sequence[float]], base: str, width: float, seed: int) -> bool:
    for name, values in wall.items():
        if name != base:
            low, high = median_interval(_ratios(values, wall[base]), seed=seed)
            if high - low >= width:
                return False
    return True


def _timed(
    name: str, wall: Mapping[str, Sequence[float]], cpu: Mapping[str, Sequence[float]], base: str, seed: int
) -> Timed:
    ratios = _ratios(wall[name], wall[base])
    low, high = median_interval(ratios, seed=seed)
    return Timed(
        name,
        ms=1e3 * statistics.median(wall[name]),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        cpu_ratio=statistics.median(_ratios(cpu[name], cpu[base])),
        difference_ms=1e3 * statistics.median(a - b for a, b in zip(wall[name], wall[base], strict=True)),
        rounds=len(ratios),
    )


def _ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a / b if b else 1.0 for a, b in zip(values, base, strict=True)]

"""Many threads at once on one deployment, every answer checked: what `ssh-deploy bench soak` does.

A few dozen synthetic adapters answer alone first: that is what each content must give. Then threads run mixed
batches and sums while they load, unload, pin, replace names and rewrite the files under them, within a budget that
holds only half of the contents. A name that is replaced while a batch runs may answer with the content of before or
after, never with any other; once a replacement has returned, never again with the old.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.file import write_file
from ssh_deploy.errors import DeploymentError, UnknownNameError
from ssh_deploy.graph.spectral_rows import AXES
from ssh_deploy.jobs.probing import probe_feeds
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.synthetic import synthetic_adapter
from ssh_deploy.runtimes.deployment import Deployment

_CONTENTS, _STABLE, _NAMES, _TEXTS, _ROWS, _TOKENS = 24, 3, 8, 4, 4, 8
_WIDTH = 256  # coefficients of a row: a sum of two adapters must fit
_TOLERANCE = 1e-4  # of the largest number; mixed rows agree with single runs to 1e-5, other contents differ by far more
_STALLED = 60.0  # seconds without a step of some thread
_MARK = 0.2  # minute 2 of 10

Answer = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class SoakReport:
    """What happened; ``wrong`` and ``errors`` describe the first few, ``counts`` are of successful steps.

    ``rss_mark`` and ``rss_end``: resident bytes of the process at a fifth of the time and at its end, 0 where the
    system does not tell.
    """

    folder: str
    minutes: float
    threads: int
    seed: int
    counts: Mapping[str, int]
    answers: int
    wrong_answers: int
    wrong: tuple[str, ...]
    errors: tuple[str, ...]
    stalled: tuple[str, ...]
    rss_mark: int
    rss_end: int

    @property
    def growth(self) -> float:
        """Of resident memory, from the mark to the end."""
        return self.rss_end / self.rss_mark - 1 if self.rss_mark else 0.0

    @property
    def good(self) -> bool:
        """No wrong answer, no unexpected error, no thread stuck; memory is for the caller to judge."""
        return not (self.wrong_answers or self.errors or self.stalled)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"growth": round(self.growth, 5), "good": self.good}

    def lines(self) -> list[str]:
        """For people."""
        did = ", ".join(f"{count:,} {what}" for what, count in sorted(self.counts.items()))
        found = f"{self.wrong_answers:,} wrong, {len(self.errors)} errors, {len(self.stalled)} threads stuck"
        mark, end = self.rss_mark / 2**20, self.rss_end / 2**20
        return [
            f"{self.minutes:g} minutes, {self.threads} threads, seed {self.seed}: {did}",
            f"{self.answers:,} answers checked, {found}",
            f"memory {mark:,.1f} MiB at a fifth of the time, {end:,.1f} MiB at the end ({self.growth:+.1%})",
            *self.wrong,
            *self.errors,
            *self.stalled,
        ]


def soak(
    folder: str | Path, *, minutes: float, threads: int = 16, seed: int = 0, progress: Progress | None = None
) -> SoakReport:
    """Run the soak on an exported ``folder`` with slots.

    Args:
        folder: as exported; nothing in it is changed.
        minutes: of the part with all threads.
        threads: that use the deployment at once.
        seed: of adapters and of what the threads do.
        progress: told every second.

    Raises:
        DeploymentError: a folder without slots for spectra, or adapters too much alike to be told apart.
    """
    with tempfile.TemporaryDirectory(prefix="ssh-deploy-soak-") as work:
        scene = _prepare(Path(folder), Path(work), seed)
        with Deployment.open(folder, threads=1, memory=scene.budget, max_coefficients=_WIDTH) as deployment:
            return _Soak(deployment, scene, seed).run(str(folder), minutes, threads, progress or silent)


@dataclass(slots=True, eq=False)
class _Name:
    """A name whose content changes; ``lock`` is its writers', readers only look."""

    name: str
    path: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    history: list[int] = field(default_factory=list)  # contents it was given, in order
    floor: int = 0  # index of the oldest that may still answer
    there: bool = False
    changes: int = 0  # of being there
    from_path: bool = False  # its source is `path`


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """Files of all contents, the feeds, and what each content, sum (stable, content) and the base must answer."""

    files: tuple[Path, ...]
    headed: tuple[bool, ...]
    feeds: Mapping[str, NDArray[Any]]
    expected: Mapping[Any, Answer]
    budget: int
    work: Path


def _prepare(folder: Path, work: Path, seed: int) -> _Scene:
    """Write the adapters and let each answer alone."""
    files, headed = [], []
    with Deployment.open(folder, threads=1, max_coefficients=_WIDTH) as deployment:
        fit = deployment.how_many_fit()
        if not set(fit.adapter_bytes) & set(AXES):
            raise DeploymentError(f"{folder}: no slots for spectra.", hint="Export with `--kinds hartley`, `--sites`.")
        for i in range(_CONTENTS):
            # only a base with a head answers for those without; the stable ones lend theirs to sums
            bare = bool(deployment.folder.labels) and i % 3 == 2 and i >= _STABLE
            labels = 0 if bare or not fit.head_bytes else 2 + i % 4
            adapter = synthetic_adapter(deployment, seed=seed * 1000 + i, most=_WIDTH // 2, labels=labels)
            files.append(work / f"content{i}.safetensors")
            headed.append(bool(labels))
            write_file(adapter, files[i])
            deployment.load(f"c{i}", files[i])
        feeds = probe_feeds(deployment.folder, deployment.inputs, rows=_TEXTS, tokens=_TOKENS, seed=seed)
        expected: dict[Any, Answer] = {i: deployment.run(feeds, f"c{i}") for i in range(_CONTENTS)}
        expected[None] = deployment.run(feeds)
        for i in range(_STABLE):
            for j in range(_CONTENTS):
                expected[i, j] = deployment.run(feeds, _sum(f"c{i}", f"c{j}", headed[i]))
    _require_apart(folder, expected)
    row = max(fit.adapter_bytes.values()) + fit.head_bytes
    return _Scene(tuple(files), tuple(headed), feeds, expected, row * (_CONTENTS // 2), work)


def _sum(first: str, second: str, headed: bool) -> str:
    return f"{first}+0.5*{second}" + (f"@head={first}" if headed else "")


def _require_apart(folder: Path, expected: Mapping[Any, Answer]) -> None:
    answers = list(expected.items())
    for i, (one, a) in enumerate(answers):
        for other, b in answers[:i]:
            if all(_agree({k: v[row] for k, v in a.items()}, b, row) for row in range(_TEXTS)):
                raise DeploymentError(
                    f"{folder}: synthetic adapters {one} and {other} answer alike.", hint="Try another seed."
                )


def _agree(got: Answer, want: Answer, row: int) -> bool:
    """Whether the outputs ``got`` of one row are those of row ``row`` of ``want``; labels beyond are −∞."""
    for name, array in want.items():
        mine, width = got[name], array.shape[-1]
        if mine.shape[-1] < width or not (mine[..., width:] == -np.inf).all():
            return False
        size = max(1.0, float(np.abs(array[row]).max(initial=0)))
        if not np.abs(mine[..., :width] - array[row]).max(initial=0) <= _TOLERANCE * size:
            return False
    return True


class _Soak:
    def __init__(self, deployment: Deployment, scene: _Scene, seed: int) -> None:
        self._deployment, self._scene, self._seed = deployment, scene, seed
        self._names = [_Name(f"name{i}", scene.work / f"name{i}.safetensors") for i in range(_NAMES)]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._steps: dict[str, float] = {}
        self._answers = self._wrong_answers = 0
        self._wrong: list[str] = []
        self._errors: list[str] = []

    def run(self, folder: str, minutes: float, threads: int, tell: Progress) -> SoakReport:
        for i in range(_STABLE):
            self._deployment.load(f"stable{i}", self._scene.files[i])
        for name in self._names:
            self._replace(name, np.random.default_rng(self._seed))
        workers = [threading.Thread(target=self._work, args=(i,), name=f"soak{i}", daemon=True) for i in range(threads)]
        begun, end = time.monotonic(), time.monotonic() + 60 * minutes
        self._steps = dict.fromkeys((worker.name for worker in workers), begun)
        samples: list[tuple[float, int]] = []
        for worker in workers:
            worker.start()
        while (now := time.monotonic()) < end and not self._stuck(now):
            samples.append(((now - begun) / (60 * minutes), _resident()))
            tell("soaking", int(now - begun), int(60 * minutes))
            time.sleep(min(1.0, 0.6 * minutes, max(end - now, 0)))
        self._stop.set()
        deadline = time.monotonic() + _STALLED
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        stalled = sorted({*self._stuck(time.monotonic()), *(w.name for w in workers if w.is_alive())})
        return SoakReport(
            folder=folder,
            minutes=minutes,
            threads=threads,
            seed=self._seed,
            counts=dict(self._counts),
            answers=self._answers,
            wrong_answers=self._wrong_answers,
            wrong=tuple(self._wrong),
            errors=tuple(self._errors),
            stalled=tuple(stalled),
            rss_mark=_around(samples, _MARK),
            rss_end=_around(samples, 1.0),
        )

    def _stuck(self, now: float) -> list[str]:
        return [] if self._stop.is_set() else [n for n, then in list(self._steps.items()) if now - then > _STALLED]

    def _work(self, number: int) -> None:
        rng = np.random.default_rng([self._seed, number])
        steps: list[tuple[str, float, Callable[[np.random.Generator], None]]] = [
            ("runs", 0.64, self._run),
            ("loads and replacements", 0.2, lambda rng: self._replace(self._pick(rng), rng)),
            ("unloads", 0.04, self._unload),
            ("pins", 0.06, self._pin),
            ("unpins", 0.06, lambda rng: self._deployment.unpin(f"stable{rng.integers(_STABLE)}")),
        ]
        while not self._stop.is_set():
            what, _, step = steps[rng.choice(len(steps), p=[share for _, share, _ in steps])]
            try:
                step(rng)
            except Exception as error:  # whatever a thread meets is a finding, and the others go on
                with self._lock:
                    if len(self._errors) < 20:
                        self._errors.append(f"{what}: {type(error).__name__}: {error}")
            with self._lock:
                self._counts[what] = self._counts.get(what, 0) + 1
            self._steps[threading.current_thread().name] = time.monotonic()

    def _pick(self, rng: np.random.Generator) -> _Name:
        return self._names[rng.integers(_NAMES)]

    def _run(self, rng: np.random.Generator) -> None:
        """A batch, or one adapter for all of it; each row must answer with what its name could mean meanwhile."""
        rows = int(rng.integers(1, _ROWS + 1))
        asked = [self._ask(rng) for _ in range(1 if rng.random() < 0.2 else rows)] or [(None, None, None)]
        asked = asked * rows if len(asked) == 1 else asked
        texts = rng.integers(0, _TEXTS, rows)
        before = [(n, n.floor, n.there, n.changes) for n in {name for _, _, name in asked if name is not None}]
        feeds = {key: array[texts] for key, array in self._scene.feeds.items()}
        try:
            answers = self._deployment.run(feeds, [text for text, _, _ in asked])
        except UnknownNameError:
            if not any(not there or name.changes != changes for name, _, there, changes in before):
                raise
            return
        floors = {name.name: floor for name, floor, _, _ in before}
        for i, (text, stable, name) in enumerate(asked):
            contents = [None] if name is None else name.history[floors[name.name] :]
            keys = [stable if name is None else c if stable is None else (stable, c) for c in contents]
            mine = {key: array[i] for key, array in answers.items()}
            good = any(_agree(mine, self._scene.expected[key], int(texts[i])) for key in keys)
            with self._lock:
                self._answers += 1
                self._wrong_answers += not good
                if not good and len(self._wrong) < 20:
                    self._wrong.append(f"row {i} of {[t for t, _, _ in asked]}: {text} is none of {keys}")

    def _ask(self, rng: np.random.Generator) -> tuple[str | None, int | None, _Name | None]:
        """What a row asks for, and the stable content and the changing name in it."""
        which, stable, name = rng.random(), int(rng.integers(_STABLE)), self._pick(rng)
        if which < 0.1 and (self._deployment.folder.labels or not any(self._scene.headed)):
            return None, None, None
        if which < 0.3:
            return f"stable{stable}", stable, None
        if which < 0.5:
            return _sum(f"stable{stable}", name.name, self._scene.headed[stable]), stable, name
        return name.name, None, name

    def _replace(self, name: _Name, rng: np.random.Generator) -> None:
        """Give ``name`` another content: by loading a file, or by a new file in the place of the one it has."""
        content, how = int(rng.integers(_CONTENTS)), rng.random()
        with name.lock:
            name.history.append(content)
            source = self._scene.files[content]
            if how < 0.6:
                draft = name.path.with_suffix(".new")
                shutil.copy(source, draft)
                os.replace(draft, name.path)  # noqa: PTH105 - what a user's script does
                source = name.path
            if how >= 0.6 or not name.from_path or not name.there:
                self._deployment.load(name.name, source)
                name.from_path = source == name.path
                name.there = True
                name.changes += 1
            name.floor = len(name.history) - 1

    def _unload(self, rng: np.random.Generator) -> None:
        name = self._pick(rng)
        with name.lock:
            if not name.there:
                return
            name.changes += 1
            name.there = False
            try:
                self._deployment.unload(name.name, timeout=0 if rng.random() < 0.5 else None)
            except DeploymentError as error:
                if "in use" not in str(error):
                    raise
                name.there = True

    def _pin(self, rng: np.random.Generator) -> None:
        self._deployment.pin(f"stable{rng.integers(_STABLE)}")


def _resident() -> int:
    """Bytes of this process that are in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _around(samples: list[tuple[float, int]], when: float) -> int:
    """Median of the samples nearest to the share ``when`` of the time."""
    near = sorted(samples, key=lambda sample: abs(sample[0] - when))[: max(1, len(samples) // 20)]
    return int(statistics.median(size for _, size in near)) if near else 0

"""Answer texts with an exported folder, each with its own adapter: what `ssh-deploy run` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy.errors import DeploymentError
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.runtimes.answers import Prediction
from ssh_deploy.runtimes.budget import DEFAULT_MEMORY, HowManyFit
from ssh_deploy.runtimes.deployment import Deployment


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One text's answer: a `Prediction`, or the hidden state float32 [tokens, hidden] of a model without a head."""

    text: str
    adapter: str | None
    value: Any

    def as_dict(self) -> dict[str, Any]:
        """For JSON: label, score and logits by label, or the mean of the hidden state over its tokens."""
        head = {"text": self.text, "adapter": self.adapter}
        if isinstance(self.value, Prediction):
            logits = dict(zip(self.value.labels, map(float, self.value.logits), strict=True))
            return head | {"label": self.value.label, "score": self.value.score, "logits": logits}
        mean = self.value.mean(axis=0, dtype=np.float64)
        return head | {"tokens": int(self.value.shape[0]), "mean": [float(x) for x in mean]}

    def line(self) -> str:
        """For people: what was answered, by which adapter, to which text."""
        if isinstance(self.value, Prediction):
            said = f"{self.value.label} {self.value.score:.3f}"
        else:
            said = f"{len(self.value)} tokens"
        return f"{said}  [{self.adapter or 'base'}]  {self.text}"


@dataclass(frozen=True, slots=True, eq=False)
class RunReport:
    """Answers in the order of the texts, and the seconds that opening and answering took."""

    folder: Path
    answers: tuple[Answer, ...]
    open_seconds: float
    answer_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.folder),
            "answers": [answer.as_dict() for answer in self.answers],
            "open_seconds": round(self.open_seconds, 4),
            "answer_seconds": round(self.answer_seconds, 4),
        }

    def lines(self) -> list[str]:
        """For people: a line per text."""
        return [answer.line() for answer in self.answers]


def answer_texts(
    folder: str | Path,
    texts: Sequence[str],
    *,
    adapters: Sequence[str | None] = (),
    loads: Sequence[tuple[str, Path]] = (),
    threads: int | None = None,
    memory: int | str = DEFAULT_MEMORY,
    max_coefficients: int | None = None,
    max_rank: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> RunReport:
    """Open ``folder`` and answer ``texts``.

    Args:
        folder: as exported.
        texts: at least one.
        adapters: none: the base for all; one: for all; else one per text (None: the base).
        loads: (name, path) of adapters outside the folder to load first.
        threads: of one operator.
        memory: that resident adapters may take.
        max_coefficients: of the widest adapter; None: the widest of the folder's.
        max_rank: of low-rank adapters and reflections, likewise.
        batch_size: most texts of one run.
        progress: told after each batch.

    Raises:
        DeploymentError: no texts, or as many adapters as there are not texts.
        UnknownNameError: an adapter that is not there.
    """
    tell = progress or silent
    if not texts:
        raise DeploymentError("There is no text to answer.", hint="Give --text TEXT, or lines with --stdin.")
    names = spread(adapters, len(texts))
    begun = time.perf_counter()
    with Deployment.open(
        folder, threads=threads, memory=memory, max_coefficients=max_coefficients, max_rank=max_rank
    ) as deployment:
        for name, path in loads:
            deployment.load(name, path)
        opened = time.perf_counter()
        values: list[Any] = []
        for start in range(0, len(texts), batch_size):
            stop = start + batch_size
            values += deployment.predict(texts[start:stop], names[start:stop], batch_size=batch_size)
            tell("answering", len(values), len(texts))
    answers = tuple(Answer(*row) for row in zip(texts, names, values, strict=True))
    return RunReport(Path(folder), answers, opened - begun, time.perf_counter() - opened)


def spread(adapters: Sequence[str | None], texts: int) -> list[str | None]:
    """``adapters`` as one name (None: the base) for each of ``texts``: none, one for all, or one each.

    Raises:
        DeploymentError: another number of them.
    """
    if len(adapters) not in (0, 1, texts):
        raise DeploymentError(
            f"{len(adapters)} adapters for {texts} texts.", hint="Give one for all, or one for each text in order."
        )
    return list(adapters) if len(adapters) == texts else list(adapters or [None]) * texts


def measure_fit(
    folder: str | Path, *, memory: int | str, max_coefficients: int | None = None, max_rank: int | None = None
) -> HowManyFit:
    """How many adapters ``memory`` holds when ``folder`` is served with it; what `--how-many-fit` prints.

    ``max_coefficients`` and ``max_rank``: of `Deployment.open`.

    Raises:
        DeploymentError: no exported folder, or less memory than one adapter takes.
    """
    with Deployment.open(
        folder, threads=1, memory=memory, max_coefficients=max_coefficients, max_rank=max_rank
    ) as deployment:
        return deployment.how_many_fit()

"""Go on from prompts with an exported folder, each with its own adapter: what `ssh-deploy run --prompt` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssh_deploy.errors import DeploymentError
from ssh_deploy.jobs.running import spread
from ssh_deploy.runtimes.budget import DEFAULT_MEMORY
from ssh_deploy.runtimes.deployment import Deployment
from ssh_deploy.runtimes.generator import DEFAULT_TOKENS
from ssh_deploy.runtimes.requests import Generation
from ssh_deploy.runtimes.sampling import Sampling

#: Told as text comes: the number of the prompt, and what follows what was told before.
Said = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """Answers in the order of the prompts, and the seconds that opening and answering took."""

    folder: Path
    prompts: tuple[str, ...]
    answers: tuple[Generation, ...]
    open_seconds: float
    answer_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = zip(self.prompts, self.answers, strict=True)
        tokens = sum(len(answer.tokens) for answer in self.answers)
        return {
            "folder": str(self.folder),
            "answers": [
                {
                    "prompt": prompt,
                    "adapter": answer.adapter,
                    "text": answer.text,
                    "finish": answer.finish,
                    "prompt_tokens": answer.prompt_tokens,
                    "tokens": list(answer.tokens),
                    "seed": answer.seed,
                }
                for prompt, answer in rows
            ],
            "open_seconds": round(self.open_seconds, 4),
            "answer_seconds": round(self.answer_seconds, 4),
            "tokens_per_second": round(tokens / self.answer_seconds, 2),
        }


def generate_texts(
    folder: str | Path,
    prompts: Sequence[str],
    *,
    adapters: Sequence[str | None] = (),
    loads: Sequence[tuple[str, Path]] = (),
    chat: bool = False,
    max_new_tokens: int = DEFAULT_TOKENS,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    threads: int | None = None,
    memory: int | str = DEFAULT_MEMORY,
    rows: int = 32,
    said: Said | None = None,
    max_coefficients: int | None = None,
    max_rank: int | None = None,
) -> GenerateReport:
    """Open ``folder`` and go on from ``prompts``, all in one batch.

    Args:
        folder: as exported, of a decoder.
        prompts: at least one.
        adapters: none: the base for all; one: for all; else one per prompt (None: the base).
        loads: (name, path) of adapters outside the folder to load first.
        chat: prompts are what the user says, in the model's chat template.
        max_new_tokens: of each answer, at most.
        sampling: the same for all; None: the best token each time.
        stop: strings that end an answer.
        threads: of one operator.
        memory: that resident adapters may take.
        rows: most prompts at a time.
        said: told each prompt's text as it comes; a later prompt's when those before it have ended.
        max_coefficients: of `Deployment.open`.
        max_rank: likewise.

    Raises:
        DeploymentError: no prompts, an empty or too long one, a folder of another task, as many adapters as there are
            not prompts.
        UnknownNameError: an adapter that is not there.
    """
    if not prompts:
        raise DeploymentError("There is no prompt to go on from.", hint="Give --prompt TEXT, or lines with --stdin.")
    names = spread(adapters, len(prompts))
    begun = time.perf_counter()
    with (
        Deployment.open(
            folder, threads=threads, memory=memory, max_coefficients=max_coefficients, max_rank=max_rank
        ) as deployment,
        deployment.generator(rows=rows) as generator,
    ):
        for name, path in loads:
            deployment.load(name, path)
        opened = time.perf_counter()
        streams = [
            generator.submit(prompt, name, chat=chat, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        for i, stream in enumerate(streams):
            for event in stream:
                if said is not None and event.text:
                    said(i, event.text)
        answers = tuple(stream.result() for stream in streams)
    return GenerateReport(
        Path(folder), tuple(prompts), answers, opened - begun, max(time.perf_counter() - opened, 1e-9)
    )

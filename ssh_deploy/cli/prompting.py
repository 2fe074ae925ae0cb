"""Options of `ssh-deploy run` that go on from prompts, and how the text is shown while it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ssh_deploy.cli.output import show

F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--prompt", "prompts", multiple=True, help="A text to go on from; may be given several times."),
    click.option("--chat", is_flag=True, help="Prompts are what the user says, in the model's chat template."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of each answer (default: 128)."),
    click.option("--temperature", type=float, help="0 takes the best token (default), more draws."),
    click.option("--top-k", type=int, help="Draw from so many of the likeliest tokens (default: all)."),
    click.option("--top-p", type=float, help="Draw from the likeliest of this probability (default: 1, all)."),
    click.option("--seed", type=int, help="Of the draws; the same seed gives the same text."),
    click.option("--stop", multiple=True, help="A text that ends an answer; may be given several times."),
)


def prompt_options(function: F) -> F:
    """Add the options that `generate` takes as ``prompting``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def generate(as_json: bool, out: Path, names: tuple[str, ...], prompting: dict[str, Any], **options: Any) -> None:
    """Go on from the prompts in ``prompting``, printing text as it comes; with several, under a line for each."""
    from ssh_deploy.jobs.generating import generate_texts
    from ssh_deploy.runtimes.sampling import Sampling

    given = {key: value for key, value in prompting.items() if value is not None}
    sampling = Sampling(**{key: given.pop(key) for key in ("temperature", "top_k", "top_p", "seed") if key in given})
    prompts, shown = given.pop("prompts"), [-1]

    def say(row: int, text: str) -> None:
        if row != shown[0] and len(prompts) > 1:
            adapter = (names * len(prompts))[row] if names else "base"
            click.echo(f"{'' if shown[0] < 0 else chr(10)}[{adapter}]  {prompts[row]}")
        shown[0] = row
        click.echo(text, nl=False)

    report = generate_texts(
        out, prompts, adapters=names, sampling=sampling, said=None if as_json else say, **given, **options
    )
    show(as_json, report.as_dict(), [""])

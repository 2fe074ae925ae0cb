"""`ssh-deploy run`: answer texts, or go on from prompts, with an exported folder, each with its own adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ssh_deploy.cli.output import json_option, progress_bar, show
from ssh_deploy.cli.prompting import generate, prompt_options


@click.command("run")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, help="One for all texts, or one per text; a+0.5*b is a sum.")
@click.option("--base", is_flag=True, help="Answer with no adapter.")
@click.option("--text", "texts", multiple=True, help="A text to answer; may be given several times.")
@prompt_options
@click.option("--stdin", is_flag=True, help="Read further texts or prompts from standard input, one a line.")
@click.option("--load", "loads", multiple=True, metavar="NAME=PATH", help="Load an adapter that is not in the folder.")
@click.option("--memory", default="1GiB", show_default=True, help="What resident adapters may take.")
@click.option("--max-coefficients", "width", type=click.IntRange(1), help="Widest adapter (default: the folder's).")
@click.option("--max-rank", "rank", type=click.IntRange(1), help="Highest rank (default: the folder's, or 16).")
@click.option("--how-many-fit", "fits", is_flag=True, help="Say how many adapters fit in --memory; answer nothing.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of one operator (default: all cores).")
@json_option
def command(
    out: Path, adapters: tuple[str, ...], base: bool, texts: tuple[str, ...], stdin: bool, loads: tuple[str, ...],
    memory: str, width: int | None, rank: int | None, fits: bool, threads: int | None, as_json: bool, **prompting: Any,
) -> None:  # fmt: skip
    """Answer texts, or go on from prompts, with the exported folder OUT, each with its own adapter."""
    prompted = any(prompting.values()) or prompting["seed"] is not None
    if fits and (base or adapters or texts or stdin or loads or prompted):
        raise click.UsageError("--how-many-fit answers no texts: give it --memory and --max-… alone.")
    if not fits and base == bool(adapters):
        raise click.UsageError("Give --adapter NAME, or --base to answer with no adapter; not both.")
    if texts and prompted:
        raise click.UsageError("--text is answered as a whole, --prompt is gone on from: give one of the two.")
    if not (fits or texts or stdin or prompting["prompts"]):
        raise click.UsageError("Give --text TEXT, --prompt TEXT, or --stdin.")
    if any("=" not in load for load in loads):
        raise click.UsageError("--load takes NAME=PATH.")
    from ssh_deploy.jobs.running import answer_texts, measure_fit

    options: dict[str, Any] = {"memory": memory, "max_coefficients": width, "max_rank": rank}
    if fits:
        fit = measure_fit(out, **options)
        show(as_json, fit.as_dict(), fit.lines())
        return
    lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()] if stdin else []
    options |= {"loads": [(a, Path(b)) for a, _, b in (load.partition("=") for load in loads)], "threads": threads}
    if prompted:
        prompting["prompts"] = [*prompting["prompts"], *lines]
        generate(as_json, out, adapters, prompting, **options)
        return
    with progress_bar(as_json) as progress:
        report = answer_texts(out, [*texts, *lines], adapters=adapters, progress=progress, **options)
    show(as_json, report.as_dict(), report.lines())

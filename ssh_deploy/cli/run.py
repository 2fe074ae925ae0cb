"""`ssh-deploy run`: answer texts with an exported folder, each with its own adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ssh_deploy.cli.output import json_option, progress_bar, show


@click.command("run")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, help="One for all texts, or one per --text; a+0.5*b is a sum.")
@click.option("--base", is_flag=True, help="Answer with no adapter.")
@click.option("--text", "texts", multiple=True, help="A text to answer; may be given several times.")
@click.option("--stdin", is_flag=True, help="Read further texts from standard input, one a line.")
@click.option("--load", "loads", multiple=True, metavar="NAME=PATH", help="Load an adapter that is not in the folder.")
@click.option("--memory", default="1GiB", show_default=True, help="What resident adapters may take.")
@click.option("--max-coefficients", type=click.IntRange(min=1), help="Widest adapter (default: the folder's widest).")
@click.option("--how-many-fit", is_flag=True, help="Say how many adapters fit in --memory, and answer nothing.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of one operator (default: all cores).")
@json_option
def command(
    out: Path,
    adapters: tuple[str, ...],
    base: bool,
    texts: tuple[str, ...],
    stdin: bool,
    loads: tuple[str, ...],
    memory: str,
    max_coefficients: int | None,
    how_many_fit: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer texts with the exported folder OUT, each with its own adapter."""
    if how_many_fit and (base or adapters or texts or stdin or loads):
        raise click.UsageError("--how-many-fit answers no texts: give it --memory and --max-coefficients alone.")
    if not how_many_fit and base == bool(adapters):
        raise click.UsageError("Give --adapter NAME, or --base to answer with no adapter; not both.")
    if not how_many_fit and not texts and not stdin:
        raise click.UsageError("Give --text TEXT, or --stdin.")
    if any("=" not in load for load in loads):
        raise click.UsageError("--load takes NAME=PATH.")
    from ssh_deploy.jobs.running import answer_texts, measure_fit

    if how_many_fit:
        fit = measure_fit(out, memory=memory, max_coefficients=max_coefficients)
        show(as_json, fit.as_dict(), fit.lines())
        return
    lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()] if stdin else []
    pairs = [(name, Path(path)) for name, _, path in (load.partition("=") for load in loads)]
    with progress_bar(as_json) as progress:
        report = answer_texts(
            out, [*texts, *lines], adapters=adapters, loads=pairs, threads=threads, memory=memory,
            max_coefficients=max_coefficients, progress=progress,
        )  # fmt: skip
    show(as_json, report.as_dict(), report.lines())

"""`ssh-deploy run`: answer texts with an exported folder, each with its own adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ssh_deploy.cli.output import json_option, progress_bar, show


@click.command("run")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, help="One for all texts, or one per --text in order.")
@click.option("--base", is_flag=True, help="Answer with no adapter.")
@click.option("--text", "texts", multiple=True, help="A text to answer; may be given several times.")
@click.option("--stdin", is_flag=True, help="Read further texts from standard input, one a line.")
@click.option("--load", "loads", multiple=True, metavar="NAME=PATH", help="Load an adapter that is not in the folder.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of one operator (default: all cores).")
@json_option
def command(
    out: Path,
    adapters: tuple[str, ...],
    base: bool,
    texts: tuple[str, ...],
    stdin: bool,
    loads: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer texts with the exported folder OUT, each with its own adapter."""
    if base == bool(adapters):
        raise click.UsageError("Give --adapter NAME, or --base to answer with no adapter; not both.")
    if not texts and not stdin:
        raise click.UsageError("Give --text TEXT, or --stdin.")
    if any("=" not in load for load in loads):
        raise click.UsageError("--load takes NAME=PATH.")
    from ssh_deploy.jobs.running import answer_texts

    lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()] if stdin else []
    pairs = [(name, Path(path)) for name, _, path in (load.partition("=") for load in loads)]
    with progress_bar(as_json) as progress:
        report = answer_texts(out, [*texts, *lines], adapters=adapters, loads=pairs, threads=threads, progress=progress)
    show(as_json, report.as_dict(), report.lines())

"""What commands print: one JSON object or lines for people, progress on stderr."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ssh_deploy.jobs.progress import Progress, silent

if TYPE_CHECKING:
    from ssh_deploy.jobs.benching import Bench

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add ``--json`` (parameter ``as_json``)."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(function)


def show(as_json: bool, result: dict[str, Any], lines: list[str]) -> None:
    """Print ``result`` as one JSON object, or ``lines``."""
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        for line in lines:
            click.echo(line)


@contextmanager
def progress_bar(as_json: bool, *, unit: str = "") -> Iterator[Progress]:
    """A `Progress` that draws on stderr when that is a terminal; silent with ``--json``.

    ``unit="bytes"``: what is counted are bytes, told with their rate.
    """
    if as_json or not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    sizes = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else ()
    with Bars(*columns, *sizes, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def run_bench(
    measure: Callable[..., Bench], columns: Sequence[str], *, work: str | None, out: str | None, as_json: bool
) -> None:
    """Run a bench that keeps files in a folder, and print it.

    Args:
        measure: takes that folder, ``progress`` and ``grown``, which is told of the bench after each part.
        columns: of the table for people.
        work: the folder; None: one for this run.
        out: JSON file to write after each part.
        as_json: print one JSON object.
    """
    place = nullcontext(work) if work else tempfile.TemporaryDirectory(prefix="ssh-deploy-bench-")
    with place as folder, progress_bar(as_json) as progress:
        keep = (lambda bench: bench.write(Path(out))) if out else (lambda bench: None)
        bench = measure(Path(folder), progress=progress, grown=keep)
    show(as_json, bench.as_dict(), bench.lines(columns))

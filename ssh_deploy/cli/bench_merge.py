"""`ssh-deploy bench merge`: a merge beside a copy of the same files and PEFT's merge in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from ssh_deploy.cli.output import json_option, run_bench

_QUICK: dict[str, Any] = {"gigabytes": (0.03,), "rounds": 1, "peft_rounds": 1}


@click.command("merge")
@click.option("--gigabytes", multiple=True, type=click.FloatRange(0.01), help="Of the base; repeatable; default 4.")
@click.option("--only", "parts", multiple=True, help="copy or peft; repeatable; default both.")
@click.option("--rounds", type=click.IntRange(1), help="Of copy and merge; default 5.")
@click.option("--peft-rounds", type=click.IntRange(1), help="Of PEFT's way; default 2.")
@click.option("--jobs", type=click.IntRange(1), help="Shards at once; default one for each core.")
@click.option("--work", type=click.Path(file_okay=False), help="Folder to keep checkpoints in: twice the gigabytes.")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file to write after each part.")
@click.option("--quick", is_flag=True, help="A small checkpoint, one round: does it run?")
@json_option
def command(work: str | None, out: str | None, quick: bool, as_json: bool, **given: Any) -> None:
    """Measure a merge of a synthetic LLaMA: against cp, and against PEFT's merge_and_unload."""
    from ssh_deploy.jobs.bench_merge import COLUMNS, MergeBenchOptions, measure_merge

    options = MergeBenchOptions(**((_QUICK if quick else {}) | {key: value for key, value in given.items() if value}))
    measure = partial(measure_merge, options=options)
    run_bench(measure, COLUMNS, work=work, out=out, as_json=as_json)

"""`ssh-deploy merge`: adapters into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ssh_deploy.cli.output import json_option, progress_bar, show


@click.command("merge")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--out", required=True, type=click.Path(), help="New folder; must not exist.")
@click.option("--weight", "weights", multiple=True, type=float, help="Factor on an adapter's ΔW; once per adapter.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "float16", "bfloat16", "int8"]),
    default="keep",
    show_default=True,
    help="Of every float tensor written; int8: of weights trained as integers.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where ΔW is computed.")
@click.option("--head", metavar="NAME|none", help="Whose head to write, where adapters bring different ones.")
@click.option("--require-fingerprint", is_flag=True, help="Refuse adapters that do not say which base is theirs.")
@click.option("--jobs", type=click.IntRange(1), help="Shards at once; default one for each core.")
@click.option("--fresh", is_flag=True, help="Begin anew where the same command was killed before.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
@json_option
def command(base: str, adapters: tuple[str, ...], out: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Merge ADAPTERs (PATH or NAME=PATH) into BASE (a folder or hub id), shard by shard.

    A merge that was killed goes on where it was when the same command is given again.
    """
    from ssh_deploy.jobs.merge_plan import MergeOptions, plan_merge
    from ssh_deploy.jobs.merging import merge_adapters

    if dry_run:
        plan = plan_merge(base, adapters, MergeOptions(**options))
        show(as_json, plan.as_dict(Path(out)), plan.lines(Path(out)))
        return
    with progress_bar(as_json, unit="bytes") as progress:
        report = merge_adapters(base, adapters, out, progress=progress, **options)
    show(as_json, report.as_dict(), report.lines())

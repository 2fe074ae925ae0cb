"""`ssh-deploy merge`: adapters into a checkpoint."""

from __future__ import annotations

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
@json_option
def command(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    weights: tuple[float, ...],
    dtype: str,
    device: str,
    head: str | None,
    require_fingerprint: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTERs (PATH or NAME=PATH) into BASE (a folder or hub id), shard by shard."""
    from ssh_deploy.jobs.merging import merge_adapters

    with progress_bar(as_json) as progress:
        report = merge_adapters(
            base,
            adapters,
            out,
            weights=weights,
            dtype=dtype,
            device=device,
            head=head,
            require_fingerprint=require_fingerprint,
            progress=progress,
        )
    show(as_json, report.as_dict(), report.lines())

"""`ssh-deploy verify`: torch against a merged checkpoint or an exported folder."""

from __future__ import annotations

from pathlib import Path

import click

from ssh_deploy.cli.output import json_option, progress_bar, show


@click.command("verify")
@click.argument("base")
@click.argument("adapter")
@click.argument("target")
@click.option("--texts", type=click.Path(), help="UTF-8 file, one text a line; random token rows without it.")
@json_option
@click.pass_context
def command(ctx: click.Context, base: str, adapter: str, target: str, texts: str | None, as_json: bool) -> None:
    """Compare BASE + ADAPTER in torch with TARGET: a merged checkpoint or an exported folder."""
    from ssh_deploy.jobs.verifying import read_texts, verify_target

    rows = read_texts(Path(texts)) if texts is not None else []
    with progress_bar(as_json) as progress:
        verdict = verify_target(base, adapter, target, texts=rows, progress=progress)
    show(as_json, verdict.as_dict(), verdict.lines())
    if not verdict.ok:
        ctx.exit(1)

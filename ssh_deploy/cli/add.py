"""`ssh-deploy add`: an adapter into an exported folder."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, show


@click.command("add")
@click.argument("folder", metavar="OUT")
@click.argument("adapter", metavar="[NAME=]ADAPTER")
@json_option
def command(folder: str, adapter: str, as_json: bool) -> None:
    """Add ADAPTER to the exported folder OUT, without exporting again."""
    from ssh_deploy.jobs.editing import add_adapter

    report = add_adapter(folder, adapter)
    note = "" if report.verified else " (base unverified)"
    show(as_json, report.as_dict(), [f"{report.out}: added {report.name}{note}; it has {', '.join(report.adapters)}"])

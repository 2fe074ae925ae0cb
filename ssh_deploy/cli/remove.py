"""`ssh-deploy remove`: an adapter out of an exported folder."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, show


@click.command("remove")
@click.argument("folder", metavar="OUT")
@click.argument("name")
@json_option
def command(folder: str, name: str, as_json: bool) -> None:
    """Remove the adapter NAME from the exported folder OUT."""
    from ssh_deploy.jobs.editing import remove_adapter

    report = remove_adapter(folder, name)
    left = ", ".join(report.adapters) or "none"
    show(as_json, report.as_dict(), [f"{report.out}: removed {report.name}; left: {left}"])

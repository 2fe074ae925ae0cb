"""`ssh-deploy plugins`: installed families, where they come from and what can be done with them."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, show


@click.command("plugins")
@json_option
def command(as_json: bool) -> None:
    """List the families of adapters that are installed: read from where, merged, put into slots, trained by what."""
    from ssh_deploy.jobs.listing import list_families

    found = list_families()
    show(as_json, found.as_dict(), found.lines())

"""`ssh-deploy plugins`: installed families, where they come from and what can be done with them."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, show


@click.command("plugins")
@click.option(
    "--peft-types", is_flag=True, help="Every type of PEFT instead: the family that reads it, or why none can."
)
@json_option
def command(peft_types: bool, as_json: bool) -> None:
    """List the families of adapters that are installed: read from where, merged, put into slots, trained by what."""
    from ssh_deploy.jobs.listing import list_families, list_peft_types

    found = list_peft_types() if peft_types else list_families()
    show(as_json, found.as_dict(), found.lines())

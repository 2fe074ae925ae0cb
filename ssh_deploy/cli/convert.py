"""`ssh-deploy convert`: PEFT folder to compact file, and back."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, show


@click.command("convert")
@click.argument("source", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="New file or folder; must not exist.")
@click.option("--to", "form", type=click.Choice(["file", "peft"]), help="Default: the other form than SOURCE's.")
@click.option(
    "--values", type=click.Choice(["float16", "float32"]), default="float16", show_default=True, help="In a file."
)
@click.option("--base", help="Folder or hub id it was trained on: gives shapes, and its fingerprint is stored.")
@click.option("--name", help="Name of the base to store.")
@click.option("--task", type=click.Choice(["feature-extraction", "text-classification", "causal-lm"]))
@click.option("--labels", metavar="A,B,C", help="Class names, in the order of the head's rows.")
@json_option
def command(
    source: str,
    out: str,
    form: str | None,
    values: str,
    base: str | None,
    name: str | None,
    task: str | None,
    labels: str | None,
    as_json: bool,
) -> None:
    """Turn the adapter SOURCE into a compact file or a PEFT folder."""
    from ssh_deploy.jobs.converting import convert_adapter

    names = [label.strip() for label in labels.split(",")] if labels is not None else None
    done = convert_adapter(source, out, form=form, values=values, base=base, base_name=name, task=task, labels=names)
    show(as_json, done.as_dict(), done.lines())

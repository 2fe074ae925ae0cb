"""`ssh-deploy convert`: an adapter into another form (file, PEFT folder, rows of a graph) or another kind."""

from __future__ import annotations

from typing import Any

import click

from ssh_deploy.cli.output import json_option, show

_FORMS = ["file", "peft", "ssh", "sdctft", "lora", "onnx-adapter"]


@click.command("convert")
@click.argument("source", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="New file or folder; must not exist.")
@click.option("--to", "form", type=click.Choice(_FORMS), help="Default: the other of file and peft than SOURCE is.")
@click.option("--coefficients", type=int, help="Of each matrix, for ssh (default 750) and sdctft (700).")
@click.option("--energy", type=float, help="Instead: as many, or as high a rank, as hold this share of ΔW's energy.")
@click.option("--rank", type=int, help="For lora; default: that of ΔW.")
@click.option("--min-energy", type=float, help="Refuse to keep less of ΔW's energy; default 0.5.")
@click.option("--transform", type=click.Choice(["hartley", "hartley-joint"]), help="For ssh; default hartley.")
@click.option("--for", "folder", type=click.Path(), help="Exported folder whose graph an onnx-adapter is for.")
@click.option(
    "--values", type=click.Choice(["float16", "float32"]), default="float16", show_default=True, help="In a file."
)
@click.option("--base", help="Folder or hub id it was trained on: gives shapes, and its fingerprint is stored.")
@click.option("--name", "base_name", help="Name of the base to store.")
@click.option("--task", type=click.Choice(["feature-extraction", "text-classification", "causal-lm"]))
@click.option("--labels", metavar="A,B,C", help="Class names, in the order of the head's rows.")
@json_option
def command(source: str, out: str, labels: str | None, as_json: bool, **given: Any) -> None:
    """Turn the adapter SOURCE into another form (file, peft, onnx-adapter) or kind (ssh, sdctft, lora).

    Another kind keeps the strongest coefficients, or the best product, of each matrix's change; what share of its
    energy that is, is printed. Spectra go into a compact file where OUT ends in .safetensors, else into a folder.
    """
    from ssh_deploy.jobs.converting import convert_adapter

    names = [label.strip() for label in labels.split(",")] if labels is not None else None
    done = convert_adapter(source, out, labels=names, **given)
    show(as_json, done.as_dict(), done.lines())

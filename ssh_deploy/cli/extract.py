"""`ssh-deploy extract`: an adapter out of a fully fine-tuned checkpoint."""

from __future__ import annotations

from typing import Any

import click

from ssh_deploy.cli.output import json_option, progress_bar, show


@click.command("extract")
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--out", required=True, type=click.Path(), help="New file or folder; must not exist.")
@click.option("--to", "kind", type=click.Choice(["ssh", "sdctft", "lora"]), default="ssh", show_default=True)
@click.option("--coefficients", type=int, help="Of each matrix, for ssh (default 750) and sdctft (700).")
@click.option("--energy", type=float, help="Instead: as many, or as high a rank, as hold this share of ΔW's energy.")
@click.option("--rank", type=int, help="For lora; default 16.")
@click.option("--min-energy", type=float, help="Refuse to keep less of ΔW's energy; default 0.5.")
@click.option("--transform", type=click.Choice(["hartley", "hartley-joint"]), help="For ssh; default hartley.")
@click.option("--tolerance", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Of what is left out.")
@click.option("--ignore", is_flag=True, help="Leave out what no adapter can hold, however much it is.")
@click.option(
    "--values", type=click.Choice(["float16", "float32"]), default="float16", show_default=True, help="In a file."
)
@json_option
def command(base: str, tuned: str, out: str, as_json: bool, **given: Any) -> None:
    """Write what the checkpoint TUNED changed of BASE (folders or hub ids) as an adapter.

    Embeddings, norms and biases have no place in one: they are named with their share of the energy of all changes,
    and more than --tolerance of it is refused. Heads come along whole.
    """
    from ssh_deploy.jobs.extracting import extract_adapter

    with progress_bar(as_json) as progress:
        done = extract_adapter(base, tuned, out, progress=progress, **given)
    show(as_json, done.as_dict(), done.lines())

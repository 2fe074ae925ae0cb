"""`ssh-deploy bench`: a table of measurements, each imported only when it runs."""

from __future__ import annotations

import click

from ssh_deploy.cli.main import CommandTable

BENCHES: dict[str, tuple[str, str]] = {
    "bank": ("ssh_deploy.cli.bench_bank", "A bank of adapters beside the plain model and LoRA."),
    "decode": ("ssh_deploy.cli.bench_decode", "A language model with adapters, token by token."),
    "transform": ("ssh_deploy.cli.bench_transform", "W += ΔW out of a spectrum, beside PEFT, torch and memcpy."),
    "merge": ("ssh_deploy.cli.bench_merge", "A merge beside a copy of the same files and PEFT's way."),
    "soak": ("ssh_deploy.cli.bench_soak", "Many threads on one deployment, every answer checked."),
}


@click.command("bench", cls=CommandTable, table=BENCHES)
def command() -> None:
    """Measure; ratios are medians of interleaved pairs. `--json` prints machine, results and summary."""

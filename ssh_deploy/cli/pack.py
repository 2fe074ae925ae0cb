"""`ssh-deploy pack`: many adapters of a folder as one bank file."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, show


@click.command("pack")
@click.argument("folder", metavar="OUT")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("-o", "--out", required=True, type=click.Path(), help="NAME.onnx_adapter; NAME.json beside it.")
@json_option
def command(folder: str, names: tuple[str, ...], out: str, as_json: bool) -> None:
    """Pack adapters of the exported folder OUT (all without NAMEs) for stock onnxruntime, fed with adapter_ids."""
    from ssh_deploy.jobs.packing import pack_adapters

    report = pack_adapters(folder, names, out)
    lines = [f"{report.bank}: {report.bytes / 1e3:.1f} kB, ids in {report.index}"]
    for name, ids in report.ids.items():
        lines.append(f"  {name}: " + ", ".join(f"{key} {row}" for key, row in ids.items()))
    show(as_json, report.as_dict(), lines)

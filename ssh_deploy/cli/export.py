"""`ssh-deploy export`: a base and its adapters to an ONNX folder."""

from __future__ import annotations

from typing import Any

import click

from ssh_deploy.cli.output import json_option, progress_bar, show


@click.command()
@click.option("--onnx", is_flag=True, required=True, help="Export to ONNX (the one target so far).")
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[NAME=]ADAPTER...")
@click.option("-o", "--out", required=True, type=click.Path(), help="New folder.")
@click.option("--task", default="auto", show_default=True, help="feature-extraction, text-classification, causal-lm, image-classification.")
@click.option("--mode", type=click.Choice(["sidecar", "merged"]), default="sidecar", show_default=True, help="Slots for adapters, or ΔW in the weights.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Of stored weights.")
@click.option("--adapter-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True, help="Of adapter values.")
@click.option("--opset", type=int, default=20, show_default=True)
@click.option("--adapter-inputs", type=click.Choice(["optional", "required"]), default="optional", show_default=True, help="required: for bindings that drop optional inputs.")
@click.option("--sites", multiple=True, help="Reserve slots: attention, linear or a glob of modules. May be repeated.")
@click.option("--kinds", default="", help="Reserve kinds of slots: hartley,cosine,head.")
@click.option("--weight", "weights", multiple=True, type=float, help="Of each adapter, with --mode merged.")
@click.option("--head", default=None, help="Adapter whose head a merged graph has, or none.")
@click.option("--require-fingerprint", is_flag=True, help="Refuse adapters that do not store their base's fingerprint.")
@json_option
def command(onnx: bool, base: str, adapters: tuple[str, ...], out: str, kinds: str, as_json: bool, **options: Any) -> None:
    """Export BASE with ADAPTERS to an ONNX folder, validated against torch."""
    del onnx
    from ssh_deploy.jobs.exporting import ExportOptions, export_model

    chosen = ExportOptions(kinds=tuple(k for k in kinds.split(",") if k), **options)
    with progress_bar(as_json) as progress:
        report = export_model(base, adapters, out, options=chosen, progress=progress)
    lines = [f"{report.out}: {report.base}, {report.task}, {report.mode}, {report.bytes / 1e6:.1f} MB"]
    if report.mode == "sidecar":
        lines.append(f"{report.sites} sites with slots for {', '.join(report.kinds) or 'nothing'}")
    for name, checked in report.validation.items():
        lines.append(f"  {name or 'no adapter'}: within {checked.max_abs_diff:.1e} of torch")
    show(as_json, report.as_dict(), lines + [f"note: {note}" for note in report.notes])

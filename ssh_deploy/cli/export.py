"""`ssh-deploy export`: a base and its adapters to an ONNX folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ssh_deploy.cli.output import json_option, progress_bar, show

F = TypeVar("F", bound=Callable[..., Any])
_TASKS = ["auto", "feature-extraction", "text-classification", "image-classification", "text-generation"]


def _choice(name: str, *values: str, text: str) -> Callable[[F], F]:
    return click.option(name, type=click.Choice(values), default=values[0], show_default=True, help=text)


@click.command("export")
@click.option("--onnx", is_flag=True, required=True, help="Export to ONNX (the one target so far).")
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[NAME=]ADAPTER...")
@click.option("-o", "--out", required=True, type=click.Path(), help="New folder; must not exist.")
@_choice("--task", *_TASKS, text="What the graph answers.")
@_choice("--mode", "sidecar", "merged", text="Slots for adapters, or ΔW added to the weights.")
@_choice("--builder", "torch", "genai", text="Who writes the graph; genai: decoders that onnxruntime-genai runs too.")
@_choice("--dtype", "float32", "float16", text="Of stored weights; runs compute in float32.")
@_choice("--quantize", "none", "int8", "int4", text="The base's linear layers; adapters stay exact.")
@click.option("--block", type=int, default=32, show_default=True, help="Weights that share a scale, with --quantize.")
@click.option(
    "--calibrate",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Rows of 256 tokens that a decoder writes for int4's rounding (GPTQ); 0: to the nearest.",
)
@_choice("--adapter-dtype", "float16", "float32", text="Of adapter values.")
@click.option("--opset", type=int, default=20, show_default=True, help="Of ONNX.")
@_choice("--adapter-inputs", "optional", "required", text="required: for bindings that drop optional inputs.")
@click.option("--sites", multiple=True, help="Reserve slots: attention, linear or a glob of modules; repeatable.")
@click.option("--kinds", default="", help="Reserve slots: hartley,cosine,lowrank,sparse,diagonal,reflection,head.")
@click.option("--weight", "weights", multiple=True, type=float, help="Of each adapter, with --mode merged.")
@click.option("--head", metavar="NAME|none", help="Whose head a merged graph has.")
@click.option("--require-fingerprint", is_flag=True, help="Refuse adapters that do not say which base is theirs.")
@json_option
def command(base: str, adapters: tuple[str, ...], out: str, kinds: str, as_json: bool, **options: Any) -> None:
    """Export BASE (a folder or hub id) with ADAPTERs to an ONNX folder, validated against torch."""
    from ssh_deploy.jobs.exporting import ExportOptions, export_model

    del options["onnx"]
    chosen = ExportOptions(kinds=tuple(kind for kind in kinds.split(",") if kind), **options)
    with progress_bar(as_json) as progress:
        report = export_model(base, adapters, out, options=chosen, progress=progress)
    show(as_json, report.as_dict(), report.lines())

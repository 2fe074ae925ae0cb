"""`ssh-deploy bench decode`: a language model with adapters, token by token, beside LoRA and PEFT in torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from ssh_deploy.cli.output import json_option, run_bench

_QUICK: dict[str, Any] = {"shape": "pico", "seconds": 0.2, "sessions": 1, "openings": 1, "context": 4, "prompt": 8}


@click.command("decode")
@click.argument("base", required=False)
@click.option("--shape", help="smollm2-135m (default) or pico, with random weights, where no BASE is given.")
@click.option("--precision", "precisions", multiple=True, help="f32, int8 or int4; repeatable; default all.")
@click.option("--only", "parts", multiple=True, help="decode, mixed, prefill, speedup, lora, peft, memory; repeatable.")
@click.option("--seconds", type=click.FloatRange(0.1), help="Most time for each group of variants; default 120.")
@click.option("--sessions", type=click.IntRange(1), help="Of base and of ours that take turns; default 2.")
@click.option("--openings", type=click.IntRange(1), help="Times at least that they are opened; default 3.")
@click.option("--threads", type=click.IntRange(1), help="Of one operator; default all cores.")
@click.option("--work", type=click.Path(file_okay=False), help="Folder to keep exports and adapter files in (4 GB).")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file to write after each part.")
@click.option("--quick", is_flag=True, help="A tiny shape: does it run?")
@json_option
def command(base: str | None, work: str | None, out: str | None, quick: bool, as_json: bool, **given: Any) -> None:
    """Measure what adapters cost the decoder in the checkpoint BASE: on, off, eight at once; prefill, memory, peers."""
    from ssh_deploy.jobs.bench_decode import COLUMNS, DecodeOptions, measure_decode

    options = DecodeOptions(**((_QUICK if quick else {}) | {key: value for key, value in given.items() if value}))
    measure = partial(measure_decode, base=base, options=options)
    run_bench(measure, COLUMNS, work=work, out=out, as_json=as_json)

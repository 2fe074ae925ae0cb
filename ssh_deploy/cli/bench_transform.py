"""`ssh-deploy bench transform`: ``W += ΔW`` out of a spectrum, beside PEFT, torch.fft, scipy and memcpy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from ssh_deploy.cli.output import json_option, progress_bar, show

_QUICK: dict[str, Any] = {"sizes": ((96, 96), (48, 80)), "coefficients": 50, "seconds": 0.2}


class Size(click.ParamType):  # type: ignore[type-arg]
    """MxN."""

    name = "MxN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(M, N), both at least 1."""
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", str(value))
        if found is None:
            self.fail(f"{value!r} is not MxN, such as 4096x4096", param, ctx)
        return int(found[1]), int(found[2])


@click.command("transform")
@click.option("--size", "sizes", multiple=True, type=Size(), help="Of W; repeatable; default 4096x4096 and 768x768.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16", "float16"]), help="Of W.")
@click.option("--coefficients", type=click.IntRange(1), help="Of the spectrum; default 1000.")
@click.option("--threads", type=click.IntRange(1), help="Default all cores.")
@click.option("--seconds", type=click.FloatRange(0.1), help="Most time for each size and dtype; default 20.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where W lies; default cpu.")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file to write.")
@click.option("--quick", is_flag=True, help="Small matrices: does it run?")
@json_option
def command(out: str | None, quick: bool, as_json: bool, **given: Any) -> None:
    """Measure the inverse transform that adds ΔW to a weight."""
    from ssh_deploy.jobs.bench_transform import COLUMNS, TransformOptions, measure_transform

    options = TransformOptions(**((_QUICK if quick else {}) | {key: value for key, value in given.items() if value}))
    with progress_bar(as_json) as progress:
        bench = measure_transform(options=options, progress=progress)
    if out:
        bench.write(Path(out))
    show(as_json, bench.as_dict(), bench.lines(COLUMNS))

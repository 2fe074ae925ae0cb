"""`ssh-deploy bench bank`: a bank of adapters beside the plain model and LoRA."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import click

from ssh_deploy.cli.output import json_option, run_bench

_QUICK: dict[str, Any] = {
    "shapes": ("pico",), "batches": ((1, 16), (1, 128), (8, 64)), "resident": (1, 12), "seconds": 0.2, "sessions": 1,
    "openings": 1, "many": 20, "few": 2, "budget": 8,
}  # fmt: skip


class Batch(click.ParamType):  # type: ignore[type-arg]
    """ROWSxTOKENS."""

    name = "ROWSxTOKENS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(rows, tokens), both at least 1, at most 512 tokens."""
        found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,2})", str(value))
        if found is None or int(found[2]) > 512:
            self.fail(f"{value!r} is not ROWSxTOKENS, such as 8x64, of at most 512 tokens", param, ctx)
        return int(found[1]), int(found[2])


@click.command("bank")
@click.option("--shape", "shapes", multiple=True, help="bert-base, minilm or pico; the summary is of the first.")
@click.option("--batch", "batches", multiple=True, type=Batch(), help="Repeatable; default 1x16, 1x128, 8x64, 32x32.")
@click.option("--resident", multiple=True, type=click.IntRange(1), help="Adapters in memory; default 1 to 10000.")
@click.option("--only", "parts", multiple=True, help="ratios, lora, resident, swap or thrash; repeatable.")
@click.option("--seconds", type=click.FloatRange(0.1), help="Most time for each group of variants; default 600.")
@click.option("--sessions", type=click.IntRange(1), help="Of base and of bank that take turns; default 3.")
@click.option("--openings", type=click.IntRange(1), help="Of these, at least, for each batch; default 3.")
@click.option("--threads", type=click.IntRange(1), help="Of one operator; default all cores.")
@click.option("--work", type=click.Path(file_okay=False), help="Folder to keep graphs and adapter files in (2 GB).")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file to write after each part.")
@click.option("--quick", is_flag=True, help="A tiny shape and a few adapters: does it run?")
@json_option
def command(work: str | None, out: str | None, quick: bool, as_json: bool, **given: Any) -> None:
    """Measure what adapters cost: every row its own, off, one for all; 1 to 10,000 resident; swaps from disk."""
    from ssh_deploy.errors import UnknownNameError, near_misses
    from ssh_deploy.jobs.bench_bank import COLUMNS, PARTS, BankOptions, measure_bank

    strange = next((part for part in given["parts"] if part not in PARTS), None)
    if strange is not None:
        raise UnknownNameError(f"No part {strange!r} of bench bank.", hint=near_misses(strange, PARTS))
    options = BankOptions(**((_QUICK if quick else {}) | {key: value for key, value in given.items() if value}))
    measure = partial(measure_bank, options=options)
    run_bench(measure, COLUMNS, work=work, out=out, as_json=as_json)

"""`ssh-deploy bench soak`: many threads on one deployment, every answer checked."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, progress_bar, show


@click.command("soak")
@click.argument("out", type=click.Path())
@click.option("--minutes", type=click.FloatRange(0.01), default=10.0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@click.pass_context
def command(context: click.Context, out: str, minutes: float, threads: int, seed: int, as_json: bool) -> None:
    """Load, unload, run and replace adapters of the folder OUT from many threads; exit status 1 on any wrong answer."""
    from ssh_deploy.jobs.benching import Bench, describe_machine
    from ssh_deploy.jobs.soaking import soak

    with progress_bar(as_json) as progress:
        report = soak(out, minutes=minutes, threads=threads, seed=seed, progress=progress)
    summary = {"wrong_answers": report.wrong_answers, "answers": report.answers, "rss_growth": round(report.growth, 5)}
    bench = Bench("soak", describe_machine(), [report.as_dict()], summary)
    show(as_json, bench.as_dict(), report.lines())
    if not report.good:
        context.exit(1)

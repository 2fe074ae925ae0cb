"""`ssh-deploy inspect`: what an adapter holds and whether it fits a base, or what an exported folder holds."""

from __future__ import annotations

import click

from ssh_deploy.cli.output import json_option, show


@click.command("inspect")
@click.argument("adapter", type=click.Path())
@click.option("--base", help="Folder or hub id to hold it against; exit status 1 when it does not fit.")
@click.option("--plot", type=click.Path(), metavar="FILE.png", help="Draw its coefficients and |ΔW|.")
@json_option
@click.pass_context
def command(context: click.Context, adapter: str, base: str | None, plot: str | None, as_json: bool) -> None:
    """Show modules, shapes, sizes and origin of ADAPTER (a compact file or PEFT folder).

    Of an exported folder: its base, how it is stored, its slots and its adapters.
    """
    from ssh_deploy.jobs.inspecting import inspect_adapter
    from ssh_deploy.jobs.inspecting_folder import inspect_folder
    from ssh_deploy.runtimes.folder import is_exported

    if is_exported(adapter):
        if base or plot:
            raise click.UsageError(f"{adapter} is an exported folder: --base and --plot are for an adapter.")
        folder = inspect_folder(adapter)
        show(as_json, folder.as_dict(), folder.lines())
        return
    found = inspect_adapter(adapter, base=base, plot=plot)
    show(as_json, found.as_dict(), found.lines())
    if not found.fits:
        context.exit(1)

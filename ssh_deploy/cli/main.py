"""The `ssh-deploy` command: a table of commands, each imported only when it runs, so that --help is instant."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import click

from ssh_deploy import __version__
from ssh_deploy.errors import DeployError, near_misses

# name: (module with `command`, one line of help). A literal table: listing help imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("ssh_deploy.cli.inspect", "Show what an adapter holds and whether it fits a base."),
    "convert": ("ssh_deploy.cli.convert", "Turn an adapter into another form or another kind."),
    "extract": ("ssh_deploy.cli.extract", "Make an adapter out of a fine-tuned checkpoint and its base."),
    "merge": ("ssh_deploy.cli.merge", "Merge adapters into a checkpoint, shard by shard."),
    "export": ("ssh_deploy.cli.export", "Export a base and its adapters to an ONNX folder."),
    "add": ("ssh_deploy.cli.add", "Add an adapter to an exported folder."),
    "remove": ("ssh_deploy.cli.remove", "Remove an adapter from an exported folder."),
    "pack": ("ssh_deploy.cli.pack", "Pack adapters of a folder into one bank file."),
    "run": ("ssh_deploy.cli.run", "Answer texts with an exported folder, each with its own adapter."),
    "verify": ("ssh_deploy.cli.verify", "Compare torch with a merged checkpoint or an exported folder."),
    "plugins": ("ssh_deploy.cli.plugins", "List families of adapters, where they come from, what they can do."),
    "bench": ("ssh_deploy.cli.bench", "Measure banks, decoding, transforms and merges beside their peers."),
}


class CommandTable(click.Group):
    """A group whose commands are imported when asked for; their help lines come from the table.

    ``table``: name → (module with ``command``, one line of help).
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]] = COMMANDS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command.

        Raises:
            click.UsageError: unknown, with the nearest names.
        """
        if cmd_name not in self.table:
            raise click.UsageError(f"No command {cmd_name!r}. {near_misses(cmd_name, self.table)}", ctx)
        command: click.Command = importlib.import_module(self.table[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run; an error of ours ends with its message and exit status 1."""
        try:
            return super().invoke(ctx)
        except DeployError as error:
            if "--json" in sys.argv or ctx.obj == "json":
                text = {"error": {"type": type(error).__name__, "message": error.what, "hint": error.hint}}
                click.echo(json.dumps(text, indent=2, ensure_ascii=False))
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)


@click.command(cls=CommandTable, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ssh-deploy")
def main() -> None:
    """Sparse Hartley spectrum (SSH) adapters: merge them, export them to ONNX, swap them at run time.

    SSH is Sparse Spectrum adaptation via the discrete Hartley transform; nothing to do with Secure Shell.
    """

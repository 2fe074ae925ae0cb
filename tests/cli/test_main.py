"""The command table: instant help, near misses, errors as words or JSON, exit statuses."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ssh_deploy.cli.bench import BENCHES
from ssh_deploy.cli.main import COMMANDS, main

COMMAND = str(Path(sys.executable).parent / "ssh-deploy")


def test_help_lists_every_command_and_imports_none():
    code = (
        "import sys; from click.testing import CliRunner; from ssh_deploy.cli.main import main;"
        "out = CliRunner().invoke(main, ['--help']).output;"
        "ours = {m for m in sys.modules if m.startswith('ssh_deploy.cli.')} - {'ssh_deploy.cli.main'};"
        "print(sorted(ours) + [m for m in ('numpy', 'torch', 'rich') if m in sys.modules]); print(out)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, _, rest = done.stdout.partition("\n")
    assert first == "[]"
    for name, (_, text) in COMMANDS.items():
        assert name in rest
        assert text.split()[0] in rest


EVERY = {(name,): module for name, (module, _) in COMMANDS.items()}
EVERY |= {("bench", name): module for name, (module, _) in BENCHES.items()}


@pytest.mark.parametrize("path", list(EVERY), ids=" ".join)
def test_every_command_is_what_the_table_says(path):
    command = importlib.import_module(EVERY[path]).command
    assert isinstance(command, click.Command)
    assert command.name == path[-1]
    assert command.help
    options = [option for p in command.params for option in p.opts]
    assert "--json" in options or isinstance(command, click.Group)
    done = CliRunner().invoke(main, [*path, "--help"])
    assert done.exit_code == 0, done.output


def test_unknown_command_names_the_nearest():
    done = CliRunner().invoke(main, ["merg"])
    assert done.exit_code == 2
    assert "No command 'merg'. Did you mean merge?" in done.output


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_words_on_stderr_and_status_1(tmp_path, as_json):
    words = [COMMAND, "inspect", str(tmp_path / "nothing.safetensors"), *(["--json"] if as_json else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "no such file or folder" in done.stderr
    if as_json:
        error = json.loads(done.stdout)["error"]
        assert error["type"] == "AdapterFileError"
        assert "nothing.safetensors" in error["message"]
        assert error["hint"]
    else:
        assert done.stdout == ""


def test_version():
    done = CliRunner().invoke(main, ["--version"])
    assert done.output.startswith("ssh-deploy, version ")

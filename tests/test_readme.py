"""What README.md and FORMAT.md say is true: commands exist, links lead somewhere, shown code runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssh_deploy.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_every_shown_command_line_parses(readme):
    lines = re.findall(r"^\$? ?(ssh-deploy [^\n|]+)$", readme, flags=re.M)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.split(" #")[0])[1:]
        if words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, line
        options = {w.split("=")[0] for w in words if w.startswith("-")} - {"--help"}
        listed = CliRunner().invoke(main, [words[0], "--help"]).output
        for option in options:
            assert re.search(rf"(^|[\s,]){re.escape(option)}\b", listed), f"{line}: no {option}"


def test_every_relative_link_leads_somewhere(readme, root):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme):
        assert (root / target).exists(), target


def test_it_says_that_it_is_not_secure_shell(readme):
    assert "nothing to do with Secure Shell" in readme.splitlines()[2]


def test_no_path_of_a_machine_is_named(root):
    for path in [root / "README.md", *root.glob("ssh_deploy/**/*.md"), *root.glob("plugins/*/README.md")]:
        assert not re.search(r"/(work|home|root|tmp)/", path.read_text()), path


@pytest.mark.slow
def test_the_shown_commands_and_code_run_as_they_stand(readme, root, minilm_path, tmp_path):
    """The block of commands and the Python example, in a folder that holds what they name."""
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(minilm_path)
    for name, source in (("spam", "sms-spam"), ("trec6", "trec6"), ("sentiment", "sentiment")):
        shutil.copy(root / "examples" / "adapters" / f"{source}.safetensors", tmp_path / f"{name}.safetensors")
    section = readme.partition("## Use it")[2].partition("## Train one")[0]
    commands = re.search(r"```bash\n(.*?)```", section, flags=re.S)[1].splitlines()
    code = re.search(r"```python\n(.*?)```", section, flags=re.S)[1]
    assert len(commands) == 8
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in commands:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    code = code.replace('load("sentiment", "sentiment.safetensors")', 'load("mine", "sentiment.safetensors")')
    code = code.replace('adapters=["sentiment",', 'adapters=["mine",')  # `add` above took the name
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [line.split()[0] for line in done.stdout.splitlines()]
    assert answers == ["positive", "LOC"]
    many = re.findall(r"```python\n(.*?)```", section, flags=re.S)[1]
    done = subprocess.run([sys.executable, "-c", many], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fit, *labels = done.stdout.splitlines()
    assert int(fit.split()[0]) > 1000
    assert labels == ["spam", "ham", "positive"]


@pytest.mark.slow
def test_the_shown_commands_and_code_of_language_models_run(readme, decoder, tmp_path):
    """In a folder that holds what they name, a small LLaMA and random adapters in the places of the real ones."""
    base, adapters, _ = decoder
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(base)
    for name, source in (("chatterbot", "red"), ("pirate", "green")):
        shutil.copy(adapters[source], tmp_path / f"{name}.safetensors")
    section = readme.partition("## Language models")[2].partition("## Families")[0]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = re.search(r"```bash\n(.*?)```", section, flags=re.S)[1].splitlines()
    assert len(commands) == 3
    for line in commands:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    codes = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert len(codes) == 2
    codes[1] += "same = AutoModelForCausalLM.from_pretrained('SmolLM2-135M-Instruct').state_dict()\n"
    codes[1] += "assert all(bool((same[k] == v).all()) for k, v in model.state_dict().items())\n"
    for code in codes:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

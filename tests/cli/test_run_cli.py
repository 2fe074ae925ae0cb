"""`ssh-deploy run` at the command line: text, JSON, standard input, exit codes."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from contract_folder import SITES, make_folder

from ssh_deploy.adapters.file import write_file
from ssh_deploy.cli.main import main
from ssh_deploy.testing import random_adapter


@pytest.fixture
def folder(tmp_path):
    for name, winner in (("left", [99, 0]), ("right", [0, 99])):
        head = {"classifier": {"weight": np.ones((2, 8), np.float32), "bias": np.array(winner, np.float32)}}
        write_file(random_adapter(SITES, n=5, heads=head, labels=("a", "b")), tmp_path / f"{name}.safetensors")
    return make_folder(tmp_path / "out", base_labels=3)


@pytest.fixture
def run(folder, tmp_path):
    loads = [f"--load={name}={tmp_path / name}.safetensors" for name in ("left", "right")]
    return lambda *words, stdin=None: CliRunner().invoke(main, ["run", str(folder), *loads, *words], input=stdin)


def test_a_line_per_text(run):
    done = run("--adapter", "left", "--text", "free", "--text", "who")
    assert done.exit_code == 0, done.output
    assert done.stdout == "a 1.000  [left]  free\na 1.000  [left]  who\n"


def test_an_adapter_per_text_as_json(run):
    done = run("--adapter", "left", "--adapter", "right", "--text", "free", "--text", "who", "--json")
    answers = json.loads(done.stdout)["answers"]
    assert [(a["adapter"], a["label"]) for a in answers] == [("left", "a"), ("right", "b")]
    assert set(answers[0]["logits"]) == {"a", "b"}


def test_base_and_standard_input(run):
    done = run("--base", "--stdin", "--json", stdin="free prize\n\nwho\n")
    answers = json.loads(done.stdout)["answers"]
    assert [(a["text"], a["adapter"]) for a in answers] == [("free prize", None), ("who", None)]
    assert set(answers[0]["logits"]) == {"no", "maybe", "yes"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--text", "x"], 2, "--adapter NAME, or --base"),
        (["--base", "--adapter", "left", "--text", "x"], 2, "not both"),
        (["--base"], 2, "--text"),
        (["--base", "--text", "x", "--load", "nothing"], 2, "NAME=PATH"),
        (["--adapter", "lift", "--text", "x"], 1, "Did you mean left?"),
        (["--adapter", "../left", "--text", "x"], 1, "never paths"),
        (["--adapter", "left", "--adapter", "right", "--text", "x"], 1, "2 adapters for 1 texts"),
        (["--base", "--stdin"], 1, "no text to answer"),
    ],
)
def test_mistakes(run, words, code, says):
    done = run(*words, stdin="")
    assert done.exit_code == code, done.output
    assert says in done.stderr


def test_a_sum_is_an_adapter_too(run):
    """The head is the first term's; with other labels it would have to be said."""
    done = run("--adapter", "left+-0.5*right", "--text", "free", "--max-coefficients", "5")
    assert done.exit_code == 0, done.output
    assert done.stdout == "a 1.000  [left+-0.5*right]  free\n"
    done = run("--adapter", "left+0*right", "--text", "free")
    assert done.exit_code == 1
    assert "the weight '0' is not a decimal number other than 0" in done.stderr


def test_how_many_fit(folder):
    words = ["run", str(folder), "--how-many-fit", "--memory", "1MiB", "--max-coefficients", "100"]
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    spectrum, head = 2 * (101 * (2 + 2) + 4) + (11 + 9) * 2, 16 * 8 * 4 + 16 * 4
    assert found["budget"] == 1 << 20
    assert found["adapter_bytes"] == {"hartley": spectrum, "cosine": spectrum}
    assert found["head_bytes"] == head
    assert found["fit"]["hartley"] == (1 << 20) // spectrum
    assert found["fit_with_heads"]["hartley"] == (1 << 20) // (spectrum + head)
    assert (found["resident"], found["used"], found["free"]) == (0, 0, 1 << 20)
    said = CliRunner().invoke(main, words).stdout
    assert f"hartley: {spectrum:,} bytes an adapter (n up to 100): {(1 << 20) // spectrum:,} fit" in said
    assert CliRunner().invoke(main, [*words, "--base"]).exit_code == 2


def test_memory_that_is_none(folder):
    for memory, says in (("1GX", "is no amount of memory"), ("100", "too small for one adapter")):
        done = CliRunner().invoke(main, ["run", str(folder), "--base", "--text", "x", "--memory", memory])
        assert done.exit_code == 1
        assert says in done.stderr


def test_errors_as_json(tmp_path):
    done = CliRunner().invoke(main, ["run", str(tmp_path / "none"), "--base", "--text", "x"], obj="json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["type"] == "DeploymentError"

"""`merge`, `inspect` and `convert` on the command line: words in, words or JSON out, exit statuses."""

import io
import json
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from ssh_deploy.adapters.file import write_file
from ssh_deploy.cli.main import main
from ssh_deploy.cli.output import progress_bar
from ssh_deploy.testing import random_adapter

SITE = "bert.encoder.layer.0.attention.self.query"


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def adapters(tmp_path):
    paths = []
    for seed in (1, 2):
        head = {"classifier": {"weight": np.full((3, 48), seed, np.float32), "bias": np.zeros(3, np.float32)}}
        path = tmp_path / f"a{seed}.safetensors"
        write_file(random_adapter({SITE: (48, 48)}, seed=seed, heads=head), path, values_dtype=np.float32)
        paths.append(path)
    return paths


def test_merge_with_every_option(pico, adapters, tmp_path):
    done = run(
        *("merge", pico("bert"), f"one={adapters[0]}", f"two={adapters[1]}", "-o", tmp_path / "out"),
        *("--weight", "0.5", "--weight", "-2", "--head", "two", "--dtype", "float32", "--device", "cpu", "--json"),
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [(a["name"], a["weight"]) for a in report["adapters"]] == [("one", 0.5), ("two", -2.0)]
    assert report["head"] == "two"
    assert report["sites"][0]["adapters"] == ["one", "two"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert (written["classifier.weight"] == 2).all()


def test_merge_tells_people(pico, adapters, tmp_path):
    done = run("merge", pico("bert"), adapters[0], "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert "1 tensor changed" in done.output
    assert "Merged a1 × 1 (base unverified); head: a1." in done.output
    assert "Note: base unverified" in done.output


def test_merge_refuses_with_status_1_and_json(pico, adapters, tmp_path):
    done = run("merge", pico("bert"), *adapters, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "a1, a2 bring different heads" in done.output
    done = run("merge", pico("bert"), adapters[0], "--require-fingerprint", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "stores no fingerprint" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["merge"], ["merge", "base"], ["merge", "base", "a"], ["merge", "b", "a", "-o", "x", "--dtype", "int4"]]
)
def test_wrong_usage_is_status_2(words):
    assert run(*words).exit_code == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [(["x={0}", "x={1}"], "Two adapters go by 'x'"), (["a b={0}"], "'a b' is no adapter name"), (["={0}"], "'' is no")],
)
def test_names_of_adapters(pico, adapters, tmp_path, names, message):
    done = run("merge", pico("bert"), *(n.format(*adapters) for n in names), "-o", tmp_path / "out", "--head", "none")
    assert done.exit_code == 1
    assert message in done.output


def test_a_path_with_an_equals_sign_is_a_path(pico, adapters, tmp_path):
    odd = tmp_path / "n=750.safetensors"
    adapters[0].rename(odd)
    done = run("merge", pico("bert"), odd, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "'n=750' is no adapter name" in done.output
    done = run("merge", pico("bert"), f"good={odd}", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output


def test_inspect(pico, adapters, tmp_path):
    done = run("inspect", adapters[0], "--plot", tmp_path / "a.png", "--base", pico("bert"), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["modules"][0]["shape"] == [48, 48]
    assert found["against"]["match"] == "base unverified"
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    wrong = run("inspect", adapters[0], "--base", pico("gpt2"))
    assert wrong.exit_code == 1
    assert "does not fit: 1 of 1 modules" in wrong.output


def test_convert_there_and_back(pico, adapters, tmp_path):
    done = run("convert", adapters[0], "-o", tmp_path / "peft", "--labels", "a, b,c", "--task", "text-classification")
    assert done.exit_code == 0, done.output
    words = ["convert", tmp_path / "peft", "-o", tmp_path / "b.safetensors", "--base", pico("bert"), "--name", "org/x"]
    done = run(*words, "--values", "float32", "--json")
    assert json.loads(done.stdout)["fingerprint"]
    found = json.loads(run("inspect", tmp_path / "b.safetensors", "--json").stdout)
    assert found["labels"] == ["a", "b", "c"]
    assert found["base"] == "org/x"
    assert found["task"] == "text-classification"
    again = run(*words)
    assert again.exit_code == 1
    assert "exists already" in again.output


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("unit", "told"), [("bytes", True), ("", False)])
def test_progress_tells_bytes_their_rate_and_the_time_left(monkeypatch, unit, told):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar(False, unit=unit) as progress:
        for done in range(6):
            progress("merge", done * 1_000_000, 10_000_000)
            time.sleep(0.05)
    drawn = sys.stderr.getvalue()
    assert "50%" in drawn
    assert "-:--:--" in drawn or "0:00:0" in drawn
    assert ("5.0/10.0 MB" in drawn) == told
    assert ("/s" in drawn) == told

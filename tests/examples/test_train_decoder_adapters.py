"""The study of decoder adapters runs as it stands, and its committed results keep the promises."""

import json
import os
import re
import subprocess
import sys

import pytest

from ssh_deploy.adapters.reading import read_adapter

NAMES = ("chatterbot", "pirate")


def run(root, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, str(root / "examples" / "train_decoder_adapters.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        check=False,
    )


@pytest.mark.slow
def test_quick_trains_exports_and_prints_both_methods(root, tmp_path):
    out = tmp_path / "out"
    watched = [*(root / "examples").glob("results/*"), *(root / "examples").glob("adapters/*")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    done = run(root, "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    table = re.findall(r"^pirate +(none|SSH|LoRA r=8) +([\d.]+) +0\.0% +[\d.]+ +([\d,]+)", done.stdout, re.M)
    assert [(row[0], row[2]) for row in table] == [("none", "0"), ("SSH", "45,000"), ("LoRA r=8", "460,800")]
    record = json.loads((out / "train_decoder_adapters.json").read_text())
    assert record["quick"] is True
    assert all(one["steps"] == 2 for one in record["runs"].values())
    row = record["adapters"]["pirate"]
    assert row["file"]["bytes"] == (out / "pirate.safetensors").stat().st_size
    # What PEFT's model, the file and the merged checkpoint say is the same up to f16 of the spectra.
    assert row["file"]["test_after_f16"] == pytest.approx(row["ssh"]["test"], rel=0.01)
    assert row["file"]["test_merged"] == pytest.approx(row["file"]["test_after_f16"], rel=1e-3)
    assert row["ssh"]["test"] != record["base"]["pirate"]["test"]
    adapter = read_adapter(out / "pirate.safetensors")
    assert adapter.parameters == 45_000
    assert adapter.task == "causal-lm"


def test_quick_needs_a_place_of_its_own(root):
    done = run(root, "--quick")
    assert done.returncode == 2
    assert "--out" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_committed_adapters_are_whole_and_name_no_machine(root, name):
    path = root / "examples" / "adapters" / f"{name}.safetensors"
    adapter = read_adapter(path)
    assert adapter.family == "ssh"
    assert adapter.parameters == 45_000
    assert len(adapter.deltas) == 60
    assert {module.rpartition(".")[2] for module in adapter.deltas} == {"q_proj", "v_proj"}
    assert adapter.task == "causal-lm"
    assert adapter.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert adapter.fingerprint is not None
    assert path.stat().st_size < 350_000
    assert b"/tmp" not in path.read_bytes()


@pytest.fixture(scope="module")
def committed(root):
    return json.loads((root / "examples" / "results" / "train_decoder_adapters.json").read_text())


def test_committed_results_say_what_was_run(root, committed):
    assert committed["quick"] is False
    assert committed["format"].endswith("<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\nANSWER<|im_end|>")
    assert set(committed["adapters"]) == set(NAMES)
    for name, row in committed["adapters"].items():
        assert row["pairs"] == {"train": 738, "validation": 120, "test": 161}
        assert row["file"]["run"] == row["ssh"]["run"]
        assert row["ssh"]["run"] in committed["runs"]
        assert row["file"]["bytes"] == (root / "examples" / "adapters" / f"{name}.safetensors").stat().st_size
        assert row["file"]["test_after_f16"] == pytest.approx(row["ssh"]["test"], rel=0.01)
        assert row["file"]["test_merged"] == pytest.approx(row["file"]["test_after_f16"], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_lora_on_the_same_matrices_in_as_many_steps(committed, name):
    ssh, lora = (committed["adapters"][name][method] for method in ("ssh", "lora"))
    assert ssh["parameters"] * 10 < lora["parameters"]
    assert committed["runs"][ssh["run"]]["steps"] == committed["runs"][lora["run"]]["steps"]
    assert lora["test"] < 0.5 * committed["base"][name]["test"]


@pytest.mark.parametrize("name", NAMES)
def test_held_out_answers_are_far_less_of_a_surprise(committed, name):
    row = committed["adapters"][name]
    assert row["ssh"]["test"] < 0.5 * committed["base"][name]["test"]


def test_anyone_can_see_the_pirate(committed):
    assert committed["base"]["pirate"]["pirate"] == 0
    assert committed["adapters"]["pirate"]["ssh"]["pirate"] > 0.5

"""The training study and the step benchmark run as they stand, and their committed results keep the promises."""

import json
import os
import re
import subprocess
import sys

import pytest

from ssh_deploy.adapters.reading import read_adapter

TASKS = {
    "trec6": ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    "sms-spam": ("ham", "spam"),
    "sentiment": ("negative", "positive"),
}


def run(root, script, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(root / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(root, tmp_path_factory):
    """Output folder and printed text of one --quick run; nothing else in the repository may change."""
    out = tmp_path_factory.mktemp("quick") / "out"
    watched = [*(root / "examples").glob("results/*"), *(root / "examples").glob("adapters/*")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    done = run(root, "train_adapters.py", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    return out, done.stdout


@pytest.mark.slow
def test_quick_prints_both_methods_and_the_ablation(quick):
    _, printed = quick
    table = re.findall(
        r"^trec6 +(SSH|LoRA r=8) +([01]\.\d{4}) +([01]\.\d{4}) +([\d,]+) +([\d,]+) +([\d,]+)$", printed, re.M
    )
    assert [row[0] for row in table] == ["SSH", "LoRA r=8"]
    assert [row[3] for row in table] == ["9,000", "73,728"]
    assert [row[4] for row in table] == ["11,310", "76,038"]
    assert re.findall(r"^  δ=(\S+) +[01]\.\d{4}", printed, re.M) == ["0", "0.5", "0.7", "1"]


@pytest.mark.slow
def test_quick_results(quick):
    out, _ = quick
    record = json.loads((out / "train_adapters.json").read_text())
    assert record["quick"] is True
    assert set(record["runs"]) == {
        "trec6-lora-rate0.002-epochs1-seed0",
        *(f"trec6-ssh-rate0.06-epochs1-delta{delta}-seed0" for delta in ("0", "0.5", "0.7", "1")),
    }
    assert all(0 <= one["test"] <= 1 and one["steps"] > 0 for one in record["runs"].values())
    summary = record["tasks"]["trec6"]
    assert summary["adapter"]["bytes"] == (out / "trec6.safetensors").stat().st_size == summary["ssh"]["bytes"]
    assert summary["ssh"]["bytes"] < summary["lora"]["bytes"]
    assert set(record["versions"]) >= {"torch", "transformers", "peft"}


@pytest.mark.slow
def test_quick_adapter_is_a_whole_compact_file(quick):
    out, _ = quick
    adapter = read_adapter(out / "trec6.safetensors")
    assert adapter.parameters == 9000
    assert len(adapter.deltas) == 12
    assert adapter.labels == TASKS["trec6"]
    assert adapter.task == "text-classification"
    assert set(adapter.replaced) == {"classifier"}
    assert adapter.fingerprint is not None
    assert set(adapter.fingerprint.sites) == {name.removeprefix("bert.") for name in adapter.deltas}


@pytest.mark.slow
def test_a_run_that_stands_is_not_trained_again(root, quick):
    out, printed = quick
    assert "validation" in printed
    before = (out / "train_adapters.json").read_text()
    done = run(root, "train_adapters.py", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "validation" not in done.stdout
    assert json.loads((out / "train_adapters.json").read_text())["runs"] == json.loads(before)["runs"]


def test_quick_needs_a_place_of_its_own(root):
    done = run(root, "train_adapters.py", "--quick")
    assert done.returncode == 2
    assert "--out" in done.stderr


@pytest.mark.parametrize("name", TASKS)
def test_committed_adapters_are_whole_and_name_no_machine(root, name):
    path = root / "examples" / "adapters" / f"{name}.safetensors"
    adapter = read_adapter(path)
    assert adapter.labels == TASKS[name]
    assert adapter.parameters == 9000
    assert adapter.base == "sentence-transformers/all-MiniLM-L6-v2"
    assert adapter.fingerprint is not None
    assert path.stat().st_size < 80_000


def test_committed_folder_is_read_as_well(root):
    adapter = read_adapter(root / "examples" / "adapters" / "trec6-peft")
    assert adapter.family == "ssh"
    assert adapter.parameters == 9000
    assert adapter.labels == TASKS["trec6"]
    assert adapter.base == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def committed(root):
    return json.loads((root / "examples" / "results" / "train_adapters.json").read_text())


def test_committed_results_say_what_was_run(root, committed):
    assert committed["quick"] is False
    assert set(committed["tasks"]) <= set(TASKS)
    for name, summary in committed["tasks"].items():
        ssh, lora = summary["ssh"], summary["lora"]
        assert len(ssh["test"]) == len(lora["test"]) == 3
        assert ssh["seeds"] == lora["seeds"]
        assert ssh["mean"] == pytest.approx(sum(ssh["test"]) / 3, abs=1e-4)
        assert ssh["parameters"] * 8 <= lora["parameters"]
        assert summary["adapter"]["run"] in committed["runs"]
        file = root / "examples" / "adapters" / f"{name}.safetensors"
        assert summary["adapter"]["bytes"] == file.stat().st_size


@pytest.mark.parametrize("name", TASKS)
def test_ssh_is_within_a_point_of_lora(committed, name):
    summary = committed["tasks"][name]
    assert summary["ssh"]["mean"] >= summary["lora"]["mean"] - 0.01


def test_ablation_of_the_share_by_energy(committed):
    assert set(committed["ablation"]["test"]) == {"0", "0.5", "0.7", "1"}
    assert all(values and min(values) > 0.8 for values in committed["ablation"]["test"].values())


def test_bench_compares_both_methods_in_one_run(root):
    done = run(root, "bench_training_step.py", "--shape", "tiny", "--rounds", "3", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["shapes"]["tiny"]
    methods = result["methods"]
    assert set(methods) == {"ssh", "fourierft", "none"}
    assert methods["ssh"]["trained"] == methods["fourierft"]["trained"] > methods["none"]["trained"]
    assert all(one["ms"] > 0 for one in methods.values())
    # Bytes are counted, not timed, so they can be held to; times at this size say nothing.
    assert methods["none"]["saved_bytes"] < methods["ssh"]["saved_bytes"] < methods["fourierft"]["saved_bytes"]
    assert methods["ssh"]["peak_bytes"] < methods["fourierft"]["peak_bytes"]


def test_bench_prints_a_table(root):
    done = run(root, "bench_training_step.py", "--shape", "tiny", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  ssh +[\d.]+ +1,188 ", done.stdout, re.M)
    assert re.search(r"SSH / FourierFT: time [\d.]+, kept 0\.\d+, peak 0\.\d+", done.stdout)

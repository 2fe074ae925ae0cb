"""Four families on three tasks: the script runs as it stands, and its committed figures say what the README shows."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from ssh_deploy.adapters.reading import read_adapter

TASKS = {"trec6": 1000, "sms-spam": 1000, "sentiment": 600}
METHODS = ("ssh", "fourierft", "sdctft", "lora")


def run(root, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(root / "examples" / "family_accuracy.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)


def path_of(folder, task, method):
    names = {"ssh": f"{task}.safetensors", "sdctft": f"{task}-sdctft.safetensors"}
    return folder / names.get(method, f"{task}-{method}")


@pytest.mark.slow
def test_four_families_mixed_in_every_batch_answer_as_their_merged_models(root, tmp_path):
    """The committed adapters of one task, but for one that is missing and is trained."""
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for method in ("ssh", "fourierft", "lora"):
        source = path_of(root / "examples" / "adapters", "sms-spam", method)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, adapters / source.name)
    words = ("--quick", "--task", "sms-spam", "--adapters", str(adapters), "--out", str(tmp_path / "out"))
    done = run(root, *words)
    assert done.returncode == 0, done.stderr
    assert read_adapter(path_of(adapters, "sms-spam", "sdctft")).parameters == 9000
    record = json.loads((tmp_path / "out" / "family_accuracy.json").read_text())
    assert (record["quick"], record["rows"]) == (True, {"sms-spam": 32})
    for method, row in record["tasks"]["sms-spam"].items():
        assert row["agreement"] == 1.0, method
        assert max(row["from_torch"].values()) <= 2e-5, method
        assert len(set(row["accuracy"].values())) == 1
        if method != "sdctft":  # that one saw 64 rows, once
            assert row["accuracy"]["torch"] > 0.9


def test_quick_needs_a_place_of_its_own(root):
    done = run(root, "--quick")
    assert done.returncode == 2
    assert "--out" in done.stderr


def shapes_of_minilm(modules):
    return dict.fromkeys(modules, (384, 384))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_committed_adapters(root, task, method):
    path = path_of(root / "examples" / "adapters", task, method)
    layers = [f"bert.encoder.layer.{i}.attention.self.{m}" for i in range(6) for m in ("query", "value")]
    adapter = read_adapter(path, shapes=shapes_of_minilm(layers))
    assert (adapter.family, adapter.task) == (method, "text-classification")
    assert set(adapter.deltas) == set(layers)
    assert adapter.parameters == (73_728 if method == "lora" else 9000)
    assert adapter.base == "sentence-transformers/all-MiniLM-L6-v2"
    assert set(adapter.replaced) == {"classifier"}


def test_committed_figures(root):
    record = json.loads((root / "examples" / "results" / "family_accuracy.json").read_text())
    assert (record["quick"], record["batch"]) == (False, 32)
    assert record["rows"] == TASKS
    for task, rows in record["tasks"].items():
        assert set(rows) == set(METHODS)
        for method, row in rows.items():
            assert row["agreement"] == 1.0, (task, method)
            assert max(row["from_torch"].values()) <= 1e-4, (task, method)
            assert set(row["accuracy"]) == {"torch", "merged", "slots", "mixed"}
            assert row["accuracy"]["mixed"] > {"trec6": 0.85, "sms-spam": 0.97, "sentiment": 0.88}[task], (task, method)
            path = path_of(root / "examples" / "adapters", task, method)
            files = [path] if path.is_file() else list(path.iterdir())
            assert row["bytes"] == sum(file.stat().st_size for file in files)

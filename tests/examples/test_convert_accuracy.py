"""A LoRA turned into spectra: the script runs as it stands, and its committed figures say what the picture shows."""

import json
import os
import subprocess
import sys

import pytest

from ssh_deploy.adapters.reading import read_adapter


def run(root, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(root / "examples" / "convert_accuracy.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
def test_quick_measures_and_draws(root, tmp_path):
    done = run(root, "--quick", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "convert_accuracy.json").read_text())
    assert (record["quick"], record["rows"]) == (True, 64)
    for kind in ("ssh", "sdctft"):
        points = record["points"][kind]
        assert [point["coefficients"] for point in points] == [750, 6000, 48000]
        assert [point["energy"] for point in points] == sorted(point["energy"] for point in points)
        assert points[0]["accuracy"] < points[-1]["accuracy"] == pytest.approx(record["points"]["lora"], abs=0.05)
    assert "<svg" in (tmp_path / "out" / "convert_accuracy.svg").read_text()


def test_quick_needs_a_place_of_its_own(root):
    done = run(root, "--quick")
    assert done.returncode == 2
    assert "--out" in done.stderr


def test_the_committed_lora(root):
    adapter = read_adapter(root / "examples" / "adapters" / "trec6-lora")
    assert (adapter.family, adapter.task, adapter.parameters) == ("lora", "text-classification", 73_728)
    assert adapter.base == "sentence-transformers/all-MiniLM-L6-v2"
    assert set(adapter.replaced) == {"classifier"}


def test_committed_figures(root):
    record = json.loads((root / "examples" / "results" / "convert_accuracy.json").read_text())
    assert (record["quick"], record["rows"]) == (False, 1000)
    points = record["points"]
    assert points["head_alone"] < 0.5 < 0.9 < points["lora"]
    for kind in ("ssh", "sdctft"):
        energies = [point["energy"] for point in points[kind]]
        assert energies == sorted(energies)
        assert points[kind][0]["accuracy"] < 0.5
        assert abs(points[kind][-1]["accuracy"] - points["lora"]) < 0.01
    assert record["trained_as_ssh"] > next(p["accuracy"] for p in points["ssh"] if p["coefficients"] == 750)
    assert "<svg" in (root / "examples" / "results" / "convert_accuracy.svg").read_text()

"""The main job as a user runs it: every promise of its table holds on a slice of the test texts."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_quickstart_keeps_its_promises(root, tmp_path):
    command = [sys.executable, root / "examples" / "quickstart.py", "--limit", "40"]
    command += ["--out", tmp_path / "out", "--json", tmp_path / "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["no_adapter_bit_identical"] is True
    assert set(figures["tasks"]) == {"trec6", "sms-spam", "sentiment"}
    for task, row in figures["tasks"].items():
        assert row["agreement"] == 1.0, task
        assert row["sidecar_max_diff"] <= 1e-4, task
        assert len(row["accuracy"]) == 4
        assert min(row["accuracy"].values()) > 0.8, task
        assert row["bytes"] < 100_000
    assert "accuracy" in done.stdout
    assert "bit-identical to the plain export: yes" in done.stdout


def test_a_folder_that_is_not_its_own_is_left_alone(root, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    command = [sys.executable, root / "examples" / "quickstart.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "give another --out" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"

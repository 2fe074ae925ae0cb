"""export, add, remove, pack and verify as commands: words in, JSON or words out, exit status."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exported_folders import write_adapter


def ssh_deploy(*words):
    command = Path(sys.executable).parent / "ssh-deploy"
    return subprocess.run([command, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_road_of_one_folder(exported, tmp_path):
    base, files, _ = exported("bert")
    out = tmp_path / "out"
    done = ssh_deploy(
        "export", "--onnx", base, f"first={files['headed']}", "-o", out, "--kinds", "hartley,cosine,head", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["adapters"] == ["first"]
    assert report["kinds"] == ["hartley", "cosine", "head"]
    assert set(report["validation"]) == {"no adapter", "first"}
    assert done.stderr == ""
    cosine = write_adapter(tmp_path / "c.safetensors", base, "bert", transform="cosine", seed=4)
    done = ssh_deploy("add", out, f"second={cosine}", "--json")
    assert json.loads(done.stdout)["adapters"] == ["first", "second"], done.stderr
    done = ssh_deploy("pack", out, "-o", tmp_path / "bank.onnx_adapter")
    assert "second: adapter_ids 0, adapter_cosine_ids 1" in done.stdout
    done = ssh_deploy("verify", base, cosine, out, "--json")
    assert done.returncode == 0
    assert set(json.loads(done.stdout)) >= {"ok", "max_abs_diff", "agreement", "rows", "tolerance"}
    done = ssh_deploy("remove", out, "first")
    assert "left: second" in done.stdout


@pytest.mark.slow
def test_a_verdict_that_is_not_ok_exits_1(exported):
    base, files, _ = exported("bert")
    done = ssh_deploy("verify", base, files["plain"], base, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    done = ssh_deploy("verify", base, files["plain"], base)
    assert "DIFFERS" in done.stdout


def test_errors_are_messages_with_exit_1(exported, tmp_path):
    base, _, folder = exported("bert")
    done = ssh_deploy("export", "--onnx", base, tmp_path / "none.safetensors", "-o", tmp_path / "out", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "AdapterFileError"
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    done = ssh_deploy("remove", copied, "hedaed")
    assert done.returncode == 1
    assert "Did you mean headed" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["export", "x", "-o", "y"],
        ["export", "--onnx", "x"],
        ["export", "--onnx", "x", "-o", "y", "--task", "translate"],
        ["pack", "x"],
    ],
)
def test_usage_errors_exit_2(words):
    assert ssh_deploy(*words).returncode == 2

"""The one-call script for a GPU machine: what of it runs without one."""

import importlib.util
import json
import os
import subprocess

import pytest
import torch
from exported_folders import write_adapter

from ssh_deploy.runtimes.session import onnxruntime


@pytest.fixture
def graphs(root, pico, tmp_path, monkeypatch):
    """`examples/gpu_graphs.py` on a pico base with three adapters with heads."""
    spec = importlib.util.spec_from_file_location("gpu_graphs", root / "examples/gpu_graphs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for i, name in enumerate(module.NAMES):
        write_adapter(tmp_path / f"{name}.safetensors", pico("bert"), "bert", labels=2 + i, seed=i)
    monkeypatch.setattr(module, "ADAPTERS", tmp_path)
    monkeypatch.setattr(module, "base_model", lambda: pico("bert"))
    return module


def test_graphs_are_placed_compared_and_timed(graphs, tmp_path):
    """The CPU provider in the GPU's place: all operators are its own, answers equal, a row for each dtype."""
    graphs.main(tmp_path / "found.json", provider="CPUExecutionProvider", seconds=0.0)
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [row["dtype"] for row in rows] == ["float32", "float16"]
    for row in rows:
        assert row["adapter_operators_elsewhere"] == []
        assert row["counts"]["adapters on CPU"] > 10
        assert row["max_diff_one"] == row["max_diff_mixed"] == 0.0
        assert row["mixed"]["rounds"] > 0


def test_operators_of_adapters_elsewhere_fail_it(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "DTYPES", ("float32",))
    placement = graphs.placement
    monkeypatch.setattr(
        graphs, "placement", lambda *a, **k: {**placement(*a, **k), "adapter_operators_elsewhere": ["Gather"]}
    )
    with pytest.raises(SystemExit, match="float32: Gather of the adapters run elsewhere"):
        graphs.main(tmp_path / "found.json", provider="CPUExecutionProvider", seconds=0.0)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime().get_available_providers(), reason="there is one here")
def test_without_the_provider(graphs, tmp_path):
    with pytest.raises(SystemExit, match="has no CUDAExecutionProvider: install onnxruntime-gpu"):
        graphs.main(tmp_path / "found.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_script_says_at_once_that_there_is_no_gpu(root, tmp_path):
    env = os.environ | {"PYTHON": str(root / ".venv/bin/python"), "OUT": str(tmp_path)}
    if not (root / ".venv/bin/python").exists():
        env["PYTHON"] = "python3"
    done = subprocess.run(
        ["bash", root / "examples/gpu.sh"], env=env, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stderr
    assert "passed" not in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_graphs_on_a_gpu(graphs, tmp_path):
    graphs.main(tmp_path / "found.json", seconds=0.5)

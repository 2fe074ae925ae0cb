"""The template of a family plugin: short, installed offline, under the contract, and taken by every target."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from ssh_deploy.testing import write_peft_example


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
    """Environment in which the template is installed, out of a copy of it; the copy's folder."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "site"
    shutil.copytree(root / "examples" / "plugin_family", source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *words, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "ssh_deploy_outer" / "__init__.py").exists()
    return {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}, source


#: Each command of a list, in one process: torch is imported once; prints the commands' outputs as a list.
RUN = """
import json, sys
from click.testing import CliRunner
from ssh_deploy.cli.main import main
outputs = []
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, (words, done.output)
    outputs.append(done.stdout)
print(json.dumps(outputs))
"""


def test_it_takes_under_80_lines(root):
    folder = root / "examples" / "plugin_family"
    code = [folder / "ssh_deploy_outer" / "__init__.py", folder / "pyproject.toml", folder / "tests" / "test_outer.py"]
    assert len(code[0].read_text().splitlines()) < 80
    assert sum(len(line) > 0 for path in code for line in path.read_text().splitlines()) < 80


def test_its_own_tests_pass(installed):
    environment, source = installed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(source / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_every_target_takes_it(installed, pico, tmp_path):
    environment, _ = installed
    rng = np.random.default_rng(0)
    module = "encoder.layer.0.attention.self.query"
    u, v = (rng.normal(size=48).astype(np.float32) for _ in range(2))
    prefix = f"base_model.model.{module}"
    tensors = {f"{prefix}.outer_u": u, f"{prefix}.outer_v": v}
    adapter = write_peft_example(tmp_path / "a", {"peft_type": "OUTER", "scaling": 0.25}, tensors)
    base, merged, out, back = (str(path) for path in (pico("bert"), *(tmp_path / name for name in "mob")))
    words = [
        ["plugins", "--json"],
        ["merge", base, str(adapter), "-o", merged],
        ["export", "--onnx", base, str(adapter), "-o", out],  # an export holds every adapter against torch
        ["convert", str(adapter), "-o", back, "--to", "peft"],
    ]
    command = [sys.executable, "-c", RUN, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    listed = json.loads(json.loads(done.stdout.splitlines()[-1])[0])["families"]
    mine = next(family for family in listed if family["name"] == "outer")
    assert (mine["packages"], mine["slots"]) == (["ssh-deploy-outer 0.1.0"], ["lowrank"])
    before, after = (load_file(f"{folder}/model.safetensors")[f"{module}.weight"] for folder in (base, merged))
    np.testing.assert_allclose(after, before + 0.25 * np.outer(u, v), atol=1e-6)
    np.testing.assert_array_equal(load_file(f"{back}/adapter_model.safetensors")[f"{prefix}.outer_u"], u)

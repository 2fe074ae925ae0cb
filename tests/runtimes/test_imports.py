"""Serving imports neither torch, transformers nor onnx, and says what to install when onnxruntime is missing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from contract_folder import SITES, make_folder

from ssh_deploy.adapters.file import write_file
from ssh_deploy.testing import random_adapter

SERVE = """
import json, sys
from ssh_deploy import Deployment
folder, adapter = sys.argv[1:]
with Deployment.open(folder, threads=1) as deployment:
    deployment.load("mine", adapter)
    answer = deployment.predict(["free prize", "who"], ["mine", None])
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "peft", "sympy", "matplotlib", "numba"}
print(json.dumps({"label": answer[0].label, "heavy": sorted(heavy & set(sys.modules))}))
"""
RUN = """
import sys
from ssh_deploy.cli.main import main
try:
    main(["run", sys.argv[1], "--base", "--text", "free prize", "--json"])
except SystemExit as done:
    assert done.code == 0, done.code
assert not {"torch", "transformers", "onnx", "numba"} & set(sys.modules)
"""
GENERATE = """
import json, sys
from ssh_deploy import Deployment
with Deployment.open(sys.argv[1], threads=1) as deployment:
    answers = deployment.generate(["the quick", "who"], ["red", None], chat=True, max_new_tokens=3)
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "peft", "sympy", "matplotlib", "numba"}
print(json.dumps({"tokens": [len(a.tokens) for a in answers], "heavy": sorted(heavy & set(sys.modules))}))
"""
MISSING = """
import sys
sys.modules["onnxruntime"] = None
from ssh_deploy import Deployment
from ssh_deploy.errors import DependencyError
try:
    Deployment.open(sys.argv[1])
except DependencyError as error:
    print(error)
"""


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "out", base_labels=3)


def fresh(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_open_load_and_predict_import_nothing_heavy(tmp_path, folder):
    head = {"classifier": {"weight": np.ones((2, 8), np.float32), "bias": np.array([0, 9], np.float32)}}
    write_file(random_adapter(SITES, n=5, heads=head, labels=("a", "b")), tmp_path / "a.safetensors")
    answer = json.loads(fresh(SERVE, folder, tmp_path / "a.safetensors"))
    assert answer == {"label": "b", "heavy": []}


def test_the_command_imports_nothing_heavy(folder):
    assert json.loads(fresh(RUN, folder))["answers"][0]["label"] == "yes"


def test_generation_imports_nothing_heavy(decoder):
    assert json.loads(fresh(GENERATE, decoder[2])) == {"tokens": [3, 3], "heavy": []}


def test_without_onnxruntime_both_extras_are_named(folder):
    text = fresh(MISSING, folder)
    assert "onnxruntime is not installed" in text
    assert "ssh-deploy[cpu]" in text
    assert "[gpu]" in text


def test_an_emptied_onnxruntime_is_recognised(folder):
    """What is left when one of the two packages is uninstalled over the other."""
    code = MISSING.replace(
        'sys.modules["onnxruntime"] = None', 'import types; sys.modules["onnxruntime"] = types.ModuleType("x")'
    )
    assert "there but empty" in fresh(code, folder)


def test_importing_the_class_loads_no_runtime():
    late = "{'onnxruntime', 'tokenizers', 'torch'}"
    assert fresh(f"import sys; from ssh_deploy import Deployment; print({late} & set(sys.modules))").strip() == "set()"

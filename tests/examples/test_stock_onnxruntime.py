"""The exported folder works from plain onnxruntime, and serving from it takes little memory: the real model."""

import ast
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ssh_deploy import Deployment
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.jobs.packing import pack_adapters

NAMES = ("sentiment", "sms-spam", "trec6")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory, root, minilm_path):
    out = tmp_path_factory.mktemp("exported") / "out"
    export_model(minilm_path, [str(root / "examples" / "adapters" / f"{name}.safetensors") for name in NAMES], out)
    pack_adapters(out, NAMES, out.parent / "bank.onnx_adapter")
    return out


def run_example(root, name, *words):
    command = [sys.executable, str(root / "examples" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_example_imports_nothing_of_ours(root):
    tree = ast.parse((root / "examples" / "stock_onnxruntime.py").read_text())
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if name.startswith("ssh_deploy")]
    assert "onnxruntime" in imported


def test_same_numbers_as_deployment_and_wrong_ids_are_errors(root, exported):
    done = run_example(root, "stock_onnxruntime.py", exported, exported.parent / "bank.onnx_adapter", "--json")
    assert done.returncode == 0, done.stderr
    stock = json.loads(done.stdout)
    with Deployment.open(exported) as deployment:
        for name, rows in stock["single"].items():
            for ours, theirs in zip(deployment.predict(stock["texts"], name), rows, strict=True):
                np.testing.assert_allclose(ours.logits, theirs, atol=1e-5)
        mixed = deployment.predict(stock["texts"], stock["names"])
    assert set(stock["names"]) == set(NAMES)
    for ours, theirs in zip(mixed, stock["mixed"], strict=True):
        np.testing.assert_allclose(ours.logits, theirs, atol=1e-5)
    assert len(stock["errors"]) == 10
    assert all("Status Message" in error for error in stock["errors"].values())
    shown = run_example(root, "stock_onnxruntime.py", exported, exported.parent / "bank.onnx_adapter")
    assert shown.returncode == 0
    assert "→ spam" in shown.stdout
    assert "adapter_ids negative" in shown.stdout


def test_memory_after_the_first_answer_is_plain_plus_60_mb_at_most(root, exported):
    done = run_example(root, "serving_memory.py", exported, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["above_mb"] <= 60
    assert result["plain"]["VmRSS"] > 50
    assert not result["deployment"]["torch"]
    table = run_example(root, "serving_memory.py", exported, "--adapter", "trec6")
    assert "Deployment, adapter trec6" in table.stdout


def test_memory_example_fails_above_the_limit(root, exported, tmp_path):
    script = (root / "examples" / "serving_memory.py").read_text().replace("LIMIT_MB = 60", "LIMIT_MB = -1000")
    (tmp_path / "strict.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "strict.py", exported], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "limit +-1000" in done.stdout


def test_mixed_and_single_agree_on_the_real_model(exported):
    texts = ["How far is it from Denver to Aspen ?", "WIN a free prize, call 08001 now", "a wonderful little film"] * 2
    names = [*NAMES, *reversed(NAMES)]
    with Deployment.open(exported, threads=2) as deployment:
        mixed = deployment.predict(texts, names)
        single = {name: deployment.predict(texts, name) for name in NAMES}
        for row, name in enumerate(names):
            np.testing.assert_allclose(mixed[row].logits, single[name][row].logits, atol=1e-5)
        assert [p.label for p in mixed[:3]] == [single[n][i].label for i, n in enumerate(NAMES)]
        assert mixed[1].label == "spam"


def test_an_adapter_of_another_base_is_refused_by_its_fingerprint(exported, root, tmp_path):
    from dataclasses import replace

    from ssh_deploy.adapters.file import read_file, write_file
    from ssh_deploy.checkpoints.fingerprint import Fingerprint, SiteSample
    from ssh_deploy.errors import FingerprintError

    adapter = read_file(root / "examples" / "adapters" / "trec6.safetensors")
    assert adapter.fingerprint is not None
    sites = {name: SiteSample(s.shape, s.values * np.float32(1.05)) for name, s in adapter.fingerprint.sites.items()}
    sites = {name: SiteSample(s.shape, s.values.astype(adapter_dtype(adapter))) for name, s in sites.items()}
    write_file(replace(adapter, fingerprint=Fingerprint("bert", sites)), tmp_path / "x.safetensors")
    with Deployment.open(exported) as deployment:
        assert deployment.load("own", root / "examples" / "adapters" / "trec6.safetensors").verified is True
        with pytest.raises(FingerprintError, match="made for another base"):
            deployment.load("x", tmp_path / "x.safetensors")


def adapter_dtype(adapter):
    return next(iter(adapter.fingerprint.sites.values())).values.dtype


def test_the_folder_can_be_moved(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "moved")
    with Deployment.open(tmp_path / "moved") as deployment:
        assert deployment.predict(["free prize"], "sms-spam")[0].labels == ("ham", "spam")

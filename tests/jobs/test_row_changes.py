"""ΔW in blocks of rows of the stored tensor: every kind of change, turned or not, alone and summed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.jobs.row_changes import row_change, working_bytes
from ssh_deploy.testing import random_adapter

PLACES = {"bert": ("encoder.layer.0.output.dense", (48, 80)), "gpt2": ("h.0.mlp.c_fc", (192, 48))}


def lowrank(shape, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(3, shape[1])), rng.normal(size=(shape[0], 3))
    return LowRankDelta(a.astype(np.float32), b.astype(np.float32), 0.25)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("kinds", ["spectral", "lowrank", "diagonal", "spectral lowrank", "lowrank spectral diagonal"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_are_the_rows_of_the_sum(pico, architecture, kinds, dtype):
    checkpoint = open_checkpoint(pico(architecture))
    module, shape = PLACES[architecture]
    module = next(name for name in checkpoint.modules() if name.endswith(module))
    made = {
        "spectral": random_adapter({module: shape}).deltas[module],
        "lowrank": lowrank(shape),
        "diagonal": DiagonalDelta(shape, {}, outer=np.linspace(0.5, 2, shape[0])),
    }
    terms = [(made[kind], weight) for kind, weight in zip(kinds.split(), (0.5, -2.0, 3.0), strict=False)]
    stored = checkpoint.read(f"{module}.weight").astype(np.float64)
    base = torch.from_numpy(np.ascontiguousarray(stored.T if architecture == "gpt2" else stored))
    want = sum((delta.add_to(base.clone(), scale=weight) - base).numpy() for delta, weight in terms)
    want = want.T if architecture == "gpt2" else want
    change = row_change(checkpoint, module, terms, rows=20, dtype=np.dtype(dtype), device="cpu")
    scratch = change.scratch()
    got = np.concatenate([change.block(i, min(20, len(want) - i), scratch).copy() for i in range(0, len(want), 20)])
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, atol=1e-12 if dtype == np.float64 else 2e-5)


def test_what_is_held_whole_counts():
    shape = (4096, 4096)
    spectrum = random_adapter({"x": shape}, n=1000).deltas["x"]
    of = {kind: working_bytes([(d, 1.0)], shape, threads=1, device="cpu")
          for kind, d in (("spectral", spectrum), ("lowrank", lowrank(shape)))}  # fmt: skip
    assert max(of.values()) < 20e6
    assert working_bytes([(spectrum, 1.0)], shape, threads=1, device="cuda") > 4 * 4096 * 4096


MERGE = """
import sys
from ssh_deploy.jobs.merging import merge_adapters
merge_adapters(*sys.argv[1:2], sys.argv[2:3], sys.argv[3])
print("torch" in sys.modules)
"""


def test_a_lora_merges_without_torch(pico, tmp_path):
    """Its product is made in rows too."""
    import json

    from safetensors.numpy import save_file

    module, shape = PLACES["bert"]
    delta = lowrank(shape)
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 0.75, "target_modules": ["dense"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {f"base_model.model.{module}.lora_{k}.weight": v for k, v in (("A", delta.a), ("B", delta.b))}
    save_file(names, folder / "adapter_model.safetensors")
    words = [sys.executable, "-c", MERGE, str(pico("bert")), str(folder), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]
    before, after = (load_file(f / "model.safetensors")[f"{module}.weight"] for f in (pico("bert"), tmp_path / "out"))
    np.testing.assert_allclose(after, before + 0.25 * delta.b @ delta.a, atol=1e-6)

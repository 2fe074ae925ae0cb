"""Merged from the command line: PEFT's own merged weights where PEFT has the family, definitions elsewhere."""

import json

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers import AutoModel

from ssh_deploy.adapters.fitting import fit
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.cli.main import main
from ssh_deploy.graph.patching import apply_adapter, model_places
from ssh_deploy.testing import write_peft_example

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*symmetric initialization.*:UserWarning"),  # HRA of odd rank
    pytest.mark.filterwarnings("ignore:Sparse invariant checks.*:UserWarning"),  # SHiRA's own sum
]

BERT, BOTH = ["query", "value"], ["query", "intermediate.dense", "output.dense"]
CASES = {
    "ia3": ("bert", peft.IA3Config, {"target_modules": BOTH, "feedforward_modules": ["output.dense"]}),
    "ia3-pattern": (
        "bert",
        peft.IA3Config,
        {"target_modules": r".*(query|value)", "feedforward_modules": r".*value"},
    ),
    "ia3-conv1d": (
        "gpt2",
        peft.IA3Config,
        {"fan_in_fan_out": True, "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "hra": ("bert", peft.HRAConfig, {"r": 4, "target_modules": BOTH}),
    "hra-orthogonal": ("bert", peft.HRAConfig, {"r": 3, "apply_GS": True, "target_modules": BERT}),
    "shira": ("bert", peft.ShiraConfig, {"r": 3, "random_seed": 1, "target_modules": BOTH}),
}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(base, config, fields, folder):
    """Folder that PEFT saved, and PEFT's own merged weights; every parameter of the adapter is moved off its start."""
    torch.manual_seed(5)
    model = peft.get_peft_model(AutoModel.from_pretrained(base), config(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}


def error(got, want):
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_and_biases_are_pefts(bases, tmp_path, case):
    architecture, config, fields = CASES[case]
    base = bases(architecture)
    want = trained(base, config, fields, tmp_path / "adapter")
    done = run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    sites = [site["tensor"] for site in json.loads(done.stdout)["sites"]]
    written, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert any(name.endswith(".bias") for name in sites) == case.startswith("ia3")
    for name, tensor in before.items():
        if name in sites:
            assert error(written[name], want[name]) <= 1e-6, name
            assert error(before[name], want[name]) > 1e-2, name
        else:
            np.testing.assert_array_equal(written[name], tensor)
            np.testing.assert_array_equal(want[name], tensor)


@pytest.mark.parametrize("case", ["ia3", "hra", "shira"])
def test_written_by_us_it_is_loaded_by_peft(bases, tmp_path, case):
    base = bases("bert")
    want = trained(base, *CASES[case][1:], tmp_path / "a")
    done = run("convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "peft", "--base", base)
    assert done.exit_code == 0, done.output
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):  # module_shapes are ours
        model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "b").merge_and_unload()
    for name, tensor in model.state_dict().items():
        assert error(tensor.numpy(), want[name]) <= 1e-6, name


QUERY = "encoder.layer.0.attention.self.query"


def ssf(folder, rng, *, shift=True):
    """An SSF of one module; returns its γ and β."""
    scale, add = (rng.uniform(0.5, 1.5, size=48).astype("f") for _ in range(2))
    tensors = {f"base_model.model.{QUERY}.ssf_scale": scale, f"base_model.model.{QUERY}.ssf_shift": add * shift}
    write_peft_example(folder, {"peft_type": "SSF"}, tensors)
    return scale, add * shift


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scale_and_shift_in_every_dtype_with_a_weight(bases, tmp_path, dtype):
    base = bases("bert")
    scale, shift = ssf(tmp_path / "a", np.random.default_rng(0))
    done = run("merge", base, tmp_path / "a", "-o", tmp_path / "out", "--weight", "0.5", "--dtype", dtype, "--json")
    assert done.exit_code == 0, done.output
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    w, b = (before[f"{QUERY}.{part}"].astype(float) for part in ("weight", "bias"))
    half = 1 + 0.5 * (scale.astype(float) - 1)
    tolerance = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert error(after[f"{QUERY}.weight"], half[:, None] * w) <= tolerance
    assert error(after[f"{QUERY}.bias"], half * b + 0.5 * shift) <= tolerance
    report = {site["tensor"]: site for site in json.loads(done.stdout)["sites"]}
    np.testing.assert_allclose(report[f"{QUERY}.bias"]["norm"], np.linalg.norm((half - 1) * b + 0.5 * shift), rtol=1e-5)


def test_several_families_at_once(bases, tmp_path):
    base = bases("bert")
    before = load_file(base / "model.safetensors")
    want = {name: tensor.astype(np.float64) for name, tensor in before.items()}
    for case in ("ia3", "shira"):
        merged = trained(base, *CASES[case][1:], tmp_path / case)
        want = {name: want[name] + 0.5 * (merged[name].astype(np.float64) - before[name]) for name in before}
    done = run("merge", base, tmp_path / "ia3", tmp_path / "shira", *("--weight", "0.5") * 2, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert error(tensor, want[name]) <= 2e-6, name


@pytest.mark.parametrize("order", [("ia3", "hra", "shira"), ("shira", "hra", "ia3")])
def test_torch_itself_adds_up_changes_of_the_bases_own_weights(bases, tmp_path, order):
    """`apply_adapter`, which merged graphs are traced with, against the merged checkpoint; on the same modules."""
    base = bases("bert")
    for case in order:
        _, config, fields = CASES[case]
        trained(base, config, {**fields, "target_modules": BOTH}, tmp_path / case)
    paths = [tmp_path / case for case in order]
    weights = (0.5, 0.75, 1.25)
    words = [word for weight in weights for word in ("--weight", weight)]
    done = run("merge", base, *paths, *words, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    model, checkpoint, originals = AutoModel.from_pretrained(base), open_checkpoint(base), {}
    for path, weight in zip(paths, weights, strict=True):
        adapter = fit(path, checkpoint).adapter
        places = model_places(adapter, model, checkpoint.config)
        apply_adapter(model, adapter, places, scale=weight, originals=originals)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert error(model.state_dict()[name].numpy(), tensor) <= 2e-6, name


def without_biases(base, folder):
    """A copy of ``base`` whose query of layer 0 has no bias."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {k: t for k, t in load_file(base / "model.safetensors").items() if k != f"{QUERY}.bias"}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_shift_needs_a_bias_and_a_scale_does_not(bases, tmp_path):
    base = without_biases(bases("bert"), tmp_path / "base")
    rng = np.random.default_rng(0)
    ssf(tmp_path / "shift", rng)
    done = run("merge", base, tmp_path / "shift", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert f"shift shifts the answers of {QUERY}, which has no bias" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
    scale, _ = ssf(tmp_path / "scale", rng, shift=False)
    assert run("merge", base, tmp_path / "scale", "-o", tmp_path / "out").exit_code == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    assert error(after[f"{QUERY}.weight"], scale[:, None] * before[f"{QUERY}.weight"]) <= 1e-6


@pytest.mark.parametrize("case", ["ia3", "hra", "shira"])
def test_verify_holds_the_merged_checkpoint_against_torch(bases, tmp_path, case):
    base = bases("bert")
    trained(base, *CASES[case][1:], tmp_path / "a")
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "out").exit_code == 0
    done = run("verify", base, tmp_path / "a", tmp_path / "out")
    assert done.exit_code == 0, done.output


def test_a_weight_of_another_size_is_refused(bases, tmp_path):
    tensors = {f"base_model.model.{QUERY}.ssf_{part}": np.ones(40, "f") for part in ("scale", "shift")}
    write_peft_example(tmp_path / "a", {"peft_type": "SSF"}, tensors)
    done = run("merge", bases("bert"), tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "ssf_scale is [40], not [48]" in done.output
    done = run("inspect", tmp_path / "a")
    assert done.exit_code == 1
    assert "Give the base" in done.output

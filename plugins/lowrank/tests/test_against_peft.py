"""PEFT's own layers, saved by PEFT: our merged weights against its `merge_and_unload`, from the command line."""

import json

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from ssh_deploy.cli.main import main

BERT, GPT2, BOTH = ["query", "value"], ["c_attn", "c_fc"], ["query", "intermediate.dense", "output.dense"]
CASES = {
    "lora": ("bert", peft.LoraConfig, {"r": 4, "lora_alpha": 10, "target_modules": BOTH}),
    "rslora": ("bert", peft.LoraConfig, {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": BERT}),
    "patterns": (
        "bert",
        peft.LoraConfig,
        {
            "r": 4,
            "target_modules": BERT,
            "rank_pattern": {"layer.1.attention.self.query": 2, r"layer\.\d\.attention\.self\.value": 6},
            "alpha_pattern": {"value": 24},
        },
    ),
    "conv1d": ("gpt2", peft.LoraConfig, {"r": 4, "fan_in_fan_out": True, "target_modules": GPT2}),
    "dora": ("bert", peft.LoraConfig, {"r": 4, "use_dora": True, "target_modules": BOTH}),
    "dora-conv1d": (
        "gpt2",
        peft.LoraConfig,
        {"r": 4, "use_dora": True, "use_rslora": True, "fan_in_fan_out": True, "target_modules": GPT2},
    ),
    "loha": ("bert", peft.LoHaConfig, {"r": 3, "alpha": 5, "target_modules": BOTH}),
    "lokr": ("bert", peft.LoKrConfig, {"r": 2, "alpha": 5, "target_modules": BOTH}),
    "lokr-both": ("bert", peft.LoKrConfig, {"r": 2, "decompose_both": True, "target_modules": BOTH}),
    "lokr-whole": ("bert", peft.LoKrConfig, {"r": 64, "decompose_factor": 4, "target_modules": BOTH}),
    "vera": ("bert", peft.VeraConfig, {"r": 16, "target_modules": BERT}),
    "vera-conv1d": ("gpt2", peft.VeraConfig, {"r": 16, "fan_in_fan_out": True, "target_modules": ["c_attn"]}),
}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(base, config, fields, folder, kind=AutoModel, **more):
    """Folder that PEFT saved, and PEFT's own merged weights; every parameter of the adapter is moved off its start."""
    torch.manual_seed(5)
    model = peft.get_peft_model(kind.from_pretrained(base), config(**fields, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "magnitude" in name else 0.2
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}


def error(got, want):
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts(bases, tmp_path, case):
    architecture, config, fields = CASES[case]
    base = bases(architecture)
    want = trained(base, config, fields, tmp_path / "adapter")
    done = run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    sites = [site["tensor"] for site in json.loads(done.stdout)["sites"]]
    written, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert sites
    for name, tensor in before.items():
        if name in sites:
            assert error(written[name], want[name]) <= 1e-6, name
            assert error(before[name], want[name]) > 1e-2, name
        else:
            np.testing.assert_array_equal(written[name], tensor)
            np.testing.assert_array_equal(want[name], tensor)


def test_a_head_comes_along(bases, tmp_path):
    base, (_, config, fields) = bases("bert", "text-classification"), CASES["lora"]
    kind = AutoModelForSequenceClassification
    want = trained(base, config, {**fields, "target_modules": BERT}, tmp_path / "a", kind, task_type="SEQ_CLS")
    done = run("merge", base, tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written["classifier.weight"], want["classifier.weight"])
    assert error(written["classifier.weight"], load_file(base / "model.safetensors")["classifier.weight"]) > 1e-2


def test_adapters_of_several_families_are_merged_at_once(bases, tmp_path):
    base, want = bases("bert"), None
    before = load_file(base / "model.safetensors")
    for case in ("lora", "dora", "loha"):
        merged = trained(base, *CASES[case][1:], tmp_path / case)
        change = {name: 0.5 * (merged[name].astype(np.float64) - before[name]) for name in before}
        want = change if want is None else {name: want[name] + change[name] for name in before}
    paths = [tmp_path / case for case in ("lora", "dora", "loha")]
    done = run("merge", base, *paths, *("--weight", "0.5") * 3, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert error(tensor, before[name] + want[name]) <= 2e-6, name


@pytest.mark.parametrize("case", ["lora", "dora", "lokr"])
def test_verify_holds_the_merged_checkpoint_against_torch(bases, tmp_path, case):
    base = bases("bert")
    trained(base, *CASES[case][1:], tmp_path / "a")
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "out").exit_code == 0
    done = run("verify", base, tmp_path / "a", tmp_path / "out")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("case", ["lora", "dora", "loha", "lokr", "vera"])
def test_written_by_us_it_is_loaded_by_peft(bases, tmp_path, case):
    base = bases("bert")
    want = trained(base, *CASES[case][1:], tmp_path / "a")
    done = run("convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "peft", *(("--base", base) * (case == "vera")))
    assert done.exit_code == 0, done.output
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "b").merge_and_unload()
    for name, tensor in model.state_dict().items():
        assert error(tensor.numpy(), want[name]) <= 1e-6, name


def test_inspect_says_what_it_is(bases, tmp_path):
    base = bases("bert")
    trained(base, *CASES["patterns"][1:], tmp_path / "a")
    done = run("inspect", tmp_path / "a", "--base", base, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["family"], found["settings"], found["fits"]) == ("lora", {"r": 4, "lora_alpha": 8}, True)
    first = next(m for m in found["modules"] if m["module"].endswith("layer.1.attention.self.query"))
    assert (first["kind"], first["shape"], first["parameters"]) == ("lowrank", [48, 48], 2 * 96)
    assert first["norm"] > 0
    words = run("inspect", tmp_path / "a")
    assert "r = 4, lora_alpha = 8" in words.output
    assert "α" not in words.output


def test_a_compact_file_is_refused_with_the_reason(bases, tmp_path):
    trained(bases("bert"), *CASES["lora"][1:], tmp_path / "a")
    done = run("convert", tmp_path / "a", "-o", tmp_path / "a.safetensors")
    assert done.exit_code == 1
    assert "a compact file holds spectra" in done.output
    assert not (tmp_path / "a.safetensors").exists()

"""Every method that the bridge reads, saved by PEFT: our merged weights against its `merge_and_unload`."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from transformers import AutoModel

from ssh_deploy.cli.main import main

QV, ALL = ["query", "value"], ["query", "intermediate.dense", "output.dense"]
CASES = {
    "adalora": (
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 4, "lora_alpha": 6, "total_step": 10, "target_modules": ALL},
    ),
    "beft": (peft.BeftConfig, {"target_modules": ALL}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": QV}),
    "c3a": (peft.C3AConfig, {"block_size": 16, "target_modules": ALL}),
    "c3a-pattern": (
        peft.C3AConfig,
        {"block_size": 16, "target_modules": ALL, "block_size_pattern": {"layer.1.attention.self.query": 8}},
    ),
    "deft": (peft.DeftConfig, {"r": 4, "target_modules": ALL}),
    "deft-qr": (peft.DeftConfig, {"r": 4, "decomposition_method": "qr", "para": True, "target_modules": QV}),
    "delora": (peft.DeloraConfig, {"r": 4, "target_modules": ALL}),
    "frod": (peft.FrodConfig, {"sparse_rate": 0.05, "progressbar": False, "target_modules": QV}),
    "glora": (peft.GloraConfig, {"r": 3, "target_modules": ALL}),
    "glora-vector": (
        peft.GloraConfig,
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", "target_modules": ALL},
    ),
    "gralora": (peft.GraloraConfig, {"r": 4, "alpha": 6, "gralora_k": 2, "hybrid_r": 2, "target_modules": ALL}),
    "hira": (peft.HiraConfig, {"r": 4, "target_modules": ALL}),
    "miss": (peft.MissConfig, {"r": 4, "target_modules": ALL}),
    "miss-bat": (peft.MissConfig, {"r": 4, "init_weights": "bat", "target_modules": QV}),
    "miss-mini": (peft.MissConfig, {"r": 4, "mini_r": 4, "init_weights": "mini", "target_modules": QV}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8, "target_modules": ALL}),
    "oft-cayley": (
        peft.OFTConfig,
        {"oft_block_size": 8, "use_cayley_neumann": False, "block_share": True, "target_modules": QV},
    ),
    "osf": (peft.OSFConfig, {"effective_rank": 8, "target_modules": QV}),
    "peanut": (peft.PeanutConfig, {"r": 4, "depth": 1, "target_modules": ALL}),
    "psoft": (peft.PsoftConfig, {"r": 4, "psoft_alpha": 6, "target_modules": ALL}),
    "pvera": (peft.PveraConfig, {"r": 8, "target_modules": ALL}),
    "randlora": (peft.RandLoraConfig, {"r": 4, "randlora_alpha": 8, "target_modules": ALL}),
    "road-1": (peft.RoadConfig, {"variant": "road_1", "group_size": 8, "target_modules": ALL}),
    "road-4": (peft.RoadConfig, {"variant": "road_4", "group_size": 8, "target_modules": QV}),
    "supertuning": (peft.SupertuningConfig, {"sparsity": 0.9, "r": 4, "lora_alpha": 8, "target_modules": ALL}),
    "tinylora": (peft.TinyLoraConfig, {"u": 16, "target_modules": ALL}),
    "tinylora-tied": (peft.TinyLoraConfig, {"u": 16, "weight_tying": 0.7, "target_modules": ALL}),
    "trainable-tokens": (
        peft.TrainableTokensConfig,
        {"token_indices": [3, 1, 40], "target_modules": ["word_embeddings"]},
    ),
    "unilora": (peft.UniLoraConfig, {"r": 4, "theta_d_length": 64, "save_indices": True, "target_modules": ALL}),
    "vblora": (peft.VBLoRAConfig, {"r": 4, "num_vectors": 16, "vector_length": 16, "target_modules": ALL}),
    "vblora-topk": (
        peft.VBLoRAConfig,
        {
            "r": 4,
            "num_vectors": 16,
            "vector_length": 16,
            "topk": 3,
            "save_only_topk_weights": True,
            "target_modules": QV,
        },
    ),
}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(base, case, folder):
    """Folder that PEFT saved, and the weights that PEFT itself makes of base and folder."""
    config, fields = CASES[case]
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModel.from_pretrained(base), config(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).merge_and_unload()
    return {name: tensor.detach().numpy() for name, tensor in loaded.state_dict().items()}


def error(got, want):
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts(bases, tmp_path, case):
    base = bases("bert")
    want = trained(base, case, tmp_path / "adapter")
    done = run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    sites = {site["tensor"] for site in json.loads(done.stdout)["sites"]}
    written, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {name for name in before if not np.array_equal(want[name], before[name])}
    assert changed
    assert changed <= sites
    for name in before:
        assert error(written[name], want[name]) <= 1e-6, name
    assert max(error(before[name], want[name]) for name in changed) > 1e-3


def test_every_family_of_this_plugin_is_held_against_peft():
    from importlib.metadata import entry_points

    points = entry_points(group="ssh_deploy.families")
    own = {p.name for p in points if p.value.startswith("ssh_deploy_peft_bridge.")}
    assert own == {name for name in own if any(case == name or case.startswith(f"{name}-") for case in CASES)}
    assert len(own) == 23

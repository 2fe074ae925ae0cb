"""The bridge beside what PEFT says: Conv1D bases, low-rank slots, other kinds, contracts, and folders it refuses."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers import AutoModel

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import CONFIG, WEIGHTS, read_folder
from ssh_deploy.cli.main import main
from ssh_deploy.testing import FamilyContract, random_adapter

QV = ["query", "value"]
GPT2 = {
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 4, "total_step": 10}),
    "deft": (peft.DeftConfig, {"r": 4}),
    "frod": (peft.FrodConfig, {"sparse_rate": 0.05, "progressbar": False}),
    "gralora": (peft.GraloraConfig, {"r": 4}),
    "hira": (peft.HiraConfig, {"r": 4}),
    "pvera": (peft.PveraConfig, {"r": 8}),
    "randlora": (peft.RandLoraConfig, {"r": 4}),
    "tinylora": (peft.TinyLoraConfig, {"u": 16}),
    "unilora": (peft.UniLoraConfig, {"r": 4, "theta_d_length": 64, "save_indices": True}),
    "vblora": (peft.VBLoRAConfig, {"r": 4, "num_vectors": 16, "vector_length": 16}),
}
LOWRANK = {
    **{name: GPT2[name] for name in ("adalora", "gralora", "pvera", "tinylora", "unilora", "vblora")},
    "delora": (peft.DeloraConfig, {"r": 4}),
    "miss": (peft.MissConfig, {"r": 4}),
}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(base, config, fields, folder, targets=("query", "value")):
    """Folder that PEFT saved, and the weights that PEFT itself makes of base and folder."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModel.from_pretrained(base), config(target_modules=list(targets), **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).merge_and_unload()
    return {name: tensor.detach().numpy() for name, tensor in loaded.state_dict().items()}


def error(got, want):
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("case", GPT2)
def test_a_weight_that_is_stored_transposed(bases, tmp_path, case):
    base = bases("gpt2")
    want = trained(base, *GPT2[case], tmp_path / "adapter", targets=("c_attn", "c_fc"))
    done = run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "out" / "model.safetensors")
    moved = 0
    for name, before in load_file(base / "model.safetensors").items():
        assert error(written[name], want[name]) <= 1e-6, name
        moved += error(before, want[name]) > 1e-4
    assert moved == 4


def test_low_rank_methods_fill_low_rank_slots_side_by_side(bases, tmp_path):
    base = bases("bert")
    for name, (config, fields) in LOWRANK.items():
        trained(base, config, fields, tmp_path / name)
    done = run("export", "--onnx", base, *(tmp_path / name for name in LOWRANK), "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output  # the export holds every adapter against torch
    ranks = {
        name: entry["n"]
        for name, entry in json.loads((tmp_path / "out" / "deployment.json").read_text())["adapters"].items()
    }
    assert ranks == {**dict.fromkeys(LOWRANK, 4), "tinylora": 2, "pvera": 8, "gralora": ranks["gralora"]}
    assert ranks["gralora"] <= 8
    checked = run("verify", base, tmp_path / "vblora", tmp_path / "out")
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("config", "fields"),
    [(peft.BOFTConfig, {"boft_block_size": 4}), (peft.MissConfig, {"r": 4, "init_weights": "bat"})],
)
def test_a_change_that_reads_the_weight_is_refused_by_slots(bases, tmp_path, config, fields):
    trained(bases("bert"), config, fields, tmp_path / "a")
    done = run("export", "--onnx", bases("bert"), tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "no slot can hold a peft delta: it changes a weight by what that weight is" in done.output
    assert not (tmp_path / "out").exists()


def test_a_bridged_adapter_becomes_a_lora_that_peft_loads(bases, tmp_path):
    base = bases("bert")
    want = trained(base, *LOWRANK["vblora"], tmp_path / "vblora")
    done = run("convert", tmp_path / "vblora", "-o", tmp_path / "lora", "--to", "lora", "--base", base)
    assert done.exit_code == 0, done.output
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "lora").merge_and_unload()
    for name, tensor in model.state_dict().items():
        assert error(tensor.numpy(), want[name]) <= 2e-6, name
    refused = run("convert", tmp_path / "vblora", "-o", tmp_path / "copy", "--to", "peft", "--base", base)
    assert refused.exit_code == 1
    assert "is read, merged and converted, not written" in refused.output


def test_families_are_merged_together_with_weights(bases, tmp_path):
    base = bases("bert")
    before = load_file(base / "model.safetensors")
    total = {name: tensor.astype(np.float64) for name, tensor in before.items()}
    cases = {
        **{n: LOWRANK[n] for n in ("vblora", "delora")},
        "oft": (peft.OFTConfig, {"oft_block_size": 8}),
        "road": (peft.RoadConfig, {"group_size": 8}),
        "ia3": (peft.IA3Config, {"feedforward_modules": []}),
        "loha": (peft.LoHaConfig, {"r": 2}),
    }
    words = []
    for weight, (name, case) in zip((0.5, 1.5, 0.25, -1, 0.75, 3), cases.items(), strict=True):
        merged = trained(base, *case, tmp_path / name)
        total = {key: total[key] + weight * (merged[key].astype(np.float64) - before[key]) for key in total}
        words += ["--weight", weight]
    ssh = random_adapter({"encoder.layer.0.attention.self.query": (48, 48)}, n=30)
    write_file(ssh, tmp_path / "ssh.safetensors", values_dtype=np.float32)
    for module, delta in ssh.deltas.items():
        total[f"{module}.weight"] += 2 * delta.dense(dtype=torch.float64).numpy()
    paths = [*(tmp_path / name for name in cases), tmp_path / "ssh.safetensors"]
    done = run("merge", base, *paths, *words, "--weight", 2, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert error(tensor, total[key]) <= 2e-6, key


@pytest.mark.parametrize("case", ["road", "glora"])
def test_verify_and_the_merged_export_take_the_biases_along(bases, tmp_path, case):
    base = bases("bert")
    cases = {"road": (peft.RoadConfig, {"group_size": 8}), "glora": (peft.GloraConfig, {"r": 3})}
    trained(base, *cases[case], tmp_path / "a")
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "out").exit_code == 0
    checked = run("verify", base, tmp_path / "a", tmp_path / "out")
    assert checked.exit_code == 0, checked.output


def change(folder, tensors=None, drop=(), **fields):
    """``folder`` with other fields and tensors, None takes a field away."""
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    held = load_file(folder / WEIGHTS) | (tensors or {})
    save_file({k: v for k, v in held.items() if not any(text in k for text in drop)}, folder / WEIGHTS)


FIRST = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("case", "broken", "message"),
    [
        ("vblora", {"topk": None}, "has no topk, which VBLORA computes with"),
        ("vblora", {"vector_length": 8}, "PEFT's own VBLORA layer refuses it"),
        ("vblora", {"drop": ("vector_bank",)}, "no base_model|refuses it"),
        ("vblora", {"drop": (f"{FIRST}.vblora_logits_A",)}, "no base_model.*vblora_logits_A"),
        ("vblora", {"tensors": {f"{FIRST}.vblora_stray": np.zeros(2, np.float32)}}, "vblora_stray.* has no place"),
        (
            "vblora",
            {"tensors": {f"{FIRST}.lora_A.weight": np.zeros((2, 48), np.float32)}},
            "belongs to no adapted module",
        ),
        ("vblora", {"tensors": {f"{FIRST}.vblora_logits_A": np.full((4, 3, 16), np.nan, np.float32)}}, "NaN"),
        ("vblora", {"bias": "all"}, "biases are trained beside the method"),
        ("adalora", {"rank_pattern": {"(a+)+b": 3}}, "could take for ever"),
        ("adalora", {"rank_pattern": [1]}, "no object"),
        ("adalora", {"use_dora": True}, "use_dora is True, which is not covered in ADALORA"),
        ("adalora", {"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is .* not covered"),
        (
            "adalora",
            {"rank_pattern": {"query": 10**9}},
            "'query' is 1000000000; no tensor of the file has a side above",
        ),
        (
            "vblora",
            {"num_vectors": 10**12},
            "num_vectors is 1000000000000; no tensor of the file has a side above 48|16",
        ),
        ("unilora", {"save_indices": False}, "save_indices is not true"),
        ("pvera", {"save_projection": False}, "save_projection is not true"),
        ("tinylora", {"projection_seed": 99}, "is not what projection_seed 99 gives"),
        ("tinylora", {"drop": ("tinylora_v.1",)}, "are not one vector for each group"),
        ("gralora", {"r": "four"}, "refuses it"),
    ],
)
def test_broken_folders_say_what_and_where(bases, tmp_path, case, broken, message):
    import re

    base = bases("bert")
    trained(base, *LOWRANK[case], tmp_path / "a")
    change(tmp_path / "a", **broken)
    done = run("merge", base, tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert re.search(message, done.output), done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"token_indices": [3, 3]}, "are not distinct rows below 64"),
        ({"token_indices": [3, 64]}, "are not distinct rows below 64"),
        ({"token_indices": [3, True]}, "are not distinct rows below 64"),
        ({"token_indices": None}, "are not distinct rows below 64"),
        ({"token_indices": [3]}, "1 rows of 48 were expected"),
    ],
)
def test_broken_tokens(bases, tmp_path, broken, message):
    base = bases("bert")
    trained(base, peft.TrainableTokensConfig, {"token_indices": [3, 1]}, tmp_path / "a", targets=["word_embeddings"])
    change(tmp_path / "a", **broken)
    done = run("merge", base, tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert message in done.output


def test_a_bias_that_is_not_there_is_refused(tmp_path):
    from ssh_deploy_peft_bridge.deltas import LayerChange
    from ssh_deploy_peft_bridge.one_module import OneModule

    tensors = {"m.beft_bias": np.ones((1, 6), np.float32)}
    module = OneModule("a: m", "m", {"peft_type": "BEFT"}, tensors, (6, 4), None, biased=True)
    np.testing.assert_array_equal(LayerChange(module, 6).bias_change(None), np.ones(6))


class TestC3A(FamilyContract):
    """ΔW of circulant blocks: ``(i, j)`` of a block is the kernel at ``(j − i) mod b``, over in."""

    family = "c3a"

    def example(self, rng):
        out, inn, b = 8, 12, 4
        kernel = rng.normal(size=(out // b, inn // b, b)).astype(np.float32)
        turn = (np.arange(b)[None, :] - np.arange(b)[:, None]) % b
        blocks = kernel[:, :, turn].astype(np.float64)
        dense = blocks.transpose(0, 2, 1, 3).reshape(out, inn) / inn
        return (
            {"peft_type": "C3A", "block_size": b},
            {"base_model.model.a.b.c3a_kernel": kernel},
            {"a.b": (out, inn)},
            {"a.b": dense},
        )


class TestVBLoRA(FamilyContract):
    """Rows of A and B put together from vectors of a bank, by the softmax of the strongest logits."""

    family = "vblora"

    def example(self, rng):
        out, inn, length, r, count = 8, 12, 4, 2, 5
        bank = rng.normal(size=(count, length)).astype(np.float32)
        a, b = (rng.normal(size=s).astype(np.float32) for s in ((r, inn // length, count), (out // length, r, count)))

        def rows(logits):
            top = np.sort(np.argsort(logits, -1)[..., -2:], -1)
            weights = np.exp(np.take_along_axis(logits, top, -1).astype(np.float64))
            return ((weights / weights.sum(-1, keepdims=True))[..., None] * bank[top]).sum(-2)

        dense = rows(b).transpose(0, 2, 1).reshape(out, r) @ rows(a).reshape(r, inn)
        config = {"peft_type": "VBLORA", "r": r, "num_vectors": count, "vector_length": length, "topk": 2}
        tensors = {
            "base_model.model.a.b.vblora_logits_A": a,
            "base_model.model.a.b.vblora_logits_B": b,
            "base_model.vblora_vector_bank": bank,
        }
        return config, tensors, {"a.b": (out, inn)}, {"a.b": dense}


def test_trained_numbers_are_counted(bases, tmp_path):
    trained(bases("bert"), *LOWRANK["delora"], tmp_path / "a")
    shapes = {f"encoder.layer.{i}.attention.self.{m}": (48, 48) for i in (0, 1) for m in QV}
    adapter = read_folder(tmp_path / "a", shapes=shapes)
    assert {d.parameters for d in adapter.deltas.values()} == {2 * 4 * 48 + 1}

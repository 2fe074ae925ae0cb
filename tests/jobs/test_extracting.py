"""Adapters out of fine-tuned checkpoints: what merges back, what has no place, what is refused."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.cli.main import main

LABELS = {0: "ham", 1: "spam", 2: "eggs"}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def extract(*words):
    done = run("extract", *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def tune(base, folder, kind=AutoModelForSequenceClassification, also=(), rank=2, ends=("query.weight",), **fields):
    """``base`` with a change of ``rank`` in its queries, and random ones in what ``also`` names parts of."""
    torch.manual_seed(3)
    model = kind.from_pretrained(base, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ends):
                out, inn = parameter.shape
                parameter.add_(torch.randn(out, rank) @ torch.randn(rank, inn) * 0.05)
            if any(text in name for text in also):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tuned(pico, tmp_path):
    return tune(pico("bert"), tmp_path / "tuned", id2label=LABELS, num_labels=3)


def largest_error(a, b):
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(one) == set(two)
    return max(float(np.abs(one[name].astype(np.float64) - two[name]).max()) for name in one)


@pytest.mark.parametrize(
    "words",
    [
        ("--to", "ssh", "--energy", 1),
        ("--to", "ssh", "--transform", "hartley-joint", "--energy", 1),
        ("--to", "sdctft", "--energy", 1),
        ("--to", "lora", "--rank", 2),
        ("--to", "lora"),
    ],
)
def test_merged_back_it_is_the_checkpoint(pico, tuned, tmp_path, words):
    out = tmp_path / ("a" if "lora" in words else "a.safetensors")
    done = extract(pico("bert"), tuned, "-o", out, *words, "--values", "float32")
    assert done["energy"] == pytest.approx(1)
    assert (done["lost"], done["heads"]) == ({}, ["classifier"])
    adapter = read_adapter(out)
    assert (adapter.task, adapter.labels) == ("text-classification", ("ham", "spam", "eggs"))
    merged = run("merge", pico("bert"), out, "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert largest_error(tmp_path / "merged", tuned) < 1e-6
    if "lora" not in words:
        assert "base unverified" not in merged.output
        other = run("merge", pico("bert", seed=1), out, "-o", tmp_path / "other")
        assert other.exit_code == 1
        assert "trained on another base" in other.output


def test_what_is_kept_is_what_was_asked_for(pico, tuned, tmp_path):
    done = extract(pico("bert"), tuned, "-o", tmp_path / "a.safetensors", "--coefficients", 700)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert {d.parameters for d in adapter.deltas.values()} == {700}
    before, after = AutoModel.from_pretrained(pico("bert")), AutoModelForSequenceClassification.from_pretrained(tuned)
    kept = total = 0.0
    for module, delta in adapter.deltas.items():
        own = module.removeprefix("bert.")
        change = (after.get_submodule(module).weight - before.get_submodule(own).weight).detach()
        total += float(change.square().sum())
        kept += float(change.square().sum() - (change - delta.dense()).square().sum())
    assert done["energy"] == pytest.approx(kept / total, abs=1e-3)
    refused = run("extract", pico("bert"), tuned, "-o", tmp_path / "b.safetensors", "--coefficients", 20)
    assert refused.exit_code == 1
    assert "of ΔW's energy, and 50% must be kept" in refused.output
    assert not (tmp_path / "b.safetensors").exists()


def test_what_has_no_place_is_named_with_its_share(pico, tmp_path):
    base = pico("bert")
    tuned = tune(base, tmp_path / "tuned", also=("word_embeddings", "LayerNorm.weight", "query.bias"))
    words = ("extract", base, tuned, "-o", tmp_path / "a.safetensors", "--energy", 0.9)
    refused = run(*words)
    assert refused.exit_code == 1
    assert "is in tensors that no adapter can hold (bert.embeddings.word_embeddings.weight" in refused.output
    assert not (tmp_path / "a.safetensors").exists()
    done = json.loads(run(*words, "--ignore", "--json").stdout)
    one, two = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    energies = {n: float(np.square(two[f"bert.{n}"].astype(np.float64) - t).sum()) for n, t in one.items()}
    total = sum(energies.values())
    lost = {f"bert.{n}": e / total for n, e in energies.items() if e and not n.endswith("query.weight")}
    assert done["lost"] == pytest.approx(lost, rel=1e-4)
    assert len(lost) == 1 + 5 + 2
    assert list(done["lost"].values()) == sorted(done["lost"].values(), reverse=True)
    said = run(*words[:-2], "--ignore", "--energy", 0.9)
    assert "exists already" in said.output
    allowed = run(*words[:4], tmp_path / "b.safetensors", "--energy", 0.9, "--tolerance", 1)
    assert "of all changes left out" in allowed.output
    assert "Left out: bert.embeddings.word_embeddings.weight" in allowed.output


def test_a_weight_that_is_stored_transposed_and_no_head(pico, tmp_path):
    base = pico("gpt2", "causal-lm")
    tuned = tune(base, tmp_path / "tuned", kind=AutoModelForCausalLM, ends=("c_attn.weight", "c_proj.weight"))
    done = extract(base, tuned, "-o", tmp_path / "a", "--to", "lora", "--rank", 2)
    assert done["energy"] == pytest.approx(1)
    assert done["heads"] == []
    assert read_adapter(tmp_path / "a").task == "causal-lm"
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "merged").exit_code == 0
    assert largest_error(tmp_path / "merged", tuned) < 1e-6


def test_a_head_that_both_have_is_taken_whole(pico, tmp_path):
    base = pico("bert", "text-classification")
    tuned = tune(base, tmp_path / "tuned", also=("classifier",))
    done = extract(base, tuned, "-o", tmp_path / "a", "--to", "lora", "--rank", 2)
    assert done["heads"] == ["classifier"]
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "merged").exit_code == 0
    assert largest_error(tmp_path / "merged", tuned) < 1e-6


def test_names_that_transformers_changed(pico, tmp_path):
    base = pico("vit")
    tuned = tune(base, tmp_path / "tuned", kind=AutoModel, ends=("q_proj.weight",))
    done = extract(base, tuned, "-o", tmp_path / "a", "--to", "lora", "--rank", 2)
    assert len(done["shares"]) == 2
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "merged").exit_code == 0
    assert largest_error(tmp_path / "merged", tuned) < 1e-6


def test_a_copy_in_another_precision_is_noted(pico, tmp_path):
    tuned = tune(pico("bert"), tmp_path / "tuned", dtype=torch.bfloat16)
    done = extract(pico("bert"), tuned, "-o", tmp_path / "a", "--to", "lora", "--rank", 4, "--ignore")
    assert any("rounding counts as change" in note for note in done["notes"])


@pytest.mark.parametrize("what", ["nothing", "architecture", "vocabulary", "nan", "exists", "lora-file", "option"])
def test_refused_with_the_reason(pico, tuned, tmp_path, what):
    base, out, words = pico("bert"), tmp_path / "a.safetensors", ()
    if what == "nothing":
        tuned, message = base, "no matrix of a linear module differs"
    elif what == "architecture":
        tuned, message = pico("gpt2"), "is a bert"
    elif what == "vocabulary":
        model = AutoModel.from_pretrained(base)
        model.resize_token_embeddings(70)
        model.save_pretrained(tmp_path / "large")
        tuned, message = tmp_path / "large", "Was the vocabulary resized?"
    elif what == "nan":
        tensors = load_file(tuned / "model.safetensors")
        tensors["bert.encoder.layer.0.attention.self.query.weight"][0, 0] = np.nan
        save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
        message = "NaN or infinite numbers"
    elif what == "exists":
        out.write_text("precious")
        message = "exists already"
    elif what == "lora-file":
        words, message = ("--to", "lora"), "a compact file holds spectra"
    else:
        words, message = ("--rank", 3), "--rank says nothing of --to ssh"
    done = run("extract", base, tuned, "-o", out, *words)
    assert done.exit_code == 1, done.output
    assert message in done.output
    assert not out.exists() or out.read_text() == "precious"

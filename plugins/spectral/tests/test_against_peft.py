"""PEFT's own layers, saved by PEFT: merged weights, graphs and banks against them, from the command line."""

import json

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from exported_folders import write_adapter
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from ssh_deploy.cli.main import main

BERT, BOTH = ["query", "value"], ["query", "intermediate.dense", "output.dense"]
CASES = {
    "fourierft": ("bert", peft.FourierFTConfig, {"n_frequency": 60, "scaling": 60.0, "target_modules": BOTH}),
    "patterns": (
        "bert",
        peft.FourierFTConfig,
        {
            "n_frequency": 50,
            "n_frequency_pattern": {"value": 7, "layer.1.attention.self.query": 2304},
            "scaling": 60.0,
            "random_loc_seed": 3,
            "target_modules": BERT,
        },
    ),
    "waveft": ("bert", peft.WaveFTConfig, {"n_frequency": 300, "scaling": 2.0, "target_modules": BOTH}),
    "waveft-db3": (
        "bert",
        peft.WaveFTConfig,
        {"n_frequency": 300, "scaling": 2.0, "wavelet_family": "db3", "target_modules": BOTH},
    ),
    "waveft-share": (
        "bert",
        peft.WaveFTConfig,
        {"n_frequency": 200, "scaling": 2.0, "proportional_parameters": True, "target_modules": BOTH},
    ),
    "waveft-conv1d": (
        "gpt2",
        peft.WaveFTConfig,
        {"n_frequency": 300, "scaling": 2.0, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]},
    ),
    "conv1d": (
        "gpt2",
        peft.FourierFTConfig,
        {"n_frequency": 60, "scaling": 60.0, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]},
    ),
}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(base, config, fields, folder, kind=AutoModel, seed=5, **more):
    """The model that PEFT saved to ``folder``, every parameter of the adapter moved off its start."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(kind.from_pretrained(base), config(**fields, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def error(got, want):
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts(bases, tmp_path, case):
    architecture, config, fields = CASES[case]
    base = bases(architecture)
    model = trained(base, config, fields, tmp_path / "adapter")
    want = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
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


@pytest.mark.filterwarnings("ignore:.*module_shapes.*:UserWarning")  # ours, which PEFT says it ignores
@pytest.mark.parametrize("form", ["file", "peft"])
def test_converted_it_is_loaded_as_the_same(bases, tmp_path, form):
    base = bases("bert")
    _, config, fields = CASES["patterns"]
    want = trained(base, config, fields, tmp_path / "a").merge_and_unload().state_dict()
    other = tmp_path / ("b.safetensors" if form == "file" else "b")
    words = ["--values", "float32"] if form == "file" else []
    done = run("convert", tmp_path / "a", "-o", other, "--to", form, "--base", base, *words)
    assert done.exit_code == 0, done.output
    if form == "file":
        assert run("merge", base, other, "-o", tmp_path / "out").exit_code == 0
        got = load_file(tmp_path / "out" / "model.safetensors")
    else:
        model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), other).merge_and_unload()
        got = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, tensor in got.items():
        assert error(tensor, want[name].numpy()) <= 1e-6, name


def test_inspect_says_what_it_is(bases, tmp_path):
    base = bases("bert")
    _, config, fields = CASES["patterns"]
    trained(base, config, fields, tmp_path / "a")
    done = run("inspect", tmp_path / "a", "--base", base, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["family"], found["transforms"], found["fits"]) == ("fourierft", ["fourier"], True)
    assert found["settings"] == {"n": 2304, "seed": 3}
    assert {m["parameters"] for m in found["modules"]} == {7, 50, 2304}
    alone = run("inspect", tmp_path / "a")
    assert alone.exit_code == 1
    assert "--base" in alone.output


TEXTS = ["free prize call now", "what is the film"]


def test_one_batch_holds_it_beside_ssh_and_answers_as_peft_does(bases, tmp_path):
    """Two FourierFT adapters with heads of their own and an SSH one, in one graph: each row as its own model alone."""
    base = bases("bert", "text-classification")
    models = {}
    for seed, name in enumerate(("one", "two")):
        fields = {"n_frequency": 80 - 30 * seed, "scaling": 20.0, "random_loc_seed": seed, "target_modules": BERT}
        kind, task = AutoModelForSequenceClassification, {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
        models[name] = trained(base, peft.FourierFTConfig, fields, tmp_path / name, kind, seed, **task)
    write_adapter(tmp_path / "ssh.safetensors", base, "bert", labels=3, seed=9)
    given = [tmp_path / "one", tmp_path / "ssh.safetensors"]
    done = run("export", "--onnx", base, *given, "-o", tmp_path / "out", "--adapter-dtype", "float32", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kinds"] == ["hartley", "head"]
    words = ["run", tmp_path / "out", "--load", f"two={tmp_path / 'two'}", "--max-coefficients", 200, "--json"]
    names = ["one", "two", "ssh", "one"]
    texts = [TEXTS[0], TEXTS[0], TEXTS[0], TEXTS[1]]
    batch = run(*words, *(w for n, t in zip(names, texts, strict=True) for w in ("--adapter", n, "--text", t)))
    assert batch.exit_code == 0, batch.output
    answers = json.loads(batch.stdout)["answers"]
    tokenizer, seen = AutoTokenizer.from_pretrained(base), []
    for name, text, answer in zip(names, texts, answers, strict=True):
        seen.append(answer["score"])
        if name in models:
            with torch.no_grad():
                logits = models[name](**tokenizer(text, return_tensors="pt")).logits[0]
            assert answer["label"] == f"LABEL_{int(logits.argmax())}"
            assert answer["score"] == pytest.approx(float(torch.softmax(logits, -1).max()), abs=2e-5)
    assert min(abs(one - other) for i, one in enumerate(seen) for other in seen[:i]) > 1e-4


def test_a_waveft_is_merged_and_not_exported_with_slots(bases, tmp_path):
    base = bases("bert")
    _, config, fields = CASES["waveft"]
    trained(base, config, fields, tmp_path / "a")
    done = run("inspect", tmp_path / "a", "--base", base)
    assert done.exit_code == 0, done.output
    assert "waveft" in done.output
    done = run("export", "--onnx", base, tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "no slot can hold a wavelet delta" in done.output
    assert "--mode merged" in done.output
    assert not (tmp_path / "out").exists()
    done = run("convert", tmp_path / "a", "-o", tmp_path / "a.safetensors", "--base", base)
    assert done.exit_code == 1
    assert "a compact file holds spectra" in done.output


def test_a_slot_of_another_kind_is_refused(bases, tmp_path):
    base = bases("bert")
    _, config, fields = CASES["fourierft"]
    trained(base, config, fields, tmp_path / "a")
    done = run("export", "--onnx", base, "-o", tmp_path / "out", "--sites", "linear", "--kinds", "cosine")
    assert done.exit_code == 0, done.output
    done = run("add", tmp_path / "out", f"a={tmp_path / 'a'}")
    assert done.exit_code == 1
    assert "needs a hartley slot; the graph has cosine" in done.output

"""Converting one kind into another, from the command line: what is kept, what is refused, what a graph takes."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ssh_deploy import Deployment
from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.cli.main import main
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.testing import random_adapter

MODULES = {"bert.encoder.layer.0.output.dense": (48, 80), "bert.encoder.layer.1.attention.self.key": (48, 48)}
HEAD = {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def convert(*words):
    done = run("convert", *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def lora(tmp_path):
    rng = np.random.default_rng(0)
    deltas = {
        m: LowRankDelta(rng.normal(size=(4, n)).astype(np.float32), rng.normal(size=(o, 4)).astype(np.float32), 0.5)
        for m, (o, n) in MODULES.items()
    }
    labels, head = ("x", "y", "z"), {"classifier": ReplacedModule(HEAD)}
    adapter = Adapter("lora", deltas, head, "", tmp_path, base="org/b", task="text-classification", labels=labels)
    write_folder(adapter, tmp_path / "lora")
    return tmp_path / "lora"


def energy_left(before, after):
    """Share of ‖ΔW‖² in what was kept, measured on the dense matrices."""
    a, b = ({m: d.dense(dtype=torch.float64) for m, d in adapter.deltas.items()} for adapter in (before, after))
    return 1 - sum(float((a[m] - b[m]).square().sum()) for m in a) / sum(float(a[m].square().sum()) for m in a)


@pytest.mark.parametrize("kind", ["ssh", "sdctft"])
def test_a_lora_becomes_a_spectrum(lora, tmp_path, kind):
    done = convert(lora, "-o", tmp_path / "a.safetensors", "--to", kind, "--energy", 0.9)
    before, after = read_adapter(lora), read_adapter(tmp_path / "a.safetensors")
    assert (after.family, after.labels, after.task, after.base) == (kind, before.labels, before.task, before.base)
    np.testing.assert_array_equal(after.replaced["classifier"].tensors["weight"], HEAD["weight"])
    assert 0.9 <= done["energy"] < 0.93
    assert energy_left(before, after) == pytest.approx(done["energy"], abs=1e-4)
    assert {m: d.parameters for m, d in after.deltas.items()} == {m: s["size"] for m, s in done["shares"].items()}
    assert done["rounding"] < 2**-11


def test_the_joint_transform_and_a_count_are_taken(lora, tmp_path):
    convert(
        lora, "-o", tmp_path / "a.safetensors", "--to", "ssh", "--transform", "hartley-joint", "--coefficients", 900
    )
    after = read_adapter(tmp_path / "a.safetensors")
    assert {(d.transform, d.parameters) for d in after.deltas.values()} == {("hartley-joint", 900)}
    assert after.settings["n"] == 900


def test_too_little_energy_is_refused_with_what_would_do(lora, tmp_path):
    done = run("convert", lora, "-o", tmp_path / "a.safetensors", "--to", "ssh", "--coefficients", 20)
    assert done.exit_code == 1
    assert "of ΔW's energy, and 50% must be kept" in done.output
    share = done.output.split("--min-energy ")[1].split()[0]
    assert not (tmp_path / "a.safetensors").exists()
    convert(lora, "-o", tmp_path / "a.safetensors", "--to", "ssh", "--coefficients", 20, "--min-energy", share)


@pytest.mark.parametrize("transform", ["hartley", "hartley-joint", "cosine"])
def test_a_spectrum_becomes_the_same_lora_and_peft_merges_it(pico, tmp_path, transform):
    import peft
    from transformers import AutoModel

    modules = {m.removeprefix("bert."): shape for m, shape in MODULES.items()}
    write_file(random_adapter(modules, n=12, transform=transform), tmp_path / "a.safetensors", values_dtype=np.float32)
    done = convert(tmp_path / "a.safetensors", "-o", tmp_path / "lora", "--to", "lora")
    assert done["energy"] == pytest.approx(1)
    base = AutoModel.from_pretrained(pico("bert"))
    before = {m: base.get_submodule(m).weight.detach().clone() for m in modules}
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    for module, delta in read_adapter(tmp_path / "a.safetensors").deltas.items():
        want = before[module] + delta.dense()
        torch.testing.assert_close(
            merged.get_submodule(module).weight, want, rtol=0, atol=1e-6 * float(want.abs().max())
        )


def test_a_lora_loses_rank_and_a_note_says_when_it_is_too_large(lora, tmp_path):
    done = convert(lora, "-o", tmp_path / "small", "--to", "lora", "--rank", 2)
    after = read_adapter(tmp_path / "small")
    assert {d.rank for d in after.deltas.values()} == {2}
    assert energy_left(read_adapter(lora), after) == pytest.approx(done["energy"], abs=1e-6)
    write_file(random_adapter(MODULES, n=400), tmp_path / "wide.safetensors")
    wide = run("convert", tmp_path / "wide.safetensors", "-o", tmp_path / "wide", "--to", "lora")
    assert "2 of 2 matrices the factors are larger than ΔW itself" in wide.output
    assert "bert.encoder.layer.0.output.dense" in wide.output


def test_a_change_that_reads_the_weight_needs_the_base(pico, tmp_path):
    import peft
    from transformers import AutoModel

    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModel.from_pretrained(pico("bert")), peft.LoraConfig(r=2, use_dora=True, target_modules=["key"])
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "dora")
    refused = run("convert", tmp_path / "dora", "-o", tmp_path / "a.safetensors", "--to", "ssh")
    assert refused.exit_code == 1
    assert "depends on the weight it changes (dora)" in refused.output
    words = ("--to", "ssh", "--energy", 1, "--values", "float32", "--base", pico("bert"))
    convert(tmp_path / "dora", "-o", tmp_path / "a.safetensors", *words)
    base = AutoModel.from_pretrained(pico("bert"))
    merged = model.merge_and_unload()
    for module, delta in read_adapter(tmp_path / "a.safetensors").deltas.items():
        want = merged.get_submodule(module).weight - base.get_submodule(module).weight
        torch.testing.assert_close(delta.dense(), want, rtol=0, atol=1e-5)


def test_a_change_of_biases_is_not_dropped_in_silence(pico, tmp_path):
    import peft
    from transformers import AutoModel

    config = peft.IA3Config(target_modules=["key"], feedforward_modules=[])
    peft.get_peft_model(AutoModel.from_pretrained(pico("bert")), config).save_pretrained(tmp_path / "ia3")
    done = run("convert", tmp_path / "ia3", "-o", tmp_path / "a.safetensors", "--to", "ssh", "--base", pico("bert"))
    assert done.exit_code == 1
    assert "changes the bias too" in done.output


def test_rows_for_one_graph_answer_as_the_adapter_does(exported, tmp_path):
    _, files, folder = exported("bert")
    made = tmp_path / "headed.onnx_adapter"
    done = convert(files["headed"], "-o", made, "--to", "onnx-adapter", "--for", folder)
    assert done["bytes_after"] == made.stat().st_size
    assert "bert-0, bert-1" in done["notes"][0]
    with Deployment.open(folder) as deployment:
        deployment.load("own", made)
        deployment.load("file", files["headed"])
        texts = ["what is the film", "call now"] * 2
        answers = deployment.predict(texts, adapters=["own", "own", "file", "file"])
        np.testing.assert_array_equal([a.logits for a in answers[:2]], [a.logits for a in answers[2:]])
        assert answers[0].score != deployment.predict(texts[:1])[0].score


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "file", "--coefficients", "5"], "--coefficients says nothing of --to file"),
        (["--energy", "0.5"], "--energy says nothing of --to file"),
        (["--to", "lora", "--coefficients", "5"], "--coefficients says nothing of --to lora"),
        (["--to", "ssh", "--rank", "5"], "--rank says nothing of --to ssh"),
        (["--to", "sdctft", "--transform", "hartley"], "--to sdctft with --transform hartley"),
        (["--to", "ssh", "--energy", "1.5"], "--energy 1.5 is no share"),
        (["--to", "ssh", "--energy", "nan"], "--energy nan is no share"),
        (["--to", "ssh", "--coefficients", "0"], "keeps nothing"),
        (["--to", "lora", "--rank", "0"], "keeps nothing"),
        (["--to", "ssh", "--min-energy", "2"], "--min-energy 2 is no share"),
        (["--to", "ssh", "--coefficients", "5", "--energy", "0.5"], "Both --coefficients and --energy"),
        (["--to", "onnx-adapter"], "go together"),
        (["--to", "ssh", "--for", "x"], "go together"),
    ],
)
def test_options_that_say_nothing_are_refused(lora, tmp_path, words, message):
    done = run("convert", lora, "-o", tmp_path / "out.safetensors", *words)
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "out.safetensors").exists()


def test_a_lora_is_no_compact_file(lora, tmp_path):
    done = run("convert", lora, "-o", tmp_path / "a.safetensors", "--to", "lora")
    assert done.exit_code == 1
    assert "a compact file holds spectra" in done.output

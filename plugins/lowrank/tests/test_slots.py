"""Low-rank adapters as slots: exported, added, packed, mixed with spectra in one batch, held against torch and PEFT."""

import copy
import json

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ssh_deploy.adapters.file import write_file
from ssh_deploy.cli.main import main
from ssh_deploy.errors import AdapterMismatchError, DeployError
from ssh_deploy.runtimes.deployment import Deployment
from ssh_deploy.testing import random_adapter

pytestmark = pytest.mark.slow

SITES = [f"bert.encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")]
TARGETS = ["query", "value"]
#: name: how PEFT makes it; the last is wider than the others
LORAS = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 10}),
    "vera": (peft.VeraConfig, {"r": 6}),
    "wide": (peft.LoraConfig, {"r": 12, "use_rslora": True}),
}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(base, config, fields, folder, *, kind=AutoModelForSequenceClassification, seed=5):
    """Folder that PEFT saved; returns the adapted model in the state that was saved."""
    torch.manual_seed(seed)
    task = "CAUSAL_LM" if kind is AutoModelForCausalLM else "SEQ_CLS"
    model = peft.get_peft_model(kind.from_pretrained(base), config(task_type=task, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def feeds(batch, length=7, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 60, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def answers(model, given):
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()


@pytest.fixture(scope="session")
def bank(bases, tmp_path_factory):
    """Exported folder with an SSH adapter, two low-rank ones and one added afterwards; and torch's models."""
    folder, base = tmp_path_factory.mktemp("lowrank"), bases("bert", "text-classification")
    models = {name: trained(base, c, {**f, "target_modules": TARGETS}, folder / name) for name, (c, f) in LORAS.items()}
    spectra = random_adapter(dict.fromkeys(SITES, (48, 48)), alpha=60.0)
    write_file(spectra, folder / "ssh.safetensors", values_dtype=np.float32)
    given = [folder / "ssh.safetensors", folder / "lora", folder / "vera"]
    done = run("export", "--onnx", base, *given, "-o", folder / "out", "--adapter-dtype", "float32", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kinds"] == ["hartley", "lowrank", "head"]
    done = run("add", folder / "out", folder / "wide", "--json")
    assert done.exit_code == 0, done.output
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    models[None] = AutoModelForSequenceClassification.from_pretrained(base).eval()
    with torch.no_grad():
        for module, delta in spectra.deltas.items():
            delta.add_to(model.get_submodule(module).weight)
    models["ssh"] = model
    return folder, models


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


def test_a_mixed_batch_is_torch_row_by_row_and_each_row_is_itself_alone(bank):
    folder, models = bank
    names = ["lora", "ssh", None, "wide", "vera", "lora"]
    given = feeds(len(names))
    with Deployment.open(folder / "out") as deployment:
        mixed = deployment.run(given, names)["logits"]
        for i, name in enumerate(names):
            own = {key: array[i : i + 1] for key, array in given.items()}
            want = answers(models[name], own)
            close(mixed[i : i + 1, : want.shape[1]], want)
            alone = deployment.run(own, [name])["logits"]
            np.testing.assert_array_equal(mixed[i : i + 1, : alone.shape[1]], alone)
    effects = [np.abs(answers(models[name], given) - answers(models[None], given)).max() for name in names if name]
    assert min(effects) > 0.02


def test_a_sum_of_adapters_of_two_families_is_the_sum_of_their_changes(bank):
    folder, models = bank
    given = feeds(2)
    base, changed = (models[None].state_dict(), models[None].state_dict())
    lora, ssh = (model.state_dict() for model in (copy.deepcopy(models["lora"]).merge_and_unload(), models["ssh"]))
    for key in changed:
        if "classifier" in key:
            changed[key] = lora[key]
        else:
            changed[key] = base[key] + 0.5 * (lora[key] - base[key]) + (ssh[key] - base[key])
    model = copy.deepcopy(models[None])
    model.load_state_dict(changed)
    with Deployment.open(folder / "out") as deployment:
        close(deployment.run(given, "0.5*lora+ssh")["logits"], answers(model, given))
        doubled = deployment.run(given, "0.5*lora+0.5*lora")["logits"]
        close(doubled, deployment.run(given, "lora")["logits"])


def test_a_folder_from_peft_is_loaded_into_the_bank(bank, bases, tmp_path):
    folder, _ = bank
    base = bases("bert", "text-classification")
    model = trained(base, peft.LoraConfig, {"r": 2, "target_modules": ["query"]}, tmp_path / "new", seed=9)
    given = feeds(3)
    with Deployment.open(folder / "out") as deployment:
        deployment.load("new", tmp_path / "new")
        close(deployment.run(given, "new")["logits"], answers(model, given))
        assert deployment.how_many_fit().max_coefficients["lowrank"] == 12


def test_a_rank_beyond_the_banks_is_refused_with_both_numbers(bank, bases, tmp_path):
    folder, _ = bank
    base = bases("bert", "text-classification")
    model = trained(base, peft.LoraConfig, {"r": 20, "target_modules": ["query"]}, tmp_path / "high")
    with Deployment.open(folder / "out") as deployment, pytest.raises(AdapterMismatchError) as refused:
        deployment.load("high", tmp_path / "high")
    assert "20 lowrank_rank where every row of this bank holds 12" in str(refused.value)
    assert "max_rank=20" in str(refused.value)
    with Deployment.open(folder / "out", max_rank=20) as deployment:
        deployment.load("high", tmp_path / "high")
        close(deployment.run(feeds(2), "high")["logits"], answers(model, feeds(2)))
    words = ["run", folder / "out", "--load", f"high={tmp_path / 'high'}", "--adapter", "high", "--text", "a good film"]
    assert "max_rank=20" in run(*words).output
    done = run(*words, "--max-rank", "20")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("config", "rank"), [(peft.LoHaConfig, 9), (peft.LoKrConfig, 12)])
def test_what_is_a_product_exactly_is_lent_as_one(bank, bases, tmp_path, config, rank):
    folder, _ = bank
    fields = {"r": 3} if config is peft.LoHaConfig else {"r": 2}
    model = trained(bases("bert", "text-classification"), config, {**fields, "target_modules": TARGETS}, tmp_path / "x")
    given = feeds(3)
    with Deployment.open(folder / "out", max_rank=rank) as deployment:
        deployment.load("x", tmp_path / "x")
        close(deployment.run(given, "x")["logits"], answers(model, given))
        mixed = deployment.run(given, ["x", "ssh", "x"])["logits"]
        close(mixed[::2], answers(model, {name: array[::2] for name, array in given.items()}))
    with Deployment.open(folder / "out", max_rank=rank - 1) as deployment, pytest.raises(AdapterMismatchError):
        deployment.load("x", tmp_path / "x")


def test_run_and_verify_on_the_command_line(bank, bases):
    folder, _ = bank
    done = run("run", folder / "out", "--adapter", "lora", "--adapter", "ssh", "--text", "good film", "--text", "bad")
    assert done.exit_code == 0, done.output
    done = run("verify", bases("bert", "text-classification"), folder / "wide", folder / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"] is True
    done = run("run", folder / "out", "--how-many-fit", "--memory", "1MB")
    assert "lowrank: " in done.output
    assert "(rank up to 12)" in done.output
    done = run("run", folder / "out", "--how-many-fit", "--memory", "1MB", "--max-rank", "20")
    assert "(rank up to 20)" in done.output


def test_a_packed_bank_feeds_stock_onnxruntime(bank, tmp_path):
    folder, models = bank
    done = run("pack", folder / "out", "-o", tmp_path / "bank.onnx_adapter", "--json")
    assert done.exit_code == 0, done.output
    ids = json.loads(done.stdout)["ids"]
    names = ["wide", "ssh", "lora"]
    given = feeds(len(names))
    session = ort.InferenceSession(folder / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "bank.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    numbers = {key: np.array([ids[name][key] for name in names]) for key in ids["wide"]}
    (logits,) = session.run(["logits"], {**given, **numbers}, options)
    for i, name in enumerate(names):
        want = answers(models[name], {key: array[i : i + 1] for key, array in given.items()})
        close(logits[i : i + 1, : want.shape[1]], want)


def spoilt(name, arrays):
    if name == "NaN":
        arrays["adapter_lowrank_a.48"][0, 0, 0, 0] = np.nan
    elif name == "half of it":
        del arrays["adapter_lowrank_b.48"]
    elif name == "two ranks":
        arrays["adapter_lowrank_b.48"] = arrays["adapter_lowrank_b.48"][..., :2]
    else:
        arrays["adapter_lowrank_a.48"] = arrays["adapter_lowrank_a.48"].astype(np.float16)
    return arrays


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NaN", "values are NaN or infinite"),
        ("half of it", r"has \['adapter_lowrank_a\.48'\] where the graph takes"),
        ("two ranks", r"adapter_lowrank_b\.48 is float32 .* where the graph takes"),
        ("float16", r"adapter_lowrank_a\.48 is float16 .* where the graph takes float32"),
    ],
)
def test_files_of_rows_that_cannot_be_are_refused(bank, tmp_path, name, message):
    folder, _ = bank
    read = ort.AdapterFormat.read_adapter(str(folder / "out" / "adapters" / "lora.onnx_adapter")).get_parameters()
    arrays = {key: value.numpy().copy() for key, value in read.items() if "head" not in key}
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    parameters = {
        key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for key, a in spoilt(name, arrays).items()
    }
    made.set_parameters(parameters)
    made.export_adapter(str(tmp_path / "x.onnx_adapter"))
    with Deployment.open(folder / "out") as deployment, pytest.raises(DeployError, match=message):
        deployment.load("x", tmp_path / "x.onnx_adapter")


@pytest.mark.parametrize("inputs", ["optional", "required"])
def test_conv1d_of_gpt2(bases, tmp_path, inputs):
    base = bases("gpt2", "causal-lm")
    fields = {"r": 3, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    trained(base, peft.LoraConfig, fields, tmp_path / "lora", kind=AutoModelForCausalLM)
    words = ["export", "--onnx", base, tmp_path / "lora", "-o", tmp_path / "out", "--adapter-inputs", inputs, "--json"]
    done = run(*words)  # validates against torch, which adds ΔW to the weights
    assert done.exit_code == 0, done.output
    checked = json.loads(done.stdout)["validation"]["lora"]
    assert checked["effect"] > 1e-2


def test_slots_are_reserved_for_adapters_to_come(bases, tmp_path):
    base = bases("bert", "text-classification")
    model = trained(base, peft.LoraConfig, {"r": 5, "target_modules": TARGETS}, tmp_path / "lora")
    done = run("export", "--onnx", base, "-o", tmp_path / "out", "--sites", "attention", "--kinds", "lowrank,head")
    assert done.exit_code == 0, done.output
    with Deployment.open(tmp_path / "out") as deployment:
        deployment.load("late", tmp_path / "lora")
        assert deployment.how_many_fit().max_coefficients["lowrank"] == 16
        close(deployment.run(feeds(2), "late")["logits"], answers(model, feeds(2)))


REFUSED = {
    "dora": (peft.LoraConfig, {"r": 4, "use_dora": True}, "no slot can hold a dora delta: it changes a weight by what"),
    "loha": (peft.LoHaConfig, {"r": 5}, "no slot can hold a hadamard delta: it is a product of rank 25, whose factors"),
    "lokr": (
        peft.LoKrConfig,
        {"r": 8},
        "no slot can hold a kronecker delta: it is a product of rank 48, whose factors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_slot_can_hold_says_why(bank, bases, tmp_path, case):
    config, fields, message = REFUSED[case]
    base = bases("bert", "text-classification")
    trained(base, config, {**fields, "target_modules": TARGETS}, tmp_path / case)
    done = run("export", "--onnx", base, tmp_path / case, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert "--mode merged" in done.output
    assert not (tmp_path / "out").exists()
    done = run("add", bank[0] / "out", tmp_path / case)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


def test_a_dora_is_exported_merged(bases, tmp_path):
    base = bases("bert", "text-classification")
    model = trained(base, peft.LoraConfig, {"r": 4, "use_dora": True, "target_modules": TARGETS}, tmp_path / "dora")
    done = run("export", "--onnx", base, tmp_path / "dora", "-o", tmp_path / "out", "--mode", "merged")
    assert done.exit_code == 0, done.output
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], feeds(3))
    close(logits, answers(model, feeds(3)))


def test_without_low_rank_slots_the_flag_is_named(bases, tmp_path):
    base = bases("bert", "text-classification")
    trained(base, peft.LoraConfig, {"r": 4, "target_modules": TARGETS}, tmp_path / "lora")
    done = run("export", "--onnx", base, "-o", tmp_path / "out", "--sites", "attention")
    assert done.exit_code == 0, done.output
    done = run("add", tmp_path / "out", tmp_path / "lora")
    assert done.exit_code == 1
    assert "needs a lowrank slot; the graph has hartley" in " ".join(done.output.split())
    assert "lowrank" in done.output.split("--kinds")[1]

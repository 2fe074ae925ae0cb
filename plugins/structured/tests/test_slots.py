"""Structured adapters as slots: exported, added, packed, mixed with spectra in one batch, held against torch."""

import json

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from click.testing import CliRunner
from decoder_folders import pico_decoder, torch_tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.cli.main import main
from ssh_deploy.errors import AdapterMismatchError, DeployError
from ssh_deploy.graph.patching import apply_adapter
from ssh_deploy.runtimes.deployment import Deployment
from ssh_deploy.testing import random_adapter, sparse_spectrum, write_peft_example

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*symmetric initialization.*:UserWarning"),  # HRA of odd rank
    pytest.mark.filterwarnings("ignore:Sparse invariant checks.*:UserWarning"),  # SHiRA's own sum
]

LAYER = "bert.encoder.layer"
SITES = [f"{LAYER}.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")]
TARGETS = ["query", "value"]
#: name: how PEFT makes it
TRAINED = {
    "ia3": (peft.IA3Config, {"target_modules": [*TARGETS, "output.dense"], "feedforward_modules": ["output.dense"]}),
    "hra": (peft.HRAConfig, {"r": 3, "target_modules": TARGETS}),
    "shira": (peft.ShiraConfig, {"r": 2, "random_seed": 1, "target_modules": TARGETS}),
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


def made(base, config, parts, folder, modules=SITES):
    """Folder of a family that PEFT has not, ``parts`` (a function of a generator) on each module; torch's model."""
    rng = np.random.default_rng(3)
    tensors = {f"base_model.model.{m}.{name}": t for m in modules for name, t in parts(rng).items()}
    write_peft_example(folder, config, tensors)
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    adapter = read_adapter(folder, shapes=dict.fromkeys(modules, (48, 48)))
    apply_adapter(model, adapter, {module: module for module in modules})
    return model


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


SSF = {"peft_type": "SSF"}, lambda rng: {"ssf_scale": 1 + normal(rng, 48) / 4, "ssf_shift": normal(rng, 48)}
TWO_SIDED = (
    {"peft_type": "ETHER_PLUS", "blocks": "diagonal"},
    lambda rng: {f"ether_R{i}": normal(rng, 2, 24) for i in ("", 2, 3, 4)},
)


def feeds(batch, length=7, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 60, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def answers(model, given):
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()


@pytest.fixture(scope="session")
def bank(bases, tmp_path_factory):
    """Exported folder with SSH, IA3, HRA, SHiRA and SSF; a two-sided ETHER+ added afterwards; and torch's models."""
    folder, base = tmp_path_factory.mktemp("structured"), bases("bert", "text-classification")
    models = {name: trained(base, c, f, folder / name) for name, (c, f) in TRAINED.items()}
    models["ssf"] = made(base, *SSF, folder / "ssf")
    models["ether"] = made(base, *TWO_SIDED, folder / "ether")
    spectra = random_adapter(dict.fromkeys(SITES, (48, 48)), alpha=60.0)
    write_file(spectra, folder / "ssh.safetensors", values_dtype=np.float32)
    given = [folder / "ssh.safetensors", folder / "hra", folder / "ia3", folder / "shira", folder / "ssf"]
    done = run("export", "--onnx", base, *given, "-o", folder / "out", "--adapter-dtype", "float32", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kinds"] == ["hartley", "sparse", "diagonal", "reflection", "head"]
    done = run("add", folder / "out", folder / "ether", "--json")
    assert done.exit_code == 0, done.output
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    models[None] = AutoModelForSequenceClassification.from_pretrained(base).eval()
    with torch.no_grad():
        for module, delta in spectra.deltas.items():
            delta.add_to(model.get_submodule(module).weight)
    models["ssh"] = model
    return folder, models


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))


def test_a_mixed_batch_is_torch_row_by_row_and_each_row_is_itself_alone(bank):
    folder, models = bank
    names = ["ia3", "ssh", None, "hra", "shira", "ether", "ssf", "ia3"]
    given = feeds(len(names))
    with Deployment.open(folder / "out") as deployment:
        mixed = deployment.run(given, names)["logits"]
        for i, name in enumerate(names):
            own = {key: array[i : i + 1] for key, array in given.items()}
            want = answers(models[name], own)
            close(mixed[i : i + 1, : want.shape[1]], want)
            alone = deployment.run(own, [name])["logits"]
            np.testing.assert_array_equal(mixed[i : i + 1, : alone.shape[1]], alone)
    effects = {
        name: np.abs(answers(models[name], given) - answers(models[None], given)).max() for name in names if name
    }
    assert min(effects.values()) > 0.005, effects


def test_sparse_changes_add_up_and_what_multiplies_does_not(bank):
    folder, models = bank
    given = feeds(2)
    with Deployment.open(folder / "out") as deployment:
        whole = deployment.run(given, "shira")["logits"]
        close(deployment.run(given, "0.5*shira+0.5*shira")["logits"], whole)
        changed, base = models["ssh"].state_dict(), models[None].state_dict()
        state = {key: base[key] for key in base}
        other = models["shira"].merge_and_unload().state_dict()
        for key in base:
            state[key] = other[key] if "classifier" in key else other[key] + changed[key] - base[key]
        model = AutoModelForSequenceClassification.from_config(models[None].config).eval()
        model.load_state_dict(state)
        close(deployment.run(given, "shira+ssh")["logits"], answers(model, given))
        for text, kind in (("ia3+ssh", "diagonal"), ("shira+0.5*hra", "reflection"), ("0.5*ssf", "diagonal")):
            with pytest.raises(AdapterMismatchError, match=f"{kind} adapters multiply what passes through a layer"):
                deployment.run(given, text)


def test_a_folder_from_peft_is_loaded_into_the_bank(bank, bases, tmp_path):
    folder, _ = bank
    base = bases("bert", "text-classification")
    model = trained(base, peft.HRAConfig, {"r": 2, "apply_GS": True, "target_modules": ["query"]}, tmp_path / "new")
    given = feeds(3)
    with Deployment.open(folder / "out") as deployment:
        deployment.load("new", tmp_path / "new")
        close(deployment.run(given, "new")["logits"], answers(model, given))
        widths = deployment.how_many_fit().max_coefficients
    assert (widths["reflection"], widths["diagonal"], widths["sparse"]) == (4, 2, 2 * 96)


def test_a_rank_beyond_the_banks_is_refused_with_both_numbers(bank, bases, tmp_path):
    folder, _ = bank
    base = bases("bert", "text-classification")
    model = trained(base, peft.HRAConfig, {"r": 9, "target_modules": ["query"]}, tmp_path / "high")
    with Deployment.open(folder / "out") as deployment, pytest.raises(AdapterMismatchError) as refused:
        deployment.load("high", tmp_path / "high")
    assert "9 reflection_in where every row of this bank holds 4" in str(refused.value)
    assert "max_rank=9" in str(refused.value)
    with Deployment.open(folder / "out", max_rank=9) as deployment:
        deployment.load("high", tmp_path / "high")
        close(deployment.run(feeds(2), "high")["logits"], answers(model, feeds(2)))


def test_verify_and_run_on_the_command_line(bank, bases):
    folder, _ = bank
    for name in ("ia3", "hra", "shira", "ether"):
        done = run("verify", bases("bert", "text-classification"), folder / name, folder / "out", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["ok"] is True
    done = run("run", folder / "out", "--adapter", "ia3", "--adapter", "hra", "--text", "good film", "--text", "bad")
    assert done.exit_code == 0, done.output
    done = run("run", folder / "out", "--how-many-fit", "--memory", "1MB")
    assert "reflection: " in done.output
    assert "(rank up to 4)" in done.output


def test_a_packed_bank_feeds_stock_onnxruntime(bank, tmp_path):
    folder, models = bank
    done = run("pack", folder / "out", "-o", tmp_path / "bank.onnx_adapter", "--json")
    assert done.exit_code == 0, done.output
    ids = json.loads(done.stdout)["ids"]
    names = ["ether", "ssh", "ia3", "shira", "hra", "ssf"]
    given = feeds(len(names))
    session = ort.InferenceSession(folder / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "bank.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    numbers = {key: np.array([ids[name][key] for name in names]) for key in ids["ssh"]}
    (logits,) = session.run(["logits"], {**given, **numbers}, options)
    for i, name in enumerate(names):
        want = answers(models[name], {key: array[i : i + 1] for key, array in given.items()})
        close(logits[i : i + 1, : want.shape[1]], want)


def spoilt(name, arrays):
    if name == "NaN":
        arrays["adapter_reflection_in.48"][0, 0, 0, 0, 0] = np.nan
    elif name == "half of it":
        del arrays["adapter_reflection_out.48"]
    elif name == "one part":
        arrays["adapter_reflection_in.48"] = arrays["adapter_reflection_in.48"][:, :, :1]
    else:
        arrays["adapter_reflection_in.48"] = arrays["adapter_reflection_in.48"].astype(np.float16)
    return arrays


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NaN", "values are NaN or infinite"),
        ("half of it", r"has \['adapter_reflection_in\.48'.* where the graph takes"),
        ("one part", r"adapter_reflection_in\.48 is float32 .* where the graph takes"),
        ("float16", r"adapter_reflection_in\.48 is float16 .* where the graph takes float32"),
    ],
)
def test_files_of_rows_that_cannot_be_are_refused(bank, tmp_path, name, message):
    folder, _ = bank
    read = ort.AdapterFormat.read_adapter(str(folder / "out" / "adapters" / "hra.onnx_adapter")).get_parameters()
    arrays = {key: value.numpy().copy() for key, value in read.items() if "head" not in key}
    spoil = ort.AdapterFormat()
    spoil.set_adapter_version(1)
    spoil.set_model_version(1)
    parameters = {
        key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for key, a in spoilt(name, arrays).items()
    }
    spoil.set_parameters(parameters)
    spoil.export_adapter(str(tmp_path / "x.onnx_adapter"))
    with Deployment.open(folder / "out") as deployment, pytest.raises(DeployError, match=message):
        deployment.load("x", tmp_path / "x.onnx_adapter")


def test_conv1d_of_gpt2_and_inputs_without_defaults(bases, tmp_path):
    base = bases("gpt2", "causal-lm")
    targets = ["c_attn", "mlp.c_proj"]
    fields = {"fan_in_fan_out": True, "target_modules": targets, "feedforward_modules": ["mlp.c_proj"]}
    trained(base, peft.IA3Config, fields, tmp_path / "ia3", kind=AutoModelForCausalLM)
    words = [
        "export",
        "--onnx",
        base,
        tmp_path / "ia3",
        "-o",
        tmp_path / "out",
        "--adapter-inputs",
        "required",
        "--json",
    ]
    done = run(*words)  # validates against torch, which scales weights and biases
    assert done.exit_code == 0, done.output
    checked = json.loads(done.stdout)["validation"]["ia3"]
    assert checked["effect"] > 1e-2


def test_slots_are_reserved_and_a_closed_side_says_what_opens_it(bases, tmp_path):
    base = bases("bert", "text-classification")
    models = {name: trained(base, *TRAINED[name], tmp_path / name) for name in ("hra", "shira")}
    models["ssf"] = made(base, *SSF, tmp_path / "ssf")
    fields = {"target_modules": ["query"], "feedforward_modules": ["query"]}
    models["inputs"] = trained(base, peft.IA3Config, fields, tmp_path / "inputs")
    words = ["--sites", "attention", "--kinds", "sparse,reflection,head", "--adapter-dtype", "float32"]
    done = run("export", "--onnx", base, tmp_path / "ssf", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    with Deployment.open(tmp_path / "out") as deployment:
        for name in ("hra", "shira"):  # kinds of which the folder stores none
            deployment.load(name, tmp_path / name)
            close(deployment.run(feeds(2), name)["logits"], answers(models[name], feeds(2)))
        with pytest.raises(AdapterMismatchError) as refused:
            deployment.load("inputs", tmp_path / "inputs")
    assert "1 diagonal_in where every row of this bank holds 0" in str(refused.value)
    assert "ssh-deploy add" in str(refused.value)
    assert run("add", tmp_path / "out", tmp_path / "inputs").exit_code == 0
    with Deployment.open(tmp_path / "out") as deployment:
        close(deployment.run(feeds(2), "inputs")["logits"], answers(models["inputs"], feeds(2)))
        want = answers(models["ssf"], feeds(2))
        close(deployment.run(feeds(2), "ssf")["logits"][..., : want.shape[1]], want)


def test_a_decoder_generates_what_torch_does_and_a_shift_needs_no_bias(tmp_path):
    base, rng = pico_decoder(tmp_path / "base"), np.random.default_rng(3)
    rows, cols, values = sparse_spectrum(rng, (24, 48), 72)
    places = np.stack([rows, cols]).astype(np.int32)
    adapters = {
        "ssf": ("q_proj", (48, 48), {"ssf_scale": normal(rng, 48), "ssf_shift": normal(rng, 48)}),
        "hra": ("o_proj", (48, 48), {"hra_u": normal(rng, 48, 3)}),
        "shira": ("v_proj", (24, 48), {"shira_weight": values, "shira_indices": places}),
    }
    for name, (end, shape, parts) in adapters.items():
        modules = [f"model.layers.{i}.self_attn.{end}" for i in (0, 1)]
        config = {"peft_type": name.upper(), "task_type": "CAUSAL_LM", "r": 3 if name == "hra" else 1}
        config["module_shapes"] = dict.fromkeys(modules, shape)
        tensors = {f"base_model.model.{module}.{part}": t for module in modules for part, t in parts.items()}
        write_peft_example(tmp_path / name, config, tensors)
    given = [tmp_path / name for name in adapters]
    done = run("export", "--onnx", base, *given, "-o", tmp_path / "out", "--adapter-dtype", "float32", "--json")
    assert done.exit_code == 0, done.output
    prompts, names = ["the quick", "when is the end", "h", "the fox jumps over"], [*adapters, None]
    with Deployment.open(tmp_path / "out") as deployment:
        encoded = [deployment._prompts.encode(prompt) for prompt in prompts]
        with deployment.generator() as generator:
            streams = [generator.submit(p, n, max_new_tokens=16) for p, n in zip(prompts, names, strict=True)]
            got = [list(stream.result().tokens) for stream in streams]
    for prompt, name, tokens in zip(encoded, names, got, strict=True):
        (want,) = torch_tokens(base, [prompt], adapter=None if name is None else tmp_path / name, most=16)
        assert tokens == want, name
        (other,) = torch_tokens(base, [prompt], most=16)
        assert (tokens == other) == (name is None)
    done = run("merge", base, tmp_path / "ssf", "-o", tmp_path / "merged")  # a checkpoint has no place for the shift
    assert done.exit_code == 1
    assert "has no bias" in done.output


def test_blocks_as_the_released_code_reads_them_are_merged_and_refused_for_slots(bank, bases, tmp_path):
    base = bases("bert", "text-classification")
    parts = {f"base_model.model.{SITES[0]}.ether_R": normal(np.random.default_rng(0), 2, 24)}
    write_peft_example(tmp_path / "a", {"peft_type": "ETHER", "blocks": "memory"}, parts)
    asked = ("export", "--onnx", base, tmp_path / "a", "-o", tmp_path / "out"), ("add", bank[0] / "out", tmp_path / "a")
    for words in asked:
        done = run(*words)
        assert done.exit_code == 1
        assert "no slot can hold a memory-blocks delta: it changes a weight by what" in " ".join(done.output.split())
    assert run("merge", base, tmp_path / "a", "-o", tmp_path / "merged").exit_code == 0


def test_an_adapter_that_was_never_trained_is_no_error(bank, tmp_path):
    """Scales of one: that no output changes is what they say."""
    folder, models = bank
    ones = {f"base_model.model.{SITES[0]}.propulsion": np.ones(48, "f")}
    write_peft_example(tmp_path / "ones", {"peft_type": "PROPULSION"}, ones)
    assert run("add", folder / "out", tmp_path / "ones").exit_code == 0
    with Deployment.open(folder / "out") as deployment:
        close(deployment.run(feeds(2), "ones")["logits"], answers(models[None], feeds(2)))
    assert run("remove", folder / "out", "ones").exit_code == 0

"""Exports of five pico architectures and of the real MiniLM, held against torch and run by plain onnxruntime."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from exported_folders import HEADS, make_adapter, write_adapter

from ssh_deploy.adapters.file import write_file
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.errors import AdapterMismatchError, DeployError, GraphError, UnknownNameError, VerificationError
from ssh_deploy.graph.patching import apply_adapter, label_count, model_places, rounded
from ssh_deploy.graph.trace import example_inputs, load_torch, run_torch
from ssh_deploy.jobs import validating
from ssh_deploy.jobs.exporting import ExportOptions, export_model

ROOT = Path(__file__).resolve().parents[2]


def session(folder):
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(folder, feeds, *adapters, opened=None):
    opened = opened or session(folder)
    options, held = ort.RunOptions(), []
    for path in adapters:
        held.append(ort.LoraAdapter())
        held[-1].Load(str(path))
        options.add_active_adapter(held[-1])
    names = [o.name for o in opened.get_outputs()]
    return dict(zip(names, opened.run(names, feeds, options), strict=True))


def torch_answer(base, adapter, *, task, batch=3, length=11, dtype="float16"):
    """(feeds, logits) of torch with the adapter in its weights."""
    import torch

    checkpoint = open_checkpoint(base)
    model = load_torch(checkpoint, task).model
    labels = label_count(adapter, model)
    model = load_torch(checkpoint, task, labels=labels).model
    adapter = rounded(adapter, dtype)
    apply_adapter(model, adapter, model_places(adapter, model, checkpoint.config))
    inputs = example_inputs(model, batch=batch, length=length, seed=5)
    with torch.no_grad():
        name = "last_hidden_state" if task == "feature-extraction" else "logits"
        want = run_torch(model, inputs, [name])[name].numpy()
    return {k: v.numpy() for k, v in inputs.items()}, want


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(HEADS))
def test_each_architecture_answers_as_torch(exported, architecture):
    base, _, folder = exported(architecture)
    task = "image-classification" if architecture == "vit" else "text-classification"
    for name, seed, labels, n in (("headed", 1, 5, 40), ("plain", 2, 0, 25)):
        adapter = make_adapter(base, architecture, seed=seed, labels=labels, n=n)
        feeds, want = torch_answer(base, adapter, task=task)
        got = run(folder, feeds, folder / "adapters" / f"{name}.onnx_adapter")["logits"]
        assert got.shape == want.shape == (3, labels or 3)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1, float(np.ptp(want))))


def test_the_folder_says_what_it_is(exported):
    _, _, folder = exported("bert")
    deployment = json.loads((folder / "deployment.json").read_text())
    assert deployment["contract"] == 4
    assert deployment["kinds"] == ["hartley", "head"]
    assert [s["index"] for s in deployment["sites"]] == [0, 1, 2, 3]
    assert deployment["sites"][0]["module"] == "encoder.layer.0.attention.self.query"
    assert deployment["head"]["labels"] == 3
    assert deployment["adapters"]["headed"]["labels"] == [f"bert-{i}" for i in range(5)]
    assert deployment["adapters"]["plain"]["labels"] == []
    assert deployment["adapters"]["headed"]["n"] == 40
    assert deployment["adapters"]["plain"]["base"] == "unverified"
    assert deployment["orders"]["hartley"]["48"] == [4, 12]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert set(provenance["validation"]["results"]) == {"no adapter", "headed", "plain"}
    assert set(provenance["base"]["files"]) == {"config.json", "model.safetensors"}
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.onnx", "model.onnx.data")
    }
    assert provenance["graph"] == digests
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found >= {
        "model.onnx",
        "model.onnx.data",
        "README.md",
        "config.json",
        "tokenizer.json",
        "fingerprint.safetensors",
    }
    assert not [name for name in found if name.startswith(".") or ".plain" in name]


def test_no_path_of_this_machine_leaves_it(exported):
    base, _, folder = exported("bert")
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(base.parent).encode() not in data, path
            assert b"site-packages" not in data, path


def test_the_graph_obeys_the_contract(exported):
    _, _, folder = exported("roberta")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {o.domain for o in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    assert model.ir_version >= 4
    defaults = {i.name for i in model.graph.initializer}
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    lent = {name: shape for name, shape in inputs.items() if name.startswith("adapter_")}
    assert set(lent) <= defaults
    assert lent["adapter_ids"] == ["requests"]
    assert lent["adapter_values"] == ["adapters", 6, "coefficients"]
    assert lent["adapter_scales"] == ["adapters", 6]
    assert lent["adapter_head.classifier.out_proj.weight"] == ["head_adapters", "labels", 48]
    assert lent["adapter_guard"] == json.loads((folder / "deployment.json").read_text())["guard"]
    assert not {n.op_type for n in model.graph.node} & {"DFT", "LoopXYZ"}


def test_no_adapter_is_bit_identical_to_the_plain_export(exported, tmp_path):
    base, _, folder = exported("bert")
    report = export_model(base, [], tmp_path / "plain")
    assert report.kinds == ()
    assert not any(i.name.startswith("adapter_") for i in session(tmp_path / "plain").get_overridable_initializers())
    model = load_torch(open_checkpoint(base), "text-classification").model
    for batch, length in ((1, 3), (4, 12)):
        feeds = {k: v.numpy() for k, v in example_inputs(model, batch=batch, length=length).items()}
        assert run(folder, feeds)["logits"].tobytes() == run(tmp_path / "plain", feeds)["logits"].tobytes()


@pytest.mark.slow
def test_a_base_without_a_head_has_no_labels_but_its_hidden_state(pico, tmp_path):
    base = pico("bert")
    adapter = write_adapter(tmp_path / "a.safetensors", base, "bert", labels=4, seed=3)
    report = export_model(base, [str(adapter)], tmp_path / "out")
    assert report.task == "text-classification"
    deployment = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert deployment["head"]["labels"] == 0
    assert deployment["outputs"] == [{"name": "logits"}, {"name": "last_hidden_state"}]
    model = load_torch(open_checkpoint(base), "feature-extraction").model
    feeds = {k: v.numpy() for k, v in example_inputs(model, batch=2, length=6).items()}
    answer = run(tmp_path / "out", feeds)
    assert answer["logits"].shape == (2, 0)
    assert answer["last_hidden_state"].shape == (2, 6, 48)
    own = run(tmp_path / "out", feeds, tmp_path / "out" / "adapters" / "a.onnx_adapter")
    assert own["logits"].shape == (2, 4)
    export_model(base, [], tmp_path / "plain", options=ExportOptions(task="text-classification"))
    plain = run(tmp_path / "plain", feeds)
    assert plain["logits"].shape == (2, 0)
    assert plain["last_hidden_state"].tobytes() == answer["last_hidden_state"].tobytes()


@pytest.mark.slow
def test_an_incomplete_head_for_a_base_without_one_is_refused(pico, tmp_path):
    base = pico("roberta")
    adapter = make_adapter(base, "roberta", labels=4)
    only = {"classifier.out_proj": adapter.replaced["classifier.out_proj"]}
    object.__setattr__(adapter, "replaced", only)
    write_file(adapter, tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"lacks classifier\.dense, and the base has none"):
        export_model(base, [str(tmp_path / "a.safetensors")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["hartley-joint", "cosine"])
def test_other_transforms_and_float32_values(pico, tmp_path, transform):
    base = pico("bert", "text-classification")
    adapter = write_adapter(
        tmp_path / "a.safetensors", base, "bert", transform=transform, labels=2, values_dtype=np.float32
    )
    options = ExportOptions(adapter_dtype="float32", dtype="float16")
    report = export_model(base, [str(adapter)], tmp_path / "out", options=options)
    assert report.kinds == ("cosine" if transform == "cosine" else "hartley", "head")
    assert report.validation["a"].max_abs_diff < 1e-4 * report.validation["a"].spread
    full = (base / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < 0.6 * full


@pytest.mark.slow
def test_gpt2_without_a_classifier(pico, tmp_path):
    base = pico("gpt2", "causal-lm")
    path = write_adapter(tmp_path / "a.safetensors", base, "gpt2", seed=8)
    export_model(base, [str(path)], tmp_path / "out", options=ExportOptions(task="feature-extraction"))
    adapter = make_adapter(base, "gpt2", seed=8)
    feeds, want = torch_answer(base, adapter, task="feature-extraction")
    answer = run(tmp_path / "out", feeds, tmp_path / "out" / "adapters" / "a.onnx_adapter")
    (got,) = answer.values()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1, float(np.ptp(want))))


@pytest.mark.slow
def test_reserved_slots(pico, tmp_path):
    base = pico("bert")
    options = ExportOptions(
        task="text-classification", sites=("attention", "*.intermediate.dense"), kinds=("hartley", "cosine", "head")
    )
    report = export_model(base, [], tmp_path / "out", options=options)
    assert report.kinds == ("hartley", "cosine", "head")
    names = [s["module"] for s in json.loads((tmp_path / "out" / "deployment.json").read_text())["sites"]]
    assert len(names) == report.sites == 2 * (4 + 1)
    assert "encoder.layer.1.intermediate.dense" in names
    assert "encoder.layer.1.output.dense" not in names


@pytest.mark.slow
def test_required_inputs_have_no_defaults(pico, tmp_path):
    base = pico("bert", "text-classification")
    path = write_adapter(tmp_path / "a.safetensors", base, "bert", labels=4, seed=3)
    export_model(base, [str(path)], tmp_path / "out", options=ExportOptions(adapter_inputs="required"))
    opened = session(tmp_path / "out")
    assert opened.get_overridable_initializers() == []
    assert {i.name for i in opened.get_inputs()} >= {
        "adapter_values",
        "adapter_guard",
        "adapter_head.classifier.weight",
    }
    assert json.loads((tmp_path / "out" / "deployment.json").read_text())["adapter_inputs"] == "required"


@pytest.mark.slow
def test_merged(pico, tmp_path):
    base = pico("bert", "text-classification")
    one = write_adapter(tmp_path / "one.safetensors", base, "bert", labels=4, seed=3)
    two = write_adapter(tmp_path / "two.safetensors", base, "bert", seed=4)
    options = ExportOptions(mode="merged", weights=(1.0, 0.5))
    report = export_model(base, [str(one), str(two)], tmp_path / "out", options=options)
    assert report.kinds == ()
    checkpoint = open_checkpoint(base)
    model = load_torch(checkpoint, "text-classification", labels=4).model
    for seed, labels, weight in ((3, 4, 1.0), (4, 0, 0.5)):
        adapter = rounded(make_adapter(base, "bert", seed=seed, labels=labels), "float16")
        apply_adapter(model, adapter, model_places(adapter, model, checkpoint.config), scale=weight)
    inputs = example_inputs(model, batch=2, length=5)
    want = run_torch(model, inputs, ["logits"])["logits"].detach().numpy()
    got = run(tmp_path / "out", {k: v.numpy() for k, v in inputs.items()})["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(np.ptp(want)))
    deployment = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert deployment["head"]["base_labels"] == [f"bert-{i}" for i in range(4)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["3"] == "bert-3"


@pytest.mark.parametrize(
    ("adapters", "options", "error", "message"),
    [
        (1, ExportOptions(weights=(0.5,)), GraphError, "--weight without --mode merged"),
        (0, ExportOptions(mode="merged"), GraphError, "merged without an adapter"),
        (2, ExportOptions(mode="merged"), GraphError, "2 adapters with 0 weights"),
        (1, ExportOptions(mode="merged", sites=("linear",)), GraphError, "no slots"),
        (0, ExportOptions(kinds=("fourier",)), UnknownNameError, "(?s)'fourier'.*hartley"),
        (0, ExportOptions(kinds=("hartley",)), GraphError, "no site is named"),
        (0, ExportOptions(sites=("*.qurey",)), UnknownNameError, "matches none"),
        (0, ExportOptions(opset=3), GraphError, "Opset 3"),
        (0, ExportOptions(task="text-generation"), DeployError, "no weights for cls|cannot load|not causal"),
    ],
)
def test_options_that_make_no_sense(pico, tmp_path, adapters, options, error, message):
    base = pico("bert", "text-classification")
    paths = [str(write_adapter(tmp_path / f"{i}.safetensors", base, "bert", seed=i)) for i in range(adapters)]
    with pytest.raises(error, match=message):
        export_model(base, paths, tmp_path / "out", options=options)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i}.safetensors" for i in range(adapters)]


def test_two_heads_in_one_merged_graph_need_a_choice(pico, tmp_path):
    base = pico("bert", "text-classification")
    paths = [str(write_adapter(tmp_path / f"{i}.safetensors", base, "bert", seed=i, labels=3 + i)) for i in range(2)]
    with pytest.raises(AdapterMismatchError, match=r"(?s)0, 1 have heads.*--head"):
        export_model(base, paths, tmp_path / "out", options=ExportOptions(mode="merged", weights=(1, 1)))


def test_a_graph_that_is_not_torch_leaves_nothing_behind(pico, tmp_path, monkeypatch):
    monkeypatch.setattr(validating, "TOLERANCE", 1e-12)
    with pytest.raises(VerificationError, match=r"(?s)no adapter: the exported graph is .* off torch"):
        export_model(pico("bert", "text-classification"), [], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_success_without_effect_is_an_error(pico, tmp_path):
    base = pico("bert", "text-classification")
    adapter = make_adapter(base, "bert", labels=3, seed=1)
    for delta in adapter.deltas.values():
        object.__setattr__(delta, "alpha", 1e-25)
    write_file(adapter, tmp_path / "a.safetensors")
    with pytest.raises(VerificationError, match="a: its deltas change no bit of any output"):
        export_model(base, [str(tmp_path / "a.safetensors")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_comparison_sees_wrong_numbers_shapes_bits_and_silence():
    want = [{"logits": np.array([[1.0, 2.0]], np.float32)}]
    assert validating.compare("x", want, want).max_abs_diff == 0
    with pytest.raises(VerificationError, match="off torch"):
        validating.compare("x", [{"logits": np.array([[1.0, 2.1]], np.float32)}], want)
    with pytest.raises(VerificationError, match="off torch"):
        validating.compare("x", [{"logits": np.array([[1.0, np.nan]], np.float32)}], want)
    with pytest.raises(VerificationError, match=r"is \[1, 1\], torch's is \[1, 2\]"):
        validating.compare("x", [{"logits": np.ones((1, 1))}], want)
    with pytest.raises(VerificationError, match="not bit-identical"):
        validating.identical("x", [{"logits": np.array([[-0.0]])}], [{"logits": np.array([[0.0]])}])
    assert validating.effect_of(want, want) == 0


@pytest.mark.slow
def test_the_real_base_and_the_real_adapters(minilm_path, tmp_path):
    files = [ROOT / "examples" / "adapters" / f"{name}.safetensors" for name in ("trec6", "sms-spam", "sentiment")]
    report = export_model(minilm_path, [str(path) for path in files], tmp_path / "out")
    assert report.sites == 12
    assert report.base == "sentence-transformers/all-MiniLM-L6-v2"
    for name, checked in report.validation.items():
        assert checked.max_abs_diff < 1e-4, name
    assert all(
        entry["base"] == "verified"
        for entry in json.loads((tmp_path / "out" / "deployment.json").read_text())["adapters"].values()
    )

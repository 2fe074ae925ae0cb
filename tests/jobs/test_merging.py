"""Merging: merged checkpoints load in transformers as base + reference ΔW, for every architecture and layout."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.checkpoints.index import INDEX, open_checkpoint
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterMismatchError, DependencyError, FingerprintError, OutputError, UnknownNameError
from ssh_deploy.jobs import row_changes
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.testing import random_adapter
from ssh_deploy.transforms import reference

CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def head_of(labels, width, module="classifier", seed=3):
    rng = np.random.default_rng(seed)
    return {
        module: {
            "weight": rng.normal(size=(labels, width)).astype(np.float32),
            "bias": rng.normal(size=labels).astype(np.float32),
        }
    }


def store(adapter, path: Path) -> str:
    """The adapter as a compact file with float32 values, so that references are exact."""
    write_file(adapter, path, values_dtype=np.float32)
    return str(path)


def dense(delta):
    """ΔW by its definition, float64."""
    return reference.delta(
        delta.transform, delta.rows, delta.cols, delta.values, delta.shape, alpha=delta.alpha, norm=delta.norm
    )


def linear_modules(model):
    """Shapes [out, in] of the linear modules inside layers, as the live model names them."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split(".")):
            shape = tuple(module.weight.shape)
            found[name] = shape[::-1] if type(module).__name__ == "Conv1D" else shape
    return found


def weight_of(model, name):
    module = model.get_submodule(name)
    weight = module.weight.detach().float().numpy().astype(np.float64)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def test_real_minilm_with_a_head(minilm_path, tmp_path):
    """The whole road on the real base: bare checkpoint in, task model out, equal to torch + reference ΔW."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    modules = {f"bert.encoder.layer.{i}.attention.self.{part}": (384, 384) for i, part in ((0, "query"), (5, "value"))}
    labels = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    adapter = random_adapter(
        modules, n=40, alpha=384.0, heads=head_of(6, 384), task="text-classification", labels=labels
    )
    report = merge_adapters(minilm_path, [f"trec={store(adapter, tmp_path / 'a.safetensors')}"], tmp_path / "out")
    merged, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info == CLEAN
    base = AutoModel.from_pretrained(minilm_path)
    for name, value in base.state_dict().items():
        got = merged.bert.state_dict()[name].numpy()
        module = f"bert.{name.removesuffix('.weight')}"
        if module in modules:
            want = value.numpy().astype(np.float64) + dense(adapter.deltas[module])
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-7)
            assert np.abs(got - value.numpy()).max() > 1e-3
        else:
            np.testing.assert_array_equal(got, value.numpy())
    np.testing.assert_array_equal(merged.classifier.weight.detach(), adapter.replaced["classifier"].tensors["weight"])
    np.testing.assert_array_equal(merged.classifier.bias.detach(), adapter.replaced["classifier"].tensors["bias"])
    assert merged.config.id2label == dict(enumerate(labels))
    assert merged.config.label2id["LOC"] == 4
    assert merged.config.architectures == ["BertForSequenceClassification"]
    assert report.head == "trec"
    assert [site.tensor for site in report.sites] == [
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.5.attention.self.value.weight",
    ]
    assert report.survival > 0.9999
    assert report.dropped == ("embeddings.position_ids",)
    for name in ("1_Pooling/config.json", "vocab.txt", "tokenizer.json", "README.md", "modules.json"):
        assert (tmp_path / "out" / name).read_bytes() == (minilm_path / name).read_bytes()
        assert name in report.files


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "vit", "gpt2"])
@pytest.mark.parametrize("stored_as", ["base", "task"])
@pytest.mark.parametrize("transform", ["hartley", "hartley-joint", "cosine"])
def test_every_architecture(pico, tmp_path, architecture, stored_as, transform):
    """Adapters named as the live task model names its modules, on a bare base file and on a task model's file."""
    import transformers

    task = "image" if architecture == "vit" else "text-classification"
    folder = pico(architecture, task="base" if stored_as == "base" else task)
    auto = (
        transformers.AutoModelForImageClassification
        if architecture == "vit"
        else transformers.AutoModelForSequenceClassification
    )
    task_model = auto.from_pretrained(pico(architecture, task=task))
    heads = {
        name: {part: tensor.numpy() + 1 for part, tensor in task_model.get_submodule(name).state_dict().items()}
        for name in ("classifier", "classifier.dense", "classifier.out_proj", "pre_classifier", "score")
        if name in dict(task_model.named_modules()) and hasattr(task_model.get_submodule(name), "weight")
    }
    modules = linear_modules(task_model)
    adapter = random_adapter(modules, n=25, transform=transform, alpha=3.0, heads=heads)
    write_folder(adapter, tmp_path / "peft")
    merge_adapters(folder, [str(tmp_path / "peft")], tmp_path / "out")
    merged, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info == CLEAN
    source = auto.from_pretrained(folder) if stored_as == "task" else transformers.AutoModel.from_pretrained(folder)
    inner = source if stored_as == "task" else None
    prefix = f"{task_model.base_model_prefix}."
    for module in modules:
        before = weight_of(source, module if inner is not None else module.removeprefix(prefix))
        want = before + dense(adapter.deltas[module])
        np.testing.assert_allclose(weight_of(merged, module), want, rtol=0, atol=1e-6)
    for module, tensors in heads.items():
        for part, tensor in tensors.items():
            np.testing.assert_array_equal(getattr(merged.get_submodule(module), part).detach(), tensor)
    changed = {f"{module}.weight" for module in modules} | {f"{m}.{p}" for m, t in heads.items() for p in t}
    for name, value in source.state_dict().items():
        if name not in changed and f"{prefix}{name}" not in changed and "pooler" not in name:
            full = name if stored_as == "task" else f"{prefix}{name}"
            np.testing.assert_array_equal(merged.state_dict()[full], value)


def test_names_of_the_old_vit_fit_too(pico, tmp_path):
    module = "vit.encoder.layer.0.attention.attention.query"
    adapter = random_adapter({module: (48, 48)}, n=9)
    merge_adapters(pico("vit"), [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")
    name = "encoder.layer.0.attention.attention.query.weight"
    before, after = (load_file(f / "model.safetensors")[name] for f in (pico("vit"), tmp_path / "out"))
    np.testing.assert_allclose(after, before + dense(adapter.deltas[module]), atol=1e-6)


def sharded_copy(folder, target, dtype=None):
    """``folder``'s model saved in several shards by transformers itself."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(target, max_shard_size="60KB")
    assert (target / INDEX).exists()
    return target


def test_shards_change_only_where_adapted(pico, tmp_path):
    """Every byte outside the adapted tensors is the base's; the index and its total are right."""
    base = sharded_copy(pico("bert"), tmp_path / "base")
    adapter = random_adapter({"encoder.layer.1.intermediate.dense": (80, 48)}, n=20)
    report = merge_adapters(base, [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")
    places = json.loads((base / INDEX).read_text())["weight_map"]
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((base / INDEX).read_text())
    touched = places["encoder.layer.1.intermediate.dense.weight"]
    assert len(set(places.values())) > 2
    for shard in set(places.values()):
        same = (base / shard).read_bytes() == (tmp_path / "out" / shard).read_bytes()
        assert same == (shard != touched)
    merged, before = open_checkpoint(tmp_path / "out"), open_checkpoint(base)
    for name in before.names():
        differs = not np.array_equal(merged.read(name), before.read(name))
        assert differs == (name == "encoder.layer.1.intermediate.dense.weight")
    assert report.changed_bytes == 80 * 48 * 4


def test_a_head_joins_the_index_of_a_sharded_base(pico, tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = sharded_copy(pico("bert"), tmp_path / "base")
    adapter = random_adapter({"bert.encoder.layer.0.output.dense": (48, 80)}, n=5, heads=head_of(4, 48))
    merge_adapters(base, [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    total = sum(t.nbytes for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values())
    assert index["metadata"]["total_size"] == total
    assert "classifier.weight" in index["weight_map"]
    assert "bert.encoder.layer.0.output.dense.weight" in index["weight_map"]
    merged, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info == CLEAN
    assert merged.config.num_labels == 4
    assert merged.config.id2label[3] == "LABEL_3"


def test_several_adapters_are_summed_in_float32_and_rounded_once(pico, tmp_path):
    """bf16 base, three adapters on one site with weights: bit-equal to one rounding of the f32 sum."""
    import torch

    base = tmp_path / "base"
    shutil.copytree(pico("bert"), base)
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors")
    module, shape = "encoder.layer.0.attention.self.key", (48, 48)
    adapters = [random_adapter({module: shape}, n=30, seed=seed, alpha=2.0) for seed in range(3)]
    paths = [f"n{i}={store(a, tmp_path / f'{i}.safetensors')}" for i, a in enumerate(adapters)]
    weights = [0.5, -1.0, 2.0]
    report = merge_adapters(base, paths, tmp_path / "out", weights=weights)
    total = torch.zeros(shape)
    for adapter, weight in zip(adapters, weights, strict=True):
        adapter.deltas[module].add_to(total, scale=weight)
    before = tensors[f"{module}.weight"].astype(np.float32)
    want = (before + total.numpy()).astype(ml_dtypes.bfloat16)
    got = load_file(tmp_path / "out" / "model.safetensors")[f"{module}.weight"]
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    site = report.sites[0]
    assert site.adapters == ("n0", "n1", "n2")
    assert site.norm == pytest.approx(np.linalg.norm(total.numpy()), rel=1e-5)
    assert site.max_delta == pytest.approx(np.abs(total.numpy()).max(), rel=1e-6)
    error = (want.astype(np.float32) - before) - total.numpy()
    assert site.survival == pytest.approx(1 - np.linalg.norm(error) / site.norm, rel=1e-5)
    assert site.unchanged == pytest.approx(np.mean(want.astype(np.float32) == before))


def test_bf16_loses_a_small_update_and_says_so(pico, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pico("bert"), base)
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors")
    adapter = random_adapter({"encoder.layer.0.output.dense": (48, 80)}, n=30, alpha=0.02)
    path = store(adapter, tmp_path / "a.safetensors")
    report = merge_adapters(base, [path], tmp_path / "out")
    assert report.survival < 0.9
    assert report.sites[0].unchanged > 0.5
    assert any("of ΔW survived the rounding: merge with --dtype float32, or keep" in note for note in report.notes)
    whole = merge_adapters(base, [path], tmp_path / "f32", dtype="float32")
    assert whole.survival > 0.99
    assert not any("survived" in note for note in whole.notes)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_dtype_rewrites_every_float_tensor(pico, tmp_path, dtype, numpy_dtype):
    from transformers import AutoModel

    module = "encoder.layer.0.attention.self.query"
    adapter = random_adapter({module: (48, 48)}, n=10)
    merge_adapters(pico("bert"), [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out", dtype=dtype)
    before = load_file(pico("bert") / "model.safetensors")
    for name, got in load_file(tmp_path / "out" / "model.safetensors").items():
        assert got.dtype == numpy_dtype
        want = before[name]
        if name == f"{module}.weight":
            want = (want.astype(np.float64) + dense(adapter.deltas[module])).astype(np.float32)
            np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-8)
        else:
            np.testing.assert_array_equal(got, want.astype(numpy_dtype))
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info == CLEAN
    assert str(model.dtype) == f"torch.{dtype}"


def test_different_heads_need_a_choice(pico, tmp_path):
    module = {"bert.encoder.layer.0.attention.self.query": (48, 48)}
    one = random_adapter(module, seed=1, heads=head_of(3, 48, seed=1), labels=("a", "b", "c"))
    two = random_adapter(module, seed=2, heads=head_of(5, 48, seed=2))
    paths = [store(one, tmp_path / "one.safetensors"), store(two, tmp_path / "two.safetensors")]
    with pytest.raises(AdapterMismatchError, match=r"one, two bring different heads.*\n.*--head one .*--head none"):
        merge_adapters(pico("bert"), paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    chosen = merge_adapters(pico("bert"), paths, tmp_path / "two", head="two")
    assert chosen.head == "two"
    written = load_file(tmp_path / "two" / "model.safetensors")["classifier.weight"]
    np.testing.assert_array_equal(written, two.replaced["classifier"].tensors["weight"])
    bare = merge_adapters(pico("bert"), paths, tmp_path / "bare", head="none")
    assert bare.head is None
    assert "classifier.weight" not in load_file(tmp_path / "bare" / "model.safetensors")
    for folder in ("two", "bare"):
        names = load_file(tmp_path / folder / "model.safetensors")
        site = next(t for n, t in names.items() if n.endswith("encoder.layer.0.attention.self.query.weight"))
        want = load_file(pico("bert") / "model.safetensors")["encoder.layer.0.attention.self.query.weight"] + sum(
            dense(a.deltas["bert.encoder.layer.0.attention.self.query"]) for a in (one, two)
        )
        np.testing.assert_allclose(site, want, atol=1e-6)
    with pytest.raises(UnknownNameError, match=r"--head tow: no adapter.*\n.*two"):
        merge_adapters(pico("bert"), paths, tmp_path / "out", head="tow")


def test_equal_heads_are_one_head(pico, tmp_path):
    module = {"bert.encoder.layer.0.attention.self.query": (48, 48)}
    paths = [store(random_adapter(module, seed=s, heads=head_of(3, 48)), tmp_path / f"{s}.safetensors") for s in (1, 2)]
    assert merge_adapters(pico("bert"), paths, tmp_path / "out").head == "1"


def test_a_task_model_that_needs_more_than_the_head_is_refused(pico, tmp_path):
    """DistilBERT's pre_classifier is trained too, but PEFT saves it only when it is told to."""
    module = {"distilbert.transformer.layer.0.attention.q_lin": (48, 48)}
    adapter = random_adapter(module, heads=head_of(3, 48))
    path = store(adapter, tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"needs pre_classifier\.bias, pre_.*\n.*modules_to_save"):
        merge_adapters(pico("distilbert"), [path], tmp_path / "out")


def test_a_head_no_task_model_has_is_refused(pico, tmp_path):
    adapter = random_adapter({"bert.encoder.layer.0.output.dense": (48, 80)}, heads=head_of(3, 50))
    path = store(adapter, tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"No task model has a head classifier\.bias \[3\].*\n.*--head none"):
        merge_adapters(pico("bert"), [path], tmp_path / "out")


def test_labels_that_do_not_fit_the_head_are_refused(pico, tmp_path):
    adapter = random_adapter({"bert.encoder.layer.0.output.dense": (48, 80)}, heads=head_of(3, 48), labels=("a", "b"))
    with pytest.raises(AdapterMismatchError, match="3 rows and the adapter names 2 labels"):
        merge_adapters(pico("bert"), [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")


def test_a_delta_on_a_tied_output_embedding_unties_it(pico, tmp_path):
    """lm_head has no tensor of its own in the file: it gets one, and the input embedding stays as it is."""
    from transformers import AutoModelForCausalLM

    base = pico("gpt2", task="causal-lm")
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    adapter = random_adapter({"lm_head": (64, 48), "transformer.h.0.attn.c_attn": (144, 48)}, n=12, task="causal-lm")
    merge_adapters(base, [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(base)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info == CLEAN
    want = before.lm_head.weight.detach().numpy() + dense(adapter.deltas["lm_head"])
    np.testing.assert_allclose(merged.lm_head.weight.detach(), want, atol=1e-6)
    np.testing.assert_array_equal(merged.transformer.wte.weight.detach(), before.transformer.wte.weight.detach())
    assert merged.config.tie_word_embeddings is False
    site = "transformer.h.0.attn.c_attn"
    np.testing.assert_allclose(
        weight_of(merged, site), weight_of(before, site) + dense(adapter.deltas[site]), atol=1e-6
    )


def test_a_replaced_output_embedding_unties_it(pico, tmp_path):
    """modules_to_save=["lm_head"]: with the tie kept, loading would put the base's embedding back in silence."""
    from transformers import AutoModelForCausalLM

    head = {"lm_head": {"weight": np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)}}
    adapter = random_adapter({"transformer.h.0.attn.c_attn": (144, 48)}, heads=head, task="causal-lm")
    for task in ("causal-lm", "base"):
        merge_adapters(pico("gpt2", task=task), [store(adapter, tmp_path / f"{task}.safetensors")], tmp_path / task)
        merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / task, output_loading_info=True)
        assert info == CLEAN
        np.testing.assert_array_equal(merged.lm_head.weight.detach(), head["lm_head"]["weight"])
        assert merged.config.tie_word_embeddings is False
        assert not np.array_equal(merged.transformer.wte.weight.detach(), head["lm_head"]["weight"])


def test_a_delta_on_an_output_embedding_stored_twice_unties_it(pico, tmp_path):
    """The file holds lm_head.weight beside the embedding it is tied to, as some exporters write it."""
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(pico("gpt2", task="causal-lm"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = random_adapter({"lm_head": (64, 48)}, n=12)
    merge_adapters(base, [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info == CLEAN
    want = tensors["lm_head.weight"] + dense(adapter.deltas["lm_head"])
    np.testing.assert_allclose(merged.lm_head.weight.detach(), want, atol=1e-6)
    np.testing.assert_array_equal(merged.transformer.wte.weight.detach(), tensors["transformer.wte.weight"])
    assert merged.config.tie_word_embeddings is False


def test_a_new_header_keeps_every_tensor_aligned(pico, tmp_path):
    """A float32 head beside odd bf16 tensors: wide types come first, and the payload starts at a multiple of 8."""
    base = shutil.copytree(pico("bert"), tmp_path / "base")
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for labels in (3, 10, 100):  # headers of three lengths
        adapter = random_adapter({"bert.encoder.layer.0.output.dense": (48, 80)}, heads=head_of(labels, 48))
        out = tmp_path / str(labels)
        merge_adapters(base, [store(adapter, tmp_path / f"{labels}.safetensors")], out)
        shard = open_checkpoint(out).shards["model.safetensors"]
        assert shard.start % 8 == 0
        assert shard.metadata == {"format": "pt"}
        for entry in shard.table.values():
            assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0


def test_tied_embeddings_stay_tied_when_nothing_touches_them(pico, tmp_path):
    from transformers import AutoModelForCausalLM

    adapter = random_adapter({"transformer.h.1.mlp.c_fc": (192, 48)}, n=12)
    merge_adapters(pico("gpt2", task="causal-lm"), [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info == CLEAN
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_weights_in_other_forms_stay_behind(pico, tmp_path):
    """Stale copies would answer as the base; everything else comes along, subfolders too."""
    base = tmp_path / "base"
    shutil.copytree(pico("bert"), base)
    for name in ("pytorch_model.bin", "tf_model.h5", "optimizer.pt", "onnx/model.onnx", "consolidated.safetensors"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"stale")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("kept")
    adapter = random_adapter({"encoder.layer.0.output.dense": (48, 80)})
    report = merge_adapters(base, [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")
    assert set(report.left_out) == {
        "pytorch_model.bin",
        "tf_model.h5",
        "optimizer.pt",
        "onnx/model.onnx",
        "consolidated.safetensors",
    }
    assert (tmp_path / "out" / "sub" / "notes.txt").read_text() == "kept"
    left = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == set(report.files)
    assert not left & set(report.left_out)
    assert any("optimizer.pt" in note for note in report.notes)


def test_fingerprint_is_checked_and_reported(pico, tmp_path):
    module = "encoder.layer.0.output.dense"
    stored = fingerprint_of(open_checkpoint(pico("bert")), [module])
    known = store(random_adapter({module: (48, 80)}, fingerprint=stored), tmp_path / "known.safetensors")
    unknown = store(random_adapter({module: (48, 80)}), tmp_path / "unknown.safetensors")
    good = merge_adapters(pico("bert"), [known], tmp_path / "a", require_fingerprint=True)
    assert good.adapters[0].base == "verified"
    assert good.notes == ()
    loose = merge_adapters(pico("bert"), [unknown], tmp_path / "b")
    assert loose.adapters[0].base == "base unverified"
    assert any(note.startswith("base unverified") for note in loose.notes)
    with pytest.raises(FingerprintError, match="stores no fingerprint"):
        merge_adapters(pico("bert"), [unknown], tmp_path / "c", require_fingerprint=True)
    with pytest.raises(FingerprintError, match=r"another base .*differs at \d+ of 256"):
        merge_adapters(pico("bert", seed=1), [known], tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("weights", "message"), [((0.5,), "1 weights for 2 adapters"), ((1.0, float("nan")), "not all finite")]
)
def test_weights_are_one_per_adapter(pico, tmp_path, weights, message):
    paths = [
        store(random_adapter({"encoder.layer.0.output.dense": (48, 80)}), tmp_path / f"{i}.safetensors") for i in "ab"
    ]
    with pytest.raises(AdapterMismatchError, match=message):
        merge_adapters(pico("bert"), paths, tmp_path / "out", weights=weights)


def test_overflow_of_float16_is_an_error(pico, tmp_path):
    adapter = random_adapter({"encoder.layer.0.output.dense": (48, 80)}, alpha=1e9)
    path = store(adapter, tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"go beyond the range of float16.*\n.*float32 or bfloat16"):
        merge_adapters(pico("bert"), [path], tmp_path / "out", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_cuda_where_there_is_none(pico, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = store(random_adapter({"encoder.layer.0.output.dense": (48, 80)}), tmp_path / "a.safetensors")
    with pytest.raises(DependencyError, match=r"--device cuda: torch .* sees no CUDA device.*\n.*--device cpu"):
        merge_adapters(pico("bert"), [path], tmp_path / "out", device="cuda")
    merge_adapters(pico("bert"), [path], tmp_path / "out", device="auto")


@pytest.mark.gpu
def test_cuda_merges_what_the_cpu_merges(pico, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    adapter = random_adapter({"encoder.layer.0.output.dense": (48, 80)})
    path = store(adapter, tmp_path / "a.safetensors")
    for device in ("cpu", "cuda"):
        merge_adapters(pico("bert"), [path], tmp_path / device, device=device, weights=[0.5])
    one, two = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=0, atol=1e-6)


def test_a_device_path_sums_like_the_cpu(monkeypatch):
    """The branch for devices, on the CPU: dense, scaled, added."""
    total = np.ones((48, 80), np.float32)
    delta = random_adapter({"x": (48, 80)}).deltas["x"]
    dense_of = type(delta).dense
    monkeypatch.setattr(type(delta), "dense", lambda self, *, device, dtype: dense_of(self, dtype=dtype))
    row_changes.accumulate(total, delta, -2.0, "cuda", np.zeros_like(total))
    np.testing.assert_allclose(total, 1 - 2 * dense(delta), atol=1e-6)


def test_progress_reaches_its_total(pico, tmp_path):
    seen = []
    adapter = random_adapter({"encoder.layer.0.output.dense": (48, 80)})
    path = store(adapter, tmp_path / "a.safetensors")
    merge_adapters(pico("bert"), [path], tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_output_that_exists_is_never_touched(pico, tmp_path):
    (tmp_path / "out").mkdir()
    adapter = random_adapter({"encoder.layer.0.output.dense": (48, 80)})
    with pytest.raises(OutputError, match="exists already"):
        merge_adapters(pico("bert"), [store(adapter, tmp_path / "a.safetensors")], tmp_path / "out")


MEASURE = """
import json, sys
from ssh_deploy.jobs.merging import merge_adapters

def peak():  # VmHWM is this program's own; ru_maxrss would start at the size of the process that forked it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

before = peak()
report = merge_adapters(sys.argv[1], [sys.argv[2]], sys.argv[3])
print(json.dumps({"grown": peak() - before, "torch": "torch" in sys.modules, "bytes": report.bytes}))
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A base of 400 MB, half of it adapted: one f32 ΔW (17 MB) at a time and its rows' scratch; no torch."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rng = np.random.default_rng(0)
    block = rng.normal(size=(2048, 2048)).astype(ml_dtypes.bfloat16)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(48)]
    save_file(dict.fromkeys(names, block), base / "model.safetensors")
    modules = {name.removesuffix(".weight"): (2048, 2048) for name in names[::2]}
    path = store(random_adapter(modules, n=1000, alpha=2048.0), tmp_path / "a.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(base), path, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["bytes"] > 400e6
    assert result["grown"] < 110e6
    assert not result["torch"]
    merged = open_checkpoint(tmp_path / "out")
    for name in names:
        assert np.array_equal(merged.read(name), block) == (name not in names[::2])

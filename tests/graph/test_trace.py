"""What is traced, under which task, and how adapters reach a torch model's own weights."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from decoder_folders import pico_decoder
from exported_folders import make_adapter
from onnxscript import rewriter

from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.errors import AdapterMismatchError, GraphError, UnknownNameError
from ssh_deploy.graph.patching import apply_adapter, label_count, model_places, rounded
from ssh_deploy.graph.sites import by_module, find_calls
from ssh_deploy.graph.trace import example_inputs, load_torch, resolve_task, run_torch, trace_model
from ssh_deploy.testing import random_adapter


@pytest.mark.parametrize(
    ("architecture", "head", "task"),
    [
        ("bert", "base", "feature-extraction"),
        ("bert", "text-classification", "text-classification"),
        ("vit", "image", "image-classification"),
        ("gpt2", "causal-lm", "text-generation"),
        ("gpt2", "base", "feature-extraction"),
    ],
)
def test_the_bases_own_task(pico, architecture, head, task):
    assert resolve_task(open_checkpoint(pico(architecture, head)), "auto") == task


def test_the_adapters_task_comes_first(pico):
    checkpoint = open_checkpoint(pico("bert"))
    headed = random_adapter({"q": (2, 2)}, heads={"classifier": {"weight": np.ones((2, 2))}})
    stated = random_adapter({"q": (2, 2)}, task="causal-lm")
    assert resolve_task(checkpoint, "auto", [headed]) == "text-classification"
    assert resolve_task(checkpoint, "auto", [stated]) == "text-generation"
    with pytest.raises(GraphError, match=r"(?s)different tasks: text-classification, text-generation.*--task"):
        resolve_task(checkpoint, "auto", [headed, stated])
    assert resolve_task(checkpoint, "feature-extraction", [headed, stated]) == "feature-extraction"


def test_unknown_task_lists_those_there_are(pico):
    with pytest.raises(UnknownNameError, match=r"(?s)'translation'.*auto, feature-extraction"):
        resolve_task(open_checkpoint(pico("bert")), "translation")


def test_a_missing_head_is_named_and_never_trusted(pico):
    loaded = load_torch(open_checkpoint(pico("bert")), "text-classification")
    assert loaded.missing == {"classifier"}
    whole = load_torch(open_checkpoint(pico("bert", "text-classification")), "text-classification")
    assert whole.missing == frozenset()


def test_opset_out_of_range(pico):
    loaded = load_torch(open_checkpoint(pico("bert")), "feature-extraction")
    with pytest.raises(GraphError, match="Opset 9"):
        trace_model(loaded, opset=9)


def test_a_model_that_transformers_cannot_load(pico, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(pico("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-thing"}))
    with pytest.raises(GraphError, match="transformers cannot load it"):
        load_torch(open_checkpoint(folder), "feature-extraction")


def test_graph_holds_no_path_of_this_machine(pico):
    loaded = load_torch(open_checkpoint(pico("bert")), "feature-extraction")
    traced = trace_model(loaded)
    for node in traced.graph.graph.all_nodes():
        assert "pkg.torch.onnx.stack_trace" not in node.metadata_props
        assert "site-packages" not in str(node.metadata_props)
    calls = by_module(find_calls(traced.graph.graph))
    assert calls["encoder.layer.0.attention.self.query"][0].tokens
    assert traced.hidden == 48


def test_halves_for_rotary_positions_are_one_node_each(tmp_path):
    """Behind an If of slots ORT would leave them two Slices each."""
    traced = trace_model(load_torch(open_checkpoint(pico_decoder(tmp_path)), "text-generation"))
    halved = [node for node in traced.graph.graph if node.op_type == "Split"]
    assert len(halved) == 2 * 2  # query and key of two layers
    assert {node.inputs[0].producer().op_type for node in halved} == {"Transpose"}


@pytest.mark.parametrize("fails", [False, True])
def test_rules_for_pairs_of_nodes_stay_out_of_the_exporter(pico, monkeypatch, fails):
    every, seen, export = rewriter._DEFAULT_REWRITE_RULES, [], torch.onnx.export

    def watched(*args, **kwargs):
        seen.append([rule._target_pattern.has_single_output_node for rule in rewriter._DEFAULT_REWRITE_RULES])
        if fails:
            raise RuntimeError("stopped here")
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", watched)
    loaded = load_torch(open_checkpoint(pico("bert")), "feature-extraction")
    with pytest.raises(GraphError, match="stopped here") if fails else nullcontext():
        trace_model(loaded)
    assert all(seen[0])
    assert 0 < len(seen[0]) < len(every)
    assert rewriter._DEFAULT_REWRITE_RULES is every


def test_conv1d_weights_are_turned(pico):
    base = pico("gpt2", "text-classification")
    adapter = make_adapter(base, "gpt2", labels=3, seed=4)
    checkpoint = open_checkpoint(base)
    model = load_torch(checkpoint, "text-classification").model
    inputs = example_inputs(model)
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    apply_adapter(model, adapter, model_places(adapter, model, checkpoint.config))
    delta = next(d for m, d in adapter.deltas.items() if m.endswith("h.0.attn.c_attn"))
    changed = (model.transformer.h[0].attn.c_attn.weight.detach() - before).numpy()
    np.testing.assert_allclose(changed, delta.dense().numpy().T, atol=1e-5)
    np.testing.assert_array_equal(model.score.weight.detach().numpy(), adapter.replaced["score"].tensors["weight"])
    assert run_torch(model, inputs, ["logits"])["logits"].shape == (2, 3)


def test_a_head_of_another_size_is_refused(pico):
    base = pico("bert", "text-classification")
    adapter = make_adapter(base, "bert", labels=5)
    checkpoint = open_checkpoint(base)
    model = load_torch(checkpoint, "text-classification").model
    assert label_count(adapter, model) == 5
    with pytest.raises(AdapterMismatchError, match=r"classifier\.weight is \[5, 48\], the model has \[3, 48\]"):
        apply_adapter(model, adapter, model_places(adapter, model, checkpoint.config))


def test_labels_are_counted_at_the_last_head_layer_whatever_its_name(pico):
    base = pico("distilbert", "text-classification")
    adapter = make_adapter(base, "distilbert", labels=5)
    assert sorted(adapter.replaced)[-1] == "pre_classifier"  # alphabetical order would count its 48 rows
    assert label_count(adapter, load_torch(open_checkpoint(base), "text-classification").model) == 5


def test_rounded_changes_values_only():
    adapter = random_adapter({"q": (12, 12)}, n=9)
    half = rounded(adapter, "float16").deltas["q"]
    assert half.values.dtype == np.float16
    np.testing.assert_array_equal(half.rows, adapter.deltas["q"].rows)

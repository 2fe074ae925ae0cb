"""Quantised bases: adapters stay exact, no adapter is the quantised plain graph, and what cannot be is refused."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from decoder_folders import ENDS, decoder_adapter, pico_decoder
from exported_folders import write_adapter

from ssh_deploy.adapters.file import write_file
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.cli.main import main
from ssh_deploy.errors import CheckpointError, GraphError, UnknownNameError
from ssh_deploy.graph.quantizing import check_quantization, hold_quantized, quantize_weights
from ssh_deploy.graph.trace import load_torch
from ssh_deploy.jobs import export_quantized
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.verifying import verify_target


def graph(folder):
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def session(folder):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def weights_of(folder):
    """Bytes of everything that is no adapter's, in the file or beside it."""
    stored = ir.load(folder / "model.onnx").graph.initializers.values()
    return sum(value.const_value.nbytes for value in stored if not value.name.startswith("adapter"))


def initializers(folder):
    return {i.name: (tuple(i.dims), i.data_type) for i in graph(folder).initializer}


@pytest.fixture(scope="module")
def bert(pico, tmp_path_factory):
    """Exports of a pico BERT with a headed adapter by scheme, ``none`` among them."""
    folder = tmp_path_factory.mktemp("quantized-bert")
    base = pico("bert", "text-classification")
    headed = write_adapter(folder / "headed.safetensors", base, "bert", labels=5, seed=1)
    reports = {}
    for scheme in ("none", "int8", "int4"):
        options = ExportOptions(quantize=scheme, block=16)
        reports[scheme] = export_model(base, [str(headed)], folder / scheme, options=options)
    return base, headed, folder, reports


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(base, adapter file, folder exported in int4 with shared embeddings, report)."""
    folder = tmp_path_factory.mktemp("quantized-llama")
    base = pico_decoder(folder / "base")
    adapter = folder / "red.safetensors"
    write_file(decoder_adapter(base, seed=0, ends=ENDS), adapter, values_dtype=np.float16)
    report = export_model(base, [str(adapter)], folder / "out", options=ExportOptions(quantize="int4", block=16))
    return base, adapter, folder / "out", report


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_inputs_gates_and_everything_of_adapters_stay_as_they_were(bert, scheme):
    _, _, folder, _ = bert
    before, after = graph(folder / "none"), graph(folder / scheme)
    assert [i.name for i in after.input] == [i.name for i in before.input]
    assert [o.name for o in after.output] == [o.name for o in before.output]
    assert after.input[-1].name == "adapter_guard"
    assert after.input[-1] == before.input[-1]
    assert sum(n.op_type == "If" for n in after.node) == sum(n.op_type == "If" for n in before.node)
    own, kept = initializers(folder / "none"), initializers(folder / scheme)
    of_adapters = {name for name in own if name.startswith("adapter")}
    assert any(len(own[name][0]) > 1 and own[name][1] == onnx.TensorProto.FLOAT for name in of_adapters)  # factors
    assert {name: kept[name] for name in of_adapters} == {name: own[name] for name in of_adapters}
    for name in ("headed.onnx_adapter",):
        paths = [folder / s / "adapters" / name for s in ("none", scheme)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_every_linear_layer_but_the_head_is_quantised_and_the_folder_says_so(bert, scheme, bits):
    _, _, folder, reports = bert
    stated = json.loads((folder / scheme / "deployment.json").read_text())["quantized"]
    assert json.loads((folder / "none" / "deployment.json").read_text())["quantized"] is None
    nodes = [n for n in graph(folder / scheme).node if n.op_type == "MatMulNBits"]
    assert len(nodes) == len(stated["modules"]) == 13  # six in each of two layers, and the pooler
    assert set(stated["modules"].values()) == {bits}
    assert "classifier" not in stated["modules"]
    assert "bert.encoder.layer.1.output.dense" in stated["modules"]
    assert (stated["scheme"], stated["block"], stated["accuracy_level"]) == (scheme, 16, 4)
    assert stated["bytes_after"] < stated["bytes_before"] / (2.5 if bits == 8 else 4)
    assert 0 < stated["weight_error"] < (0.01 if bits == 8 else 0.1)
    assert 0 < stated["drift"]["rms"] < stated["drift"]["max"] < 0.1
    assert any(note.startswith(f"{scheme}: 13 weights") for note in reports[scheme].notes)
    assert f"{scheme} and float32" in (folder / scheme / "README.md").read_text()
    sizes = {s: weights_of(folder / s) for s in ("none", "int8", "int4")}
    assert sizes["int4"] < sizes["int8"] < sizes["none"]


def test_no_adapter_has_the_bits_of_the_quantised_plain_graph(bert, tmp_path):
    base, _, folder, _ = bert
    export_model(base, [], tmp_path / "plain", options=ExportOptions(quantize="int4", block=16))
    assert not [i.name for i in graph(tmp_path / "plain").input if "adapter" in i.name]
    rng = np.random.default_rng(0)
    for shape in ((1, 3), (4, 17)):
        feeds = {"input_ids": rng.integers(5, 60, shape), "attention_mask": np.ones(shape, np.int64)}
        feeds["token_type_ids"] = np.zeros(shape, np.int64)
        answers = [session(f).run(["logits"], feeds)[0] for f in (tmp_path / "plain", folder / "int4")]
        assert answers[0].tobytes() == answers[1].tobytes()


def test_a_rows_answer_does_not_depend_on_who_shares_its_batch(bert):
    """The reason against scaling activations by the whole batch."""
    _, _, folder, _ = bert
    rng = np.random.default_rng(1)
    feeds = {"input_ids": rng.integers(5, 60, (6, 9)), "attention_mask": np.ones((6, 9), np.int64)}
    feeds["token_type_ids"] = np.zeros((6, 9), np.int64)
    opened = session(folder / "int8")
    whole = opened.run(["logits"], feeds)[0]
    for row in range(6):
        alone = opened.run(["logits"], {name: array[row : row + 1] for name, array in feeds.items()})[0]
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-5)


def test_a_tied_embedding_is_stored_once_in_eight_bits(llama):
    _, _, folder, _ = llama
    stated = json.loads((folder / "deployment.json").read_text())["quantized"]
    assert stated["shared_embedding"]
    tender = ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    assert {m for m, bits in stated["modules"].items() if bits == 8} == {
        "lm_head", *(f"model.layers.{i}.{m}" for i in (0, 1) for m in tender)
    }  # fmt: skip
    assert len(stated["modules"]) == 15
    found = graph(folder)
    assert [n.op_type for n in found.node if n.op_type in ("Gather", "GatherBlockQuantized")].count(
        "GatherBlockQuantized"
    ) == 1
    assert not [
        i.name for i in found.initializer if list(i.dims) == [320, 48] and i.data_type == onnx.TensorProto.FLOAT
    ]
    assert stated["effects"]["red"] > 0.9


def test_verify_holds_the_adapter_against_the_base_that_the_graph_stores(llama, tmp_path, capsys):
    base, adapter, folder, _ = llama
    verdict = verify_target(base, adapter, folder)
    assert verdict.ok
    assert verdict.quantized["scheme"] == "int4"
    assert 0 < verdict.rms_diff < verdict.tolerance < verdict.max_abs_diff
    with pytest.raises(SystemExit, match="0"):
        main(["verify", str(base), str(adapter), str(folder)])
    assert "base in int4:" in capsys.readouterr().out
    other = tmp_path / "other.safetensors"
    write_file(decoder_adapter(base, seed=9, ends=ENDS), other, values_dtype=np.float16)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    deployment = json.loads((broken / "deployment.json").read_text())
    deployment["adapters"]["red"]["source_digest"] = verify_digest(other)
    (broken / "deployment.json").write_text(json.dumps(deployment))
    assert not verify_target(base, other, broken).ok  # the folder's own file is another adapter


def verify_digest(path):
    from ssh_deploy.adapters.reading import read_adapter

    return read_adapter(path).digest


def test_a_merged_graph_is_quantised_too(llama, tmp_path):
    base, adapter, _, _ = llama
    options = ExportOptions(quantize="int8", mode="merged")
    report = export_model(base, [str(adapter)], tmp_path / "merged", options=options)
    stated = json.loads((tmp_path / "merged" / "deployment.json").read_text())["quantized"]
    assert len(stated["modules"]) == 15
    assert not stated["shared_embedding"]  # 48 numbers are one block and a half: rows end inside a block
    assert stated["effects"] == {}
    assert report.validation["red"].max_abs_diff < 0.1 * report.validation["red"].spread
    assert verify_target(base, adapter, tmp_path / "merged").ok


def test_gpt2_keeps_its_bias_and_its_flattened_sites(pico, tmp_path):
    base = pico("gpt2", "causal-lm")
    report = export_model(
        base, [], tmp_path / "out", options=ExportOptions(quantize="int8", sites=("linear",), kinds=("hartley",))
    )
    nodes = [n for n in graph(tmp_path / "out").node if n.op_type == "MatMulNBits"]
    assert len(nodes) == 9
    assert sum(len(n.input) == 6 and bool(n.input[5]) for n in nodes) == 8  # all but the output embedding
    assert report.validation[""].max_abs_diff < 0.02 * report.validation[""].spread


def test_half_precision_weights_are_quantised_and_what_is_left_stays_half(bert, tmp_path):
    base, headed, folder, _ = bert
    options = ExportOptions(quantize="int4", block=16, dtype="float16")
    export_model(base, [str(headed)], tmp_path / "half", options=options)
    assert weights_of(tmp_path / "half") < weights_of(folder / "int4")
    assert len([n for n in graph(tmp_path / "half").node if n.op_type == "MatMulNBits"]) == 13


def test_the_reference_is_what_the_codes_stand_for(llama):
    """`hold_quantized` against a plain reading of the file."""
    base, _, folder, _ = llama
    model = load_torch(open_checkpoint(base), "text-generation").model
    stored = ir.load(folder / "model.onnx")
    stated = json.loads((folder / "deployment.json").read_text())["quantized"]
    hold_quantized(model, stated, folder / "model.onnx")
    node = next(n for n in stored.graph if n.op_type == "MatMulNBits" and "q_proj" in str(n.metadata_props))
    codes, scales, zeros = (value.const_value.numpy() for value in node.inputs[1:4])
    want = np.empty((48, 48))
    for row in range(48):
        for col in range(48):
            block, place = divmod(col, 16)
            code = codes[row, block, place // 2] >> 4 * (place % 2) & 15
            want[row, col] = scales[row, block] * (int(code) - int(zeros[row, block // 2] >> 4 * (block % 2) & 15))
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_allclose(weight, want, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_four_bits_are_rounded_by_what_a_decoders_layers_read(llama, bert, tmp_path):
    base, adapter, folder, report = llama
    stated = json.loads((folder / "deployment.json").read_text())["quantized"]
    assert stated["rounding"] == "gptq"
    assert any("GPTQ" in note for note in report.notes)
    options = ExportOptions(quantize="int4", block=16, calibrate=0)
    export_model(base, [str(adapter)], tmp_path / "nearest", options=options)
    nearest = json.loads((tmp_path / "nearest" / "deployment.json").read_text())["quantized"]
    assert nearest["rounding"] == "nearest"
    assert nearest["weight_error"] < stated["weight_error"]
    encoder = json.loads((bert[2] / "int4" / "deployment.json").read_text())["quantized"]
    assert encoder["rounding"] == "nearest"  # nothing tells what it reads


def test_codes_of_another_base_are_no_reference(llama):
    base, _, folder, _ = llama
    stated = json.loads((folder / "deployment.json").read_text())["quantized"]
    model = load_torch(open_checkpoint(base), "text-generation").model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.neg_()
    with pytest.raises(GraphError, match=r"layers\.1\.mlp\.up_proj are of another weight"):
        hold_quantized(model, stated, folder / "model.onnx")
    stated["modules"]["model.norm"] = 4
    with pytest.raises(GraphError, match=r"no codes for model\.norm"):
        hold_quantized(load_torch(open_checkpoint(base), "text-generation").model, stated, folder / "model.onnx")


def test_what_cannot_be_quantised_is_refused(llama, tmp_path):
    base, adapter, folder, _ = llama
    with pytest.raises(UnknownNameError, match=r"No quantisation 'int3'[\s\S]*int8, int4"):
        export_model(base, [str(adapter)], tmp_path / "x", options=ExportOptions(quantize="int3"))
    with pytest.raises(GraphError, match="Blocks of 33"):
        check_quantization("int4", 33)
    stored = ir.load(folder / "model.onnx")
    with pytest.raises(GraphError, match="quantised already"):
        quantize_weights(stored, scheme="int4")
    nothing = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(GraphError, match="No linear layer"):
        quantize_weights(nothing, scheme="int4")
    awq = tmp_path / "awq"
    shutil.copytree(base, awq)
    config = json.loads((awq / "config.json").read_text())
    (awq / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match=r"quantised \(awq\)"):
        export_model(awq, [str(adapter)], tmp_path / "y", options=ExportOptions(quantize="int4"))
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_an_adapters_effect_is_compared_by_direction():
    off, on = [{"logits": np.zeros((2, 3))}], [{"logits": np.eye(2, 3)}]
    assert export_quantized.kept_effect((on, off), (on, off)) == pytest.approx(1)
    assert export_quantized.kept_effect((off, off), (on, off)) is None
    turned = [{"logits": np.eye(2, 3, 1)}]
    assert export_quantized.kept_effect((turned, off), (on, off)) == pytest.approx(0)
    wide = [{"logits": np.zeros((2, 4))}]
    assert export_quantized.kept_effect((wide, off), (on, off)) is None
    assert export_quantized.drift(on, off)["max"] > export_quantized.drift(on, off)["rms"] > 0

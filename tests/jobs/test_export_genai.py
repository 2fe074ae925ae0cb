"""Graphs of onnxruntime-genai's builder with our slots: against torch, in onnxruntime-genai itself, and refusals."""

import json
import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_folders import ENDS, decoder_adapter, pico_decoder, torch_tokens

from ssh_deploy.adapters.file import write_file
from ssh_deploy.errors import DependencyError, GraphError, UnknownNameError
from ssh_deploy.graph import genai_builder
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.verifying import verify_target

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "genai_adapters.py"
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def og():
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


@pytest.fixture(scope="module")
def built(og, tmp_path_factory):
    """(base, adapter file, folder with the exports ``float32`` and ``int4``)."""
    folder = tmp_path_factory.mktemp("genai")
    base = pico_decoder(folder / "base", head_dim=16)
    adapter = folder / "red.safetensors"
    write_file(decoder_adapter(base, seed=0, ends=ENDS), adapter, values_dtype=np.float16)
    for name, scheme in (("float32", "none"), ("int4", "int4")):
        options = ExportOptions(builder="genai", quantize=scheme, block=16)
        export_model(base, [str(adapter)], folder / name, options=options)
    return base, adapter, folder


@pytest.mark.parametrize(("name", "nodes"), [("float32", 0), ("int4", 15)])
def test_its_graph_has_slots_under_hugging_face_names(built, name, nodes):
    _, _, folder = built
    folder = folder / name
    deployment = json.loads((folder / "deployment.json").read_text())
    assert deployment["builder"] == "genai"
    assert deployment["inputs"][:2] == ["input_ids", "attention_mask"]
    assert {s["module"].removeprefix("model.") for s in deployment["sites"]} == {
        f"layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 2
    assert kinds.count("MatMulNBits") == nodes == len((deployment["quantized"] or {"modules": ()})["modules"])
    assert kinds.count("GatherBlockQuantized") == bool(nodes)  # the builder ties the embedding through a Transpose
    assert graph.input[-1].name == "adapter_guard"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(folder.parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["float32", "int4"])
def test_verify_answers_for_it(built, name):
    base, adapter, folder = built
    verdict = verify_target(base, adapter, folder / name)
    assert verdict.ok
    if name == "float32":
        assert (verdict.written.same, verdict.written.apart) == (20, 0)
        assert verdict.max_abs_diff < 1e-4 * 200


def test_genai_loads_our_adapter_files_unchanged(og, built):
    """onnxruntime-genai writes with the adapter's file what torch writes with its ΔW in the weights."""
    generate = runpy.run_path(str(EXAMPLE))["generate"]
    base, adapter, folder = built
    model = og.Model(str(folder / "float32"))
    tokenizer = og.Tokenizer(model)
    tokens = [int(token) for token in tokenizer.encode(PROMPT)]
    for name, file in ((None, None), ("red", adapter)):
        (want,) = torch_tokens(base, [tokens], adapter=file, most=12)
        assert generate(folder / "float32", PROMPT, adapter=name, most=12) == tokenizer.decode(np.int32(want))
    quantized = [generate(folder / "int4", PROMPT, adapter=name, most=12) for name in (None, "red")]
    assert quantized[0] != quantized[1]


def test_what_the_builder_cannot_do_is_refused(pico, built, tmp_path, monkeypatch):
    base, adapter, _ = built
    out = tmp_path / "out"
    with pytest.raises(GraphError, match=r"builder does not know GPT2LMHeadModel\.\n.*Leave --builder out"):
        export_model(pico("gpt2", "causal-lm"), [], out, options=ExportOptions(builder="genai"))
    with pytest.raises(GraphError, match="builds decoders, and the task is text-classification"):
        export_model(pico("bert", "text-classification"), [], out, options=ExportOptions(builder="genai"))
    with pytest.raises(GraphError, match=r"merge` first"):
        export_model(base, [str(adapter)], out, options=ExportOptions(builder="genai", mode="merged"))
    with pytest.raises(UnknownNameError, match=r"No builder 'olive'[\s\S]*torch, genai"):
        export_model(base, [str(adapter)], out, options=ExportOptions(builder="olive"))
    monkeypatch.setattr(genai_builder, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(DependencyError, match="needs onnxruntime-genai"):
        export_model(base, [str(adapter)], out, options=ExportOptions(builder="genai"))
    assert not out.exists()

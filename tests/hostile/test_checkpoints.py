"""Bases that must be refused, each with its message: damaged, quantised, pickled, or reaching out of their folder."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssh_deploy.adapters.file import write_file
from ssh_deploy.checkpoints.index import INDEX, open_checkpoint
from ssh_deploy.errors import AdapterMismatchError, CheckpointError
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.testing import random_adapter

pytestmark = pytest.mark.hostile

SITE = "encoder.layer.0.attention.self.query"


@pytest.fixture
def base(pico, tmp_path):
    return shutil.copytree(pico("bert"), tmp_path / "base")


@pytest.fixture
def sharded(base):
    """The same in two shards, with an index."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, base / file)
    places = {name: file for file, held in halves.items() for name in held}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return base


@pytest.fixture
def adapter(tmp_path):
    write_file(random_adapter({SITE: (48, 48)}), tmp_path / "a.safetensors")
    return str(tmp_path / "a.safetensors")


def reindex(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, adapter, tmp_path, message, error=CheckpointError):
    """Opening says so, or merging does, and there is no output."""
    with pytest.raises(error, match=message):
        merge_adapters(folder, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_good_sharded_base_is_merged(sharded, adapter, tmp_path):
    merge_adapters(sharded, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "two.safetensors").exists()


def test_missing_shard(sharded, adapter, tmp_path):
    (sharded / "two.safetensors").unlink()
    refused(sharded, adapter, tmp_path, r"shard two\.safetensors is missing \(2 are declared\)\.\n.*Fetch")


@pytest.mark.parametrize(
    "name", ["../two.safetensors", "/etc/passwd", "sub/two.safetensors", "..", ".", "", "a\\..\\two.safetensors"]
)
def test_an_index_that_names_paths(sharded, adapter, tmp_path, name):
    shutil.copy(sharded / "two.safetensors", sharded.parent / "two.safetensors")
    reindex(sharded, lambda index: index["weight_map"].update({SITE + ".weight": name}))
    refused(sharded, adapter, tmp_path, r"names the file .* not a plain name in its folder.*\n.*forged")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 3}, "x"])
def test_an_index_without_a_map(sharded, adapter, tmp_path, weight_map):
    reindex(sharded, lambda index: index.update(weight_map=weight_map))
    refused(sharded, adapter, tmp_path, "no weight_map of names to files")


def test_an_index_that_places_a_tensor_where_it_is_not(sharded, adapter, tmp_path):
    def swap(index):
        index["weight_map"]["embeddings.LayerNorm.bias"] = "two.safetensors"

    reindex(sharded, swap)
    refused(sharded, adapter, tmp_path, r"says embeddings\.LayerNorm\.bias is in two\.safetensors; it is not")


def test_a_shard_with_more_than_the_index_says(sharded, adapter, tmp_path):
    reindex(sharded, lambda index: index["weight_map"].pop("embeddings.LayerNorm.bias"))
    refused(sharded, adapter, tmp_path, r"one\.safetensors holds embeddings\.LayerNorm\.bias, which")


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(sharded, adapter, tmp_path, name, raw):
    (sharded / name).write_bytes(raw)
    refused(sharded, adapter, tmp_path, r"not JSON|not a JSON object")


@pytest.mark.parametrize("name", ["one.safetensors", "config.json", INDEX, "tokenizer.json"])
def test_links_out_of_the_folder(sharded, adapter, tmp_path, name):
    """Weights, configs and mere companions alike."""
    (sharded / name).rename(tmp_path / "outside")
    (sharded / name).symlink_to(tmp_path / "outside")
    refused(sharded, adapter, tmp_path, rf"{name} leads out of the folder, to .*outside\.\n.*not followed")


def test_a_linked_subfolder_out_of_the_folder(base, adapter, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    (base / "sub").symlink_to(tmp_path / "secrets")
    refused(base, adapter, tmp_path, r"sub leads out of the folder")


def test_a_link_to_nothing(base, adapter, tmp_path):
    (base / "extra.txt").symlink_to("nowhere")
    refused(base, adapter, tmp_path, r"extra\.txt is missing \(or a link to nothing\)")


def test_a_loop_of_links(base, adapter, tmp_path):
    (base / "a").symlink_to("b")
    (base / "b").symlink_to("a")
    refused(base, adapter, tmp_path, "is missing")


def test_a_fake_hub_cache_does_not_open_other_folders(base, adapter, tmp_path):
    """Only blobs of the very same cached model are reachable from a snapshot."""
    snapshot = tmp_path / "cache" / "snapshots" / "rev"
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    shutil.copytree(base, snapshot)
    (tmp_path / "cache" / "secret").write_text("secret")
    (snapshot / "extra.txt").symlink_to("../../secret")
    refused(snapshot, adapter, tmp_path, r"extra\.txt leads out of the folder")


@pytest.mark.parametrize(
    "config", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}, {"load_in_4bit": True}, "awq"]
)
def test_quantised_by_its_config(base, adapter, tmp_path, config):
    text = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**text, "quantization_config": config}))
    refused(base, adapter, tmp_path, r"the base is quantised .*\n.*unquantised checkpoint")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, ml_dtypes.float8_e4m3fn])
def test_quantised_by_its_numbers(base, adapter, tmp_path, dtype):
    tensors = load_file(base / "model.safetensors")
    tensors[f"{SITE}.weight"] = np.zeros((48, 48), dtype)
    save_file(tensors, base / "model.safetensors")
    refused(base, adapter, tmp_path, r"stored as (I8|U8|I32|F8_E4M3): the base is quantised or packed")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_pickled_weights_only(base, adapter, tmp_path, name):
    (base / "model.safetensors").rename(base / name)
    refused(base, adapter, tmp_path, rf"no model\.safetensors .* there is {name}, which is never read.*\n.*safe_serial")


def test_no_weights(base, adapter, tmp_path):
    (base / "model.safetensors").unlink()
    refused(base, adapter, tmp_path, r"no model\.safetensors and no .*index\.json\.\n.*folder of a model")


def test_a_file_instead_of_a_folder(base, adapter, tmp_path):
    refused(base / "model.safetensors", adapter, tmp_path, r"a file, not the folder")


def test_no_config(base, adapter, tmp_path):
    (base / "config.json").unlink()
    refused(base, adapter, tmp_path, r"config\.json is missing")


def test_truncated_weights(base, adapter, tmp_path):
    raw = (base / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        (base / "model.safetensors").write_bytes(raw[:length])
        refused(base, adapter, tmp_path, r"model\.safetensors.*(truncated|no safetensors file)")


def test_a_weight_of_another_shape(base, tmp_path):
    write_file(random_adapter({SITE: (80, 48)}), tmp_path / "b.safetensors")
    refused(base, str(tmp_path / "b.safetensors"), tmp_path, r"80×48; .* has 48×48", AdapterMismatchError)


def test_a_site_that_is_no_matrix(base, tmp_path):
    write_file(random_adapter({"embeddings.LayerNorm": (48, 1)}), tmp_path / "b.safetensors")
    refused(base, str(tmp_path / "b.safetensors"), tmp_path, r"\[48\], not a matrix", AdapterMismatchError)


def test_code_of_a_checkpoint_is_never_run(base, tmp_path):
    """auto_map and a modelling file lie there; a merge that asks transformers for the class runs neither."""
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass Config: pass\nclass Model: pass\n"
    )
    head = {"classifier": {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}}
    write_file(random_adapter({f"bert.{SITE}": (48, 48)}, heads=head), tmp_path / "b.safetensors")
    merge_adapters(base, [str(tmp_path / "b.safetensors")], tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_an_architecture_nobody_knows(base, tmp_path):
    """Without a head it is only tensors; with a head it needs a class, and there is none."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "zorp", "architectures": ["Zorp"]}))
    write_file(random_adapter({SITE: (48, 48)}), tmp_path / "a.safetensors")
    merge_adapters(base, [str(tmp_path / "a.safetensors")], tmp_path / "fine")
    head = {"classifier": {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}}
    write_file(random_adapter({SITE: (48, 48)}, heads=head), tmp_path / "b.safetensors")
    refused(
        base, str(tmp_path / "b.safetensors"), tmp_path, r"makes no .* of model type 'zorp'.*\n.*Upgrade transformers"
    )
    assert open_checkpoint(tmp_path / "fine").config["model_type"] == "zorp"

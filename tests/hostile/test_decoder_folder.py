"""Decoders' folders that are forged, and bases whose files beside the weights are damaged: each with its message."""

import json
import shutil
from types import SimpleNamespace

import pytest
from contract_folder import edit, make_folder

from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.errors import CheckpointError, DeploymentError
from ssh_deploy.graph.kv_cache import CacheShape
from ssh_deploy.jobs.export_decoder import copy_template, describe_decoder
from ssh_deploy.runtimes.folder import open_folder

pytestmark = pytest.mark.hostile

GOOD = {
    "layers": 1,
    "kv_heads": 2,
    "head_dim": 4,
    "past": ["past_key_values.0.key", "past_key_values.0.value"],
    "present": ["present.0.key", "present.0.value"],
    "logits_at": None,
    "window": None,
    "context": 32,
    "bos": None,
    "eos": [3],
    "pad": 0,
    "chat_template": None,
}


def test_a_good_one_opens(tmp_path):
    folder = make_folder(tmp_path / "out", task="text-generation")
    assert open_folder(folder).decoder is None
    edit(folder, lambda fields: fields.update(decoder=GOOD))
    assert open_folder(folder).decoder.eos == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2}, "2 layers, 2 heads, 4 wide, with 2 inputs and 2 outputs"),
        ({"layers": 0, "past": [], "present": []}, "0 layers"),
        ({"layers": "1"}, "layers is '1', not int"),
        ({"head_dim": True}, "head_dim is True, not int"),
        ({"past": "past_key_values.0.key"}, "past is .*not list"),
        ({"present": ["present.0.key", 1]}, "present"),
        ({"eos": 3}, "eos is 3, not list"),
        ({"eos": ["</s>"]}, "eos"),
        ({"context": "long"}, "context is 'long', not int"),
        ({"window": 1.5}, "window is 1.5, not int"),
        ({"logits_at": 1}, "logits_at is 1, not str"),
        ({"chat_template": "../../etc/passwd"}, "leads out of the folder|is missing"),
        ({"chat_template": "none.jinja"}, "none.jinja is missing"),
    ],
)
def test_forged_fields_are_refused(tmp_path, change, message):
    folder = make_folder(tmp_path / "out", task="text-generation")
    edit(folder, lambda fields: fields.update(decoder=GOOD | change))
    with pytest.raises(DeploymentError, match=message):
        open_folder(folder)


def test_a_template_that_is_a_link_out_of_the_folder(tmp_path):
    folder = make_folder(tmp_path / "out", task="text-generation")
    (tmp_path / "secret").write_text("secret")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    edit(folder, lambda fields: fields.update(decoder=GOOD | {"chat_template": "chat_template.jinja"}))
    with pytest.raises(DeploymentError, match="leads out of the folder"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("generation_config.json", b"{", "not JSON"),
        ("generation_config.json", b"[2]", "not a JSON object"),
        ("generation_config.json", json.dumps({"eos_token_id": "</s>"}).encode(), "eos_token_id is '</s>', no token"),
        ("generation_config.json", json.dumps({"pad_token_id": -1}).encode(), "pad_token_id is -1, no token"),
        ("chat_template.jinja", b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_damaged_files_beside_the_weights(pico, tmp_path, name, data, message):
    base = tmp_path / "base"
    shutil.copytree(pico("llama", "causal-lm"), base)
    (base / name).write_bytes(data)

    traced = SimpleNamespace(cache=CacheShape(2, 2, 12), graph=SimpleNamespace(graph=SimpleNamespace(inputs=())))
    with pytest.raises(CheckpointError, match=message):
        describe_decoder(open_checkpoint(base), traced)
    if name.endswith(".jinja"):
        with pytest.raises(CheckpointError, match=message):
            copy_template(open_checkpoint(base), tmp_path)

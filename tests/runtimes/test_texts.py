"""Texts to feeds: what transformers' tokenizer gives for padding=True, truncation=True, without transformers."""

import json

import numpy as np
import pytest
from contract_folder import make_folder

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.folder import open_folder
from ssh_deploy.runtimes.session import Input
from ssh_deploy.runtimes.texts import Texts

INPUTS = {n: Input(n, np.int64, ("batch", "tokens")) for n in ("input_ids", "attention_mask", "token_type_ids")}
TEXTS = ["free prize now", "what", "good film " * 80, "Where IS the Zyzzyva?"]


def configured(folder, **fields):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return Texts(open_folder(folder), INPUTS)


@pytest.mark.parametrize("fields", [{}, {"padding_side": "left"}, {"truncation_side": "left", "model_max_length": 9}])
def test_same_as_transformers(tmp_path, fields):
    from transformers import AutoTokenizer

    texts = configured(make_folder(tmp_path / "out"), **fields)
    want = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, truncation=True, return_tensors="np")
    feeds, mask = texts.feeds(TEXTS)
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(feeds[name], want[name])
        assert feeds[name].dtype == np.int64
    np.testing.assert_array_equal(mask, want["attention_mask"] == 1)


def test_same_as_transformers_on_the_real_tokenizer(tmp_path, minilm_path):
    """all-MiniLM-L6-v2's tokenizer.json itself says "always pad to 128": that is not obeyed."""
    from transformers import AutoTokenizer

    folder = make_folder(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((minilm_path / name).read_bytes())
    want = AutoTokenizer.from_pretrained(minilm_path)(TEXTS, padding=True, truncation=True, return_tensors="np")
    feeds, _ = Texts(open_folder(folder), INPUTS).feeds(TEXTS)
    assert feeds["input_ids"].shape == want["input_ids"].shape
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, want[name])


def test_limit_falls_back_to_the_models_positions(tmp_path):
    texts = configured(make_folder(tmp_path / "out"), model_max_length=10**30)
    assert texts.max_length == 16
    assert texts.feeds(["free " * 100])[0]["input_ids"].shape == (1, 16)


def test_models_that_texts_do_not_feed(tmp_path):
    folder = open_folder(make_folder(tmp_path / "out"))
    with pytest.raises(DeploymentError, match=r"(?s)takes pixel_values.*run\(feeds"):
        Texts(folder, {"pixel_values": Input("pixel_values", np.float32, ("b", 3, 8, 8))})


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = make_folder(tmp_path / "out")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DeploymentError, match=r"tokenizer\.json: not a tokenizer"):
        Texts(open_folder(folder), INPUTS)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DeploymentError, match=r"tokenizer\.json is missing"):
        Texts(open_folder(folder), INPUTS)


def test_a_text_without_tokens_is_refused(tmp_path):
    folder = make_folder(tmp_path / "out")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(DeploymentError, match="Text 1 has no token"):
        Texts(open_folder(folder), INPUTS).feeds(["free", ""])

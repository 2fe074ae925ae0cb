"""Fitting an adapter to a base: places, shapes, ties and how much is verified."""

import numpy as np
import pytest

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.fitting import BaseShapes, fit
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.testing import random_adapter

SITE = "encoder.layer.0.output.dense"


def test_an_adapter_read_or_to_be_read(pico, tmp_path):
    checkpoint = open_checkpoint(pico("bert"))
    adapter = random_adapter({f"bert.{SITE}": (48, 80)})
    write_file(adapter, tmp_path / "a.safetensors")
    for given in (adapter, tmp_path / "a.safetensors", str(tmp_path / "a.safetensors")):
        fitted = fit(given, checkpoint)
        assert fitted.places == {f"bert.{SITE}": SITE}
        assert fitted.untied == frozenset()
        assert not fitted.verified
        assert set(fitted.fingerprint.sites) == {SITE}
    np.testing.assert_array_equal(fitted.adapter.deltas[f"bert.{SITE}"].rows, adapter.deltas[f"bert.{SITE}"].rows)


@pytest.mark.parametrize(
    ("trained_on", "merged_into"), [("base", "text-classification"), ("text-classification", "base")]
)
def test_a_fingerprint_holds_for_the_same_weights_under_either_names(pico, tmp_path, trained_on, merged_into):
    """A task model made from a base is the same base, whatever prefix its file has."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(pico("bert", task="text-classification"))
    model.save_pretrained(tmp_path / "text-classification")
    model.bert.save_pretrained(tmp_path / "base")
    assert AutoModel.from_pretrained(tmp_path / "base") is not None
    modules = [f"bert.{SITE}"]
    stored = fingerprint_of(open_checkpoint(tmp_path / trained_on), modules)
    adapter = random_adapter({f"bert.{SITE}": (48, 80)}, fingerprint=stored)
    assert fit(adapter, open_checkpoint(tmp_path / merged_into), require_fingerprint=True).verified


def test_conv1d_shapes_are_out_in(pico):
    checkpoint = open_checkpoint(pico("gpt2"))
    assert fit(random_adapter({"transformer.h.0.mlp.c_fc": (192, 48)}), checkpoint).places == {
        "transformer.h.0.mlp.c_fc": "h.0.mlp.c_fc"
    }
    with pytest.raises(AdapterMismatchError, match=r"48×192; .* has 192×48"):
        fit(random_adapter({"transformer.h.0.mlp.c_fc": (48, 192)}), checkpoint)


def test_a_tied_module_is_placed_on_its_twin(pico):
    fitted = fit(random_adapter({"lm_head": (64, 48)}), open_checkpoint(pico("gpt2", task="causal-lm")))
    assert fitted.places == {"lm_head": "transformer.wte"}
    assert fitted.untied == {"lm_head"}


def test_shapes_of_a_base_by_the_adapters_names(pico):
    shapes = BaseShapes(open_checkpoint(pico("bert")))
    assert shapes[f"bert.{SITE}"] == shapes[SITE] == (48, 80)
    assert SITE in list(shapes)
    assert len(shapes) > 10
    with pytest.raises(AdapterMismatchError, match="match nothing"):
        shapes["encoder.layer.9.output.dense"]

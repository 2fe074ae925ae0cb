"""PEFT folders that must be refused, each with its message, whatever their config says."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssh_deploy.adapters.fitting import fit
from ssh_deploy.adapters.peft_folder import CONFIG, WEIGHTS, read_folder, write_folder
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError, DeployError, RegistryError
from ssh_deploy.testing import random_adapter, write_peft_example

pytestmark = pytest.mark.hostile

SITE = "encoder.layer.0.attention.self.query"
HEAD = {"classifier": {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}}
NAME = f"base_model.model.{SITE}"


@pytest.fixture
def good(tmp_path):
    write_folder(random_adapter({SITE: (48, 48)}, n=6, heads=HEAD), tmp_path / "good")
    return tmp_path / "good"


def loaded(good):
    from safetensors.numpy import load_file

    return json.loads((good / CONFIG).read_text()), load_file(good / WEIGHTS)


def forge(good, folder, config=None, tensors=None):
    old_config, old_tensors = loaded(good)
    merged = {**old_tensors, **(tensors or {})}
    return write_peft_example(
        folder, {**old_config, **(config or {})}, {k: v for k, v in merged.items() if v is not None}
    )


def places(*pairs):
    return np.array(pairs, np.int32).T.copy()


@pytest.mark.parametrize(
    ("spectrum", "indices", "message"),
    [
        (np.ones(2, np.float32), places((0, 0), (48, 1)), r"coefficient 1 has row 48, outside 0…47"),
        (np.ones(2, np.float32), places((0, -1), (1, 1)), r"coefficient 0 has column -1, outside 0…47"),
        (np.ones(2, np.float32), places((3, 4), (3, 4)), r"place \(3, 4\) occurs twice"),
        (np.array([1, np.nan], np.float32), places((0, 0), (1, 1)), "1 of 2 values are NaN"),
        (np.array([1, np.inf], np.float32), places((0, 0), (1, 1)), "1 of 2 values are NaN or infinite"),
        (np.ones(3, np.float32), places((0, 0), (1, 1)), "are not one length"),
        (np.ones(2, np.float32), np.zeros((2, 2), np.float32), r"Expected integers \[2, n\]"),
        (np.ones(2, np.int32), places((0, 0), (1, 1)), "Expected integers"),
        (np.ones(2, np.uint8), places((0, 0), (1, 1)), "Expected integers"),
        (np.ones(2, bool), places((0, 0), (1, 1)), "Expected integers"),
        (np.ones(2, np.float32), np.zeros((3, 2), np.int32), "Expected integers"),
        (np.ones(2305, np.float32), np.zeros((2, 2305), np.int32), "2305 coefficients in a weight of 48×48"),
        (None, places((0, 0)), "has ssh_indices only"),
        (np.ones(1, np.float32), None, "has ssh_spectrum only"),
    ],
)
def test_forged_tensors(good, tmp_path, spectrum, indices, message):
    bad = forge(good, tmp_path / "bad", tensors={f"{NAME}.ssh_spectrum": spectrum, f"{NAME}.ssh_indices": indices})
    with pytest.raises(AdapterFileError, match=message):
        read_folder(bad)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"peft_type": "LOKR_NOT_THERE"}, RegistryError, r"No installed family reads PEFT type.*\n.*Installed: .*ssh"),
        ({"peft_type": None}, AdapterFileError, "names no peft_type"),
        ({"peft_type": 7}, AdapterFileError, "names no peft_type"),
        ({"transform": "wavelet"}, AdapterFileError, r"transform 'wavelet'.*\n.*hartley, hartley-joint"),
        ({"transform": "cosine"}, AdapterFileError, "transform 'cosine' in a SSH adapter"),
        ({"transform": ["hartley"]}, AdapterFileError, "transform"),
        ({"scaling": "1"}, AdapterFileError, "scaling is '1', not a finite number"),
        ({"scaling": None}, AdapterFileError, "not a finite number"),
        ({"scaling": 10**400}, AdapterFileError, "not a finite number"),
        ({"scaling": float("nan")}, AdapterFileError, "not a finite number"),
        ({"module_shapes": {SITE: [0, 48]}}, AdapterFileError, "not two sides"),
        ({"module_shapes": {SITE: "48x48"}}, AdapterFileError, "module_shapes"),
        ({"module_shapes": {SITE: 48}}, AdapterFileError, "module_shapes"),
        ({"module_shapes": [SITE]}, AdapterFileError, "module_shapes"),
        ({"module_shapes": None}, AdapterFileError, r"neither in .*module_shapes.* nor known.*\n.*--base"),
        ({"modules_to_save": None}, AdapterFileError, "belongs to no adapted module and to none of modules_to_save"),
        ({"modules_to_save": 3}, AdapterFileError, "modules_to_save"),
        ({"modules_to_save": [3]}, AdapterFileError, "modules_to_save"),
        ({"labels": 3}, AdapterFileError, "labels"),
        ({"labels": "abc"}, AdapterFileError, "labels"),
        ({"base_model_name_or_path": ["x"]}, AdapterFileError, "base_model_name_or_path"),
    ],
)
def test_forged_configs(good, tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        read_folder(forge(good, tmp_path / "bad", config=config))


FIELDS = "scaling transform module_shapes modules_to_save labels task_type base_model_name_or_path n_frequency seed"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([SITE, "a"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["peft_type", *FIELDS.split()]),
    value=JSON,
)
def test_any_value_in_any_field_is_read_or_refused_never_a_crash(good, tmp_path_factory, key, value):
    bad = forge(good, tmp_path_factory.mktemp("fuzz") / "bad", config={key: value})
    try:
        adapter = read_folder(bad)
    except DeployError as refusal:
        told = refusal
    else:
        assert adapter.deltas[SITE].shape == (48, 48)
        return
    assert told.hint


def test_a_stray_tensor(good, tmp_path):
    bad = forge(good, tmp_path / "bad", tensors={"base_model.model.lost.lora_A": np.ones(3, np.float32)})
    with pytest.raises(AdapterFileError, match=r"tensor 'lost\.lora_A' belongs to no adapted module"):
        read_folder(bad)


def test_config_and_weights_of_two_adapters(good, tmp_path):
    bad = write_peft_example(tmp_path / "bad", loaded(good)[0], {"base_model.model.x.lora_A": np.ones(3, np.float32)})
    with pytest.raises(AdapterFileError, match=r"no tensor of a SSH adapter in it; there is \['x\.lora_A'\]"):
        read_folder(bad)


def test_nan_in_the_head(good, tmp_path):
    bad = forge(
        good, tmp_path / "bad", tensors={"base_model.model.classifier.bias": np.array([0, np.nan, 0], np.float32)}
    )
    with pytest.raises(AdapterFileError, match=r"classifier\.bias: 1 of 3 values are NaN"):
        read_folder(bad)


def test_a_pickled_adapter(good):
    (good / WEIGHTS).rename(good / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"adapter_model\.bin, which is a pickle.*\n.*safe_serialization"):
        read_adapter(good)


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"{", "not JSON"), (b"[]", "names no peft_type"), (b"\xff\xfe\xfd", "not JSON"), (b"[" * 100_000, "not JSON")],
)
def test_a_damaged_config(good, raw, message):
    (good / CONFIG).write_bytes(raw)
    with pytest.raises(AdapterFileError, match=message):
        read_adapter(good)


def test_a_missing_config(good):
    (good / CONFIG).unlink()
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: cannot be read"):
        read_adapter(good)


def test_truncated_weights(good):
    raw = (good / WEIGHTS).read_bytes()
    for length in range(0, len(raw), 29):
        (good / WEIGHTS).write_bytes(raw[:length])
        with pytest.raises(AdapterFileError, match=r"truncated|no safetensors file|not JSON"):
            read_adapter(good)


def test_declared_shape_against_the_base(pico, good, tmp_path):
    bad = forge(good, tmp_path / "bad", config={"module_shapes": {SITE: [48, 80]}})
    with pytest.raises(AdapterMismatchError, match=r"trained on a weight of \[48, 80\], the base has \[48, 48\]"):
        fit(bad, open_checkpoint(pico("bert")))

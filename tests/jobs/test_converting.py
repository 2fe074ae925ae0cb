"""Converting between PEFT folders and compact files: nothing lost but rounding, fingerprints stored."""

import numpy as np
import pytest

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterFileError, FingerprintError, OutputError
from ssh_deploy.jobs.converting import convert_adapter
from ssh_deploy.testing import random_adapter

MODULES = {"bert.encoder.layer.0.output.dense": (48, 80), "bert.encoder.layer.1.attention.self.key": (48, 48)}
HEAD = {"classifier": {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}}


@pytest.fixture
def folder(tmp_path):
    write_folder(random_adapter(MODULES, n=20, heads=HEAD, task="text-classification"), tmp_path / "peft")
    return tmp_path / "peft"


def same(a, b, exact=True):
    assert set(a.deltas) == set(b.deltas)
    for module, delta in a.deltas.items():
        other = b.deltas[module]
        assert (delta.shape, delta.transform, delta.alpha, delta.norm) == (
            other.shape,
            other.transform,
            other.alpha,
            other.norm,
        )
        np.testing.assert_array_equal(delta.rows, other.rows)
        np.testing.assert_array_equal(delta.cols, other.cols)
        if exact:
            np.testing.assert_array_equal(delta.values.astype(np.float32), other.values.astype(np.float32))
        else:
            np.testing.assert_array_equal(delta.values.astype(np.float16), other.values)
    for module, head in a.replaced.items():
        for name, tensor in head.tensors.items():
            np.testing.assert_array_equal(tensor, b.replaced[module].tensors[name])
    assert (a.task, a.labels, a.base, a.family) == (b.task, b.labels, b.base, b.family)
    assert dict(a.settings) == dict(b.settings)


@pytest.mark.parametrize("transform", ["hartley", "hartley-joint", "cosine"])
def test_there_and_back_in_float32_is_the_same_adapter(tmp_path, transform):
    write_folder(random_adapter(MODULES, n=20, heads=HEAD, transform=transform), tmp_path / "peft")
    one = convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors", values="float32")
    two = convert_adapter(tmp_path / "a.safetensors", tmp_path / "back")
    assert (one.form, two.form) == ("compact file", "PEFT folder")
    assert one.rounding == two.rounding == 0.0
    same(read_adapter(tmp_path / "peft"), read_adapter(tmp_path / "a.safetensors"))
    same(read_adapter(tmp_path / "peft"), read_adapter(tmp_path / "back"))


def test_float16_is_smaller_and_says_what_it_rounded(folder, tmp_path):
    done = convert_adapter(folder, tmp_path / "a.safetensors")
    same(read_adapter(folder), read_adapter(tmp_path / "a.safetensors"), exact=False)
    assert 0 < done.rounding < 2**-11
    assert done.bytes_after == (tmp_path / "a.safetensors").stat().st_size < done.bytes_before
    assert done.digest == read_adapter(tmp_path / "a.safetensors").digest
    assert any("no fingerprint" in note for note in done.notes)
    assert done.digest in "\n".join(done.lines())


def test_base_gives_shapes_and_fingerprint(pico, tmp_path):
    import json

    write_folder(random_adapter(MODULES, n=20), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    del config["module_shapes"]
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match=r"neither in .* nor known from a base.*\n.*--base"):
        convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors")
    done = convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors", base=pico("bert"), base_name="org/pico")
    written = read_adapter(tmp_path / "a.safetensors")
    assert written.base == "org/pico"
    assert done.fingerprint == written.fingerprint.sha256
    assert written.fingerprint.differences(fingerprint_of(open_checkpoint(pico("bert")), MODULES)) == []
    again = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", base=pico("bert"))
    assert again.fingerprint == done.fingerprint
    with pytest.raises(FingerprintError, match="another base"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "c.safetensors", base=pico("bert", seed=1))
    back = convert_adapter(tmp_path / "a.safetensors", tmp_path / "back")
    assert any("no place for the fingerprint" in note for note in back.notes)


def test_the_base_is_named_without_its_path(pico, folder, tmp_path):
    convert_adapter(folder, tmp_path / "a.safetensors", base=pico("bert"))
    assert read_adapter(tmp_path / "a.safetensors").base == pico("bert").name


def test_task_and_labels_are_stored(folder, tmp_path):
    convert_adapter(folder, tmp_path / "a.safetensors", task="text-classification", labels=["x", "y", "z"])
    assert read_adapter(tmp_path / "a.safetensors").labels == ("x", "y", "z")
    assert read_adapter(tmp_path / "a.safetensors").task == "text-classification"
    with pytest.raises(AdapterFileError, match="2 labels for a head of 3 rows"):
        convert_adapter(folder, tmp_path / "b.safetensors", labels=["x", "y"])
    with pytest.raises(AdapterFileError, match=r"No task is called 'chess'.*\n.*text-classification"):
        convert_adapter(folder, tmp_path / "b.safetensors", task="chess")
    assert not (tmp_path / "b.safetensors").exists()


def test_form_can_be_forced(tmp_path):
    write_file(random_adapter(MODULES), tmp_path / "a.safetensors")
    assert convert_adapter(tmp_path / "a.safetensors", tmp_path / "copy", form="file").form == "compact file"
    assert (tmp_path / "copy").is_file()


@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_output_exists(folder, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        convert_adapter(folder, tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"


def test_values_beyond_float16_need_float32(tmp_path):
    adapter = random_adapter(MODULES, n=4)
    next(iter(adapter.deltas.values())).values[0] = 1e6
    write_folder(adapter, tmp_path / "peft")
    with pytest.raises(AdapterFileError, match=r"overflow float16.*\n.*float32"):
        convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    assert convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors", values="float32").rounding == 0.0

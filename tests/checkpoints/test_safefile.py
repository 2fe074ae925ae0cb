"""Opening safetensors files: read or mapped, the same tensors; what was read does not change."""

import mmap

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from ssh_deploy.adapters.file import read_file, write_file
from ssh_deploy.checkpoints import safefile
from ssh_deploy.checkpoints.safefile import open_safefile
from ssh_deploy.errors import AdapterFileError
from ssh_deploy.testing import random_adapter

TENSORS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "empty": np.zeros((0, 4), np.float32),
    "number": np.array(7, np.int64),
    "places": np.arange(5, dtype=np.uint16),
}


@pytest.mark.parametrize("mapped", [True, False])
def test_read_or_mapped_the_tensors_are_the_same_views(tmp_path, mapped):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"x": "y"})
    file = open_safefile(tmp_path / "a.safetensors", error=AdapterFileError, mapped=mapped)
    assert isinstance(file.payload.obj, mmap.mmap) is mapped
    assert bytes(file.content) == (tmp_path / "a.safetensors").read_bytes()
    assert file.metadata == {"x": "y"}
    assert file.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        got = file.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(got, tensor)
        assert not got.flags.owndata
        assert not got.flags.writeable
    file.forget()
    np.testing.assert_array_equal(file.tensors["places"], TENSORS["places"])


def test_a_file_without_tensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(save({}))
    for mapped in (True, False):
        assert not open_safefile(tmp_path / "a.safetensors", error=AdapterFileError, mapped=mapped).tensors


def test_huge_files_are_mapped_even_where_they_could_be_read(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "a.safetensors")
    monkeypatch.setattr(safefile, "MAX_READ", 64)
    file = open_safefile(tmp_path / "a.safetensors", error=AdapterFileError, mapped=False)
    assert isinstance(file.payload.obj, mmap.mmap)


def test_an_adapter_that_is_overwritten_in_place_stays_what_was_read(tmp_path):
    """Truncating a mapped file kills whoever touches it next; an adapter's file is read."""
    path = tmp_path / "a.safetensors"
    write_file(random_adapter({"m": (64, 64)}, n=3000), path)
    adapter = read_file(path)
    before = adapter.deltas["m"].values.copy()
    path.write_bytes(b"")
    np.testing.assert_array_equal(adapter.deltas["m"].values, before)

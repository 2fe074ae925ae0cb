"""Opening safetensors files: read or mapped, the same tensors; what was read does not change."""

import json
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save, save_file

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


ENTRY = '"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}'


def raw_file(path, header, payload=b"\0\0\0\0"):
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return path


def opened(path):
    return open_safefile(path, error=AdapterFileError)


@pytest.mark.parametrize(
    "header",
    [
        f'{{"__metadata__":{{"x":"y"}},{ENTRY}}}',
        f'{{{ENTRY},"__metadata__":{{"x":"y"}}}}',
        f'{{"__metadata__": {{"x":"y"}}, {ENTRY}}}  ',
        f' {{"__metadata__":{{"x":"y"}},{ENTRY}}}',
        f'{{"__metadata__":{{"x":"y"}} ,{ENTRY}}}',
    ],
)
def test_metadata_may_stand_anywhere_in_a_header(tmp_path, header):
    file = opened(raw_file(tmp_path / "a", header))
    assert file.metadata == {"x": "y"}
    assert file.table == {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
    assert file.header.canonical == '{"a":{"data_offsets":[0,4],"dtype":"F16","shape":[2]}}'
    assert file.tensors["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"__metadata__":{{}},{ENTRY},"__metadata__":{{}}}}', "header names '__metadata__' twice"),
        (f'{{"__metadata__":{{"x":"y"}},{ENTRY},{ENTRY}}}', "header names 'a' twice"),
        (f'{{"__metadata__":{{"x":"y","x":"z"}},{ENTRY}}}', "header names 'x' twice"),
        (f'{{"__metadata__":{{"x":1}},{ENTRY}}}', "metadata is not text"),
        (f'{{{ENTRY},"__metadata__":{{"x":1}}}}', "metadata is not text"),
        (f'{{"__metadata__":{{"x":"y"}},{ENTRY},}}', "not JSON"),
        ('{"__metadata__":{"x":"y"},}', "not JSON"),
        (f'{{"__metadata__":{{"x":"y"}}{ENTRY}}}', "not JSON"),
        (f'{{"__metadata__":{{"x":"y"}},{ENTRY}}} {{}}', "not JSON"),
        (f'{{"__metadata__":{{"x":"y",{ENTRY}}}', "not JSON"),
        ('{"__metadata__":' + '{"x":' * 100_000, "not JSON"),
    ],
)
def test_headers_that_are_no_one_object(tmp_path, header, message):
    with pytest.raises(AdapterFileError, match=message):
        opened(raw_file(tmp_path / "a", header))


def test_one_table_is_worked_out_once_whatever_the_metadata(tmp_path):
    for i in (0, 1):
        write_file(random_adapter({"m": (64, 64)}, n=30, seed=i), tmp_path / f"{i}.safetensors")
    one, other = (opened(tmp_path / f"{i}.safetensors") for i in (0, 1))
    assert one.header is other.header
    assert one.metadata["sha256"] != other.metadata["sha256"]
    assert not np.array_equal(one.tensors["spectral.m.values"], other.tensors["spectral.m.values"])
    write_file(random_adapter({"m": (64, 64)}, n=31), tmp_path / "2.safetensors")
    assert opened(tmp_path / "2.safetensors").header is not one.header


def test_a_table_that_was_good_is_refused_before_another_payload(tmp_path):
    """Truncated and lengthened files whose text of tensors is known."""
    opened(raw_file(tmp_path / "a", f"{{{ENTRY}}}"))
    for payload in (b"", b"\0\0", b"\0" * 6):
        with pytest.raises(AdapterFileError, match=r"truncated"):
            opened(raw_file(tmp_path / "a", f"{{{ENTRY}}}", payload))
    opened(raw_file(tmp_path / "a", f"{{{ENTRY}}}"))


def test_long_tables_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(safefile, "_KEPT", 10)
    path = raw_file(tmp_path / "a", json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}))
    assert opened(path).header is not opened(path).header


SHAPES = st.sampled_from([(), (0,), (3,), (3,), (2, 3), (0, 4), (1,)])
ARRAYS = st.lists(st.tuples(SHAPES, st.sampled_from([np.float16, np.uint16, np.int64])), max_size=8)


@settings(max_examples=100, deadline=None)
@given(kinds=ARRAYS, turned=st.booleans())
def test_tensors_are_what_safetensors_reads(tmp_path_factory, kinds, turned):
    """Also tensors alike and side by side, without numbers, without sides, and listed against their order."""
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": np.array(rng.integers(0, 99, shape)).astype(dtype) for i, (shape, dtype) in enumerate(kinds)}
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    listed = dict(reversed(header.items())) if turned else header
    file = opened(raw_file(tmp_path_factory.mktemp("file") / "a", json.dumps(listed), data[8 + length :]))
    assert list(file.tensors) == list(listed)
    for name, want in load(data).items():
        got = file.tensors[name]
        assert (got.shape, got.dtype, got.flags.writeable) == (want.shape, want.dtype, False)
        np.testing.assert_array_equal(got, want)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from([(), (0,), (5,), (2, 3)]),
    gaps=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    turned=st.sampled_from(["as they lie", "backwards", "anyhow"]),
)
def test_tensors_of_one_form_come_together(tmp_path_factory, shape, gaps, order, turned):
    """Side by side, in equal steps, backwards, and with unlike distances between them."""
    rng, tensors = np.random.default_rng(0), {}
    for i, gap in enumerate(gaps):
        tensors[f"{i}a"] = np.array(rng.integers(0, 99, shape), np.int16)
        tensors[f"{i}b"] = np.zeros(gap, np.int16)
    path = tmp_path_factory.mktemp("file") / "a"
    path.write_bytes(save(tensors))
    names = [name for name in tensors if name.endswith("a")]
    names = names[::-1] if turned == "backwards" else names
    if turned == "anyhow":
        order.shuffle(names)
    file = opened(path)
    got = file.header.alike(names).of(file.payload)
    assert (got.dtype, got.flags.writeable) == (np.int16, False)
    np.testing.assert_array_equal(got, np.array([tensors[name] for name in names]))


def test_tensors_in_equal_steps_are_not_copied(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(save({name: np.arange(4, dtype=np.int16) for name in "abcdef"}))
    file = opened(path)
    address = np.frombuffer(file.payload, np.uint8).__array_interface__["data"][0]
    for names, first, step in (("ace", 0, 16), ("fdb", 40, -16), ("d", 24, 0)):
        got = file.header.alike(names).of(file.payload)
        assert got.__array_interface__["data"][0] - address == first
        assert got.strides == (step, 2)
    assert file.header.alike("abd").of(file.payload).flags.owndata


@pytest.mark.parametrize("shape", [[0, 1 << 47, 1 << 47], [1 << 40, 0], [2, 0, 1 << 39]])
def test_long_sides_beside_a_side_of_none(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]}})
    with pytest.raises(AdapterFileError, match="'a' declares F16"):
        opened(raw_file(tmp_path / "a", header, b""))

"""Writing shards: layout, runs of unchanged bytes, and what the kernel does."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssh_deploy.checkpoints import copying
from ssh_deploy.checkpoints.safefile import open_safefile
from ssh_deploy.checkpoints.writer import Made, Stored, entry_bytes, write_shard
from ssh_deploy.errors import CheckpointError


@pytest.fixture
def source(tmp_path):
    tensors = {"a": np.arange(5, dtype=np.float32), "b": np.ones((3, 7), ml_dtypes.bfloat16), "c": np.arange(3)}
    save_file(tensors, tmp_path / "source.safetensors", metadata={"format": "pt"})
    return open_safefile(tmp_path / "source.safetensors", error=CheckpointError)


def write(path, source, entries):
    written = []
    write_shard(path, source, entries, advance=written.append)
    return open_safefile(path, error=CheckpointError), sum(written)


def test_an_unchanged_shard_is_the_same_file(source, tmp_path):
    entries = {name: Stored(source, name) for name in source.table}
    _, written = write(tmp_path / "x", source, entries)
    assert (tmp_path / "x").read_bytes() == source.path.read_bytes()
    assert written == source.path.stat().st_size - source.start


def test_a_changed_tensor_is_written_over_the_copy(source, tmp_path):
    new = np.full((3, 7), 2.5, ml_dtypes.bfloat16)
    entries = {name: Stored(source, name) for name in source.table}
    file, _ = write(tmp_path / "x", source, {**entries, "b": Made("BF16", (3, 7), lambda: [new[:1], new[1:]])})
    before, after = source.path.read_bytes(), (tmp_path / "x").read_bytes()
    assert before[: source.start] == after[: file.start]
    np.testing.assert_array_equal(file.tensors["b"], new)
    for name in ("a", "c"):
        np.testing.assert_array_equal(file.tensors[name], source.tensors[name])


def test_changed_tensors_between_runs_that_go_around_the_page_cache(tmp_path, monkeypatch):
    """Pages that a run shares with its neighbours are written the same way as those."""
    monkeypatch.setattr(copying, "_LONG", 3 * copying._BLOCK)
    rng = np.random.default_rng(0)
    sizes = (40_001, 3, 50_000, 9, 12_345, 60_007)
    before = {f"t{i}": rng.normal(size=size).astype(np.float16) for i, size in enumerate(sizes)}
    save_file(before, tmp_path / "source.safetensors")
    source = open_safefile(tmp_path / "source.safetensors", error=CheckpointError)
    after = before | {name: rng.normal(size=before[name].size).astype(np.float16) for name in ("t1", "t3", "t4")}
    entries = {name: Stored(source, name) for name in before}
    for name in ("t1", "t3", "t4"):
        entries[name] = Made("F16", after[name].shape, lambda name=name: [after[name][:2], after[name][2:]])
    file, written = write(tmp_path / "x", source, entries)
    assert written == sum(2 * size for size in sizes)
    for name, tensor in after.items():
        np.testing.assert_array_equal(file.tensors[name], tensor)


def test_added_dropped_renamed_and_retyped(source, tmp_path):
    """Wide types first: the float32 behind an odd bf16 tensor would be off its alignment otherwise."""
    entries = {
        "odd": Made("BF16", (3,), lambda: [np.ones(3, ml_dtypes.bfloat16)]),
        "renamed": Stored(source, "b"),
        "a": Made("F16", (5,), lambda: [source.tensors["a"].astype(np.float16)]),
        "wide": Made("F32", (2, 1), lambda: [np.array([[1.0], [2.0]], np.float32)]),
        "empty": Made("F32", (0,), list),
        "scalar": Made("F64", (), lambda: [np.float64(3.5)]),
    }
    file, written = write(tmp_path / "x", source, entries)
    assert written == sum(entry_bytes(entry) for entry in entries.values())
    assert file.metadata == {"format": "pt"}
    assert file.start % 8 == 0
    for entry in file.table.values():
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
        assert entry["data_offsets"][0] % size == 0
    got = load_file(tmp_path / "x")  # the library reads it too
    assert set(got) == set(entries)
    np.testing.assert_array_equal(got["renamed"], source.tensors["b"])
    np.testing.assert_array_equal(got["a"], np.arange(5, dtype=np.float16))
    np.testing.assert_array_equal(got["wide"], [[1], [2]])
    assert got["scalar"] == 3.5


def test_an_existing_file_is_not_written(source, tmp_path):
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", source, {"a": Stored(source, "a")})
    assert (tmp_path / "x").read_text() == "precious"

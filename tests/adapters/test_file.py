"""The compact file: round trips, size, digest, orientation, and the frozen goldens."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ssh_deploy.adapters.file import content_digest, read_file, write_file
from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.fingerprint import Fingerprint, sample
from ssh_deploy.errors import AdapterFileError, OutputError
from ssh_deploy.testing import random_adapter
from ssh_deploy.transforms import reference

MODULES = {"bert.encoder.layer.0.attention.self.query": (48, 48), "bert.encoder.layer.0.output.dense": (48, 80)}


def rewritten(path, edit):
    """Edit metadata fields and tensors of a compact file and seal it with a right digest: forged, not damaged."""
    with safetensors.safe_open(path, "numpy") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    fields = json.loads(metadata["adapter"])
    edit(fields, tensors)
    metadata["adapter"] = json.dumps(fields)
    metadata.pop("sha256")
    save_file(tensors, path, metadata=metadata)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__")
    metadata["sha256"] = content_digest(metadata, table, memoryview(raw)[8 + length :])
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture
def adapter():
    head = {"classifier": {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}}
    made = random_adapter(MODULES, heads=head, base="pico", seed=3)
    sites = {"encoder.layer.0.attention.self.query": sample(np.random.default_rng(0).normal(size=(48, 48)))}
    return replace(made, task="text-classification", labels=("x", "y", "z"), fingerprint=Fingerprint("bert", sites))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_round_trip(tmp_path, adapter, dtype):
    path = tmp_path / "a.safetensors"
    digest = write_file(adapter, path, values_dtype=dtype)
    back = read_adapter(path)
    assert back.digest == digest
    assert (back.family, back.base, back.task, back.labels) == ("ssh", "pico", "text-classification", ("x", "y", "z"))
    assert back.settings == {"n": 40, "delta_ratio": 0.7, "seed": 3}
    assert back.fingerprint.sha256 == adapter.fingerprint.sha256
    for module, delta in adapter.deltas.items():
        got = back.deltas[module]
        np.testing.assert_array_equal(got.values, delta.values.astype(dtype))
        np.testing.assert_array_equal(got.rows, delta.rows)
        np.testing.assert_array_equal(got.cols, delta.cols)
        assert (got.shape, got.alpha, got.norm, got.transform) == (delta.shape, 30.0, "backward", "hartley")
    np.testing.assert_array_equal(back.replaced["classifier"].tensors["weight"], np.ones((3, 48)))


def test_six_bytes_per_coefficient(tmp_path):
    sizes = []
    for n in (100, 1100):
        path = tmp_path / f"{n}.safetensors"
        write_file(random_adapter({"m": (64, 64)}, n=n), path)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx(6 * 1000, abs=16)


def test_spectra_are_views_of_the_mapped_file(tmp_path, adapter):
    path = tmp_path / "a.safetensors"
    write_file(adapter, path)
    delta = read_file(path).deltas["bert.encoder.layer.0.output.dense"]
    assert not delta.values.flags.owndata
    assert not delta.values.flags.writeable


def test_modules_of_one_form_are_read_as_one(tmp_path):
    blocks = {f"h.{i}.{part}": (24, 36) for i in range(3) for part in ("q", "v")}
    write_file(random_adapter({**blocks, "x": (36, 24)}, n=9), tmp_path / "a.safetensors")
    deltas = read_file(tmp_path / "a.safetensors").deltas
    assert [stack.keys for stack in deltas.stacks] == [tuple(blocks), ("x",)]
    assert not any(stack.rows.flags.owndata for stack in deltas.stacks)


def test_what_is_known_of_a_table_is_not_said_of_other_modules(tmp_path):
    """Three files with one table, byte for byte, whose metadata declares other shapes, or others as shapes."""
    for name in "abcd":
        write_file(random_adapter({"m": (48, 1)}, n=1), tmp_path / name)
    rewritten(tmp_path / "b", lambda fields, _: fields["modules"].update(m=[99, 1]))
    rewritten(tmp_path / "c", lambda fields, _: fields["modules"].update(m=[48, True]))
    rewritten(tmp_path / "d", lambda fields, _: fields.update(orientation="in,out", modules={"m": [48, 1]}))
    assert [read_file(tmp_path / name).deltas["m"].shape for name in "aba"] == [(48, 1), (99, 1), (48, 1)]
    with pytest.raises(AdapterFileError, match=r"m: shape \[48, True\] is not two sides"):
        read_file(tmp_path / "c")
    assert read_file(tmp_path / "d").deltas["m"].shape == (1, 48)


def test_writing_twice_gives_the_same_content(tmp_path, adapter):
    digests = {write_file(adapter, tmp_path / f"{i}.safetensors") for i in range(3)}
    assert len(digests) == 1


def test_digest_covers_alpha_and_labels(tmp_path, adapter):
    one = write_file(adapter, tmp_path / "1.safetensors")
    other = write_file(replace(adapter, labels=("x", "y", "w")), tmp_path / "2.safetensors")
    assert one != other


def test_existing_output_is_kept(tmp_path, adapter):
    path = tmp_path / "a.safetensors"
    write_file(adapter, path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_file(replace(adapter, labels=()), path)
    assert path.read_bytes() == before
    write_file(replace(adapter, labels=()), path, overwrite=True)
    assert read_file(path).labels == ()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_overflow_of_float16_is_refused_with_the_remedy(tmp_path):
    big = random_adapter({"m": (8, 8)}, n=4)
    big.deltas["m"].values[0] = 1e6
    with pytest.raises(AdapterFileError, match=r"(?s)1e\+06 overflow float16.*float32"):
        write_file(big, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    write_file(big, tmp_path / "a.safetensors", values_dtype=np.float32)


def test_wide_weights_take_uint32_places(tmp_path):
    wide = random_adapter({"m": (3, 70_000)}, n=4)
    wide.deltas["m"].cols  # noqa: B018 - sparse_spectrum gives uint16; widen by hand
    delta = replace(wide.deltas["m"], cols=np.array([69_999, 1, 2, 3]), rows=np.zeros(4, np.int64))
    path = tmp_path / "a.safetensors"
    write_file(replace(wide, deltas={"m": delta}), path)
    back = read_file(path).deltas["m"]
    assert back.cols.dtype == np.uint32
    assert back.cols[0] == 69_999


def test_transposed_orientation_reads_as_the_transpose(tmp_path):
    original = random_adapter({"m": (6, 10)}, n=9)
    path = tmp_path / "a.safetensors"
    write_file(original, path, values_dtype=np.float32)

    def transpose(fields, tensors):
        fields["orientation"] = "in,out"
        fields["modules"]["m"] = [10, 6]
        tensors["spectral.m.rows"], tensors["spectral.m.cols"] = tensors["spectral.m.cols"], tensors["spectral.m.rows"]

    back = read_file(rewritten(path, transpose)).deltas["m"]
    assert back.shape == (6, 10)
    np.testing.assert_allclose(back.dense().numpy(), original.deltas["m"].dense().numpy(), atol=1e-7)


@pytest.mark.parametrize("transform", ["hartley", "hartley-joint", "cosine"])
def test_peft_folder_and_compact_file_hold_the_same(tmp_path, transform):
    made = replace(random_adapter(MODULES, transform=transform, base="pico"), labels=("p", "q"))
    write_folder(made, tmp_path / "peft")
    folder = read_adapter(tmp_path / "peft")
    write_file(folder, tmp_path / "a.safetensors", values_dtype=np.float32)
    file = read_adapter(tmp_path / "a.safetensors")
    for back in (folder, file):
        assert (back.family, back.base, back.labels) == (made.family, "pico", ("p", "q"))
        for module, delta in made.deltas.items():
            got, ascending = back.deltas[module], np.argsort(delta.rows * delta.shape[1] + delta.cols)
            assert (got.transform, got.alpha, got.norm) == (transform, delta.alpha, delta.norm)
            for part in ("values", "rows", "cols"):
                np.testing.assert_array_equal(getattr(got, part), getattr(delta, part)[ascending])


def test_peft_folder_without_shapes_needs_a_base(tmp_path):
    write_folder(random_adapter(MODULES), tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    fields = json.loads(config.read_text())
    del fields["module_shapes"]
    config.write_text(json.dumps(fields))
    with pytest.raises(AdapterFileError, match=r"(?s)shape of bert.*--base"):
        read_folder(tmp_path / "peft")
    assert read_folder(tmp_path / "peft", shapes=MODULES).deltas.keys() == MODULES.keys()


@pytest.mark.parametrize("transform", ["hartley", "hartley-joint", "cosine"])
@pytest.mark.parametrize("kind", ["float16", "float32", "peft"])
def test_goldens_of_version_1_read_as_they_always_did(root, transform, kind):
    goldens = root / "tests" / "goldens"
    name = f"v1-{transform}-{kind}"
    adapter = read_adapter(goldens / (name if kind == "peft" else f"{name}.safetensors"))
    expected = np.load(goldens / "v1-expected.npz", allow_pickle=False)
    assert adapter.labels == ("a", "b", "ü")
    assert adapter.task == "text-classification"
    assert adapter.replaced["classifier"].tensors["weight"].shape == (3, 10)
    for module, delta in adapter.deltas.items():
        want = expected[f"{transform}/{'float32' if kind == 'peft' else kind}/{module}"]
        np.testing.assert_allclose(delta.dense().numpy(), want, atol=1e-6 * np.abs(want).max())


def test_golden_delta_is_the_definition(root):
    """The frozen expectation itself, recomputed from the formula, not from the reader."""
    expected = np.load(root / "tests" / "goldens" / "v1-expected.npz", allow_pickle=False)
    made = random_adapter({"m": (6, 10)}, n=8, alpha=24.0).deltas["m"]
    want = reference.delta("hartley", made.rows, made.cols, made.values, (6, 10), alpha=24.0, norm="backward")
    np.testing.assert_allclose(expected["hartley/float32/bert.encoder.layer.0.attention.self.query"], want, atol=1e-12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    out=st.integers(1, 30),
    inn=st.integers(1, 30),
    n=st.integers(1, 50),
    name=st.text("abcdefgh.0123456789_", min_size=1, max_size=30),
    labels=st.lists(st.text(max_size=8), max_size=4),
    alpha=st.floats(-1e6, 1e6),
)
def test_any_adapter_round_trips(tmp_path_factory, out, inn, n, name, labels, alpha):
    made = replace(random_adapter({name: (out, inn)}, n=n, alpha=alpha), labels=tuple(labels))
    path = tmp_path_factory.mktemp("p") / "a.safetensors"
    write_file(made, path, values_dtype=np.float32)
    back = read_file(path)
    assert back.labels == tuple(labels)
    assert back.deltas[name].alpha == alpha
    np.testing.assert_array_equal(back.deltas[name].values, made.deltas[name].values)

"""LoCA against its float64 definition through the contract suite, in a merge and in cosine slots; what it refuses."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.cli.main import main
from ssh_deploy.errors import AdapterFileError
from ssh_deploy.testing import FamilyContract, write_peft_example

SHAPES = {"encoder.0.q": (6, 10), "encoder.1.v": (7, 9)}
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LOCA", "scaling": 3.0}


def definition(values, places, shape):
    """``Σ s · cos·cos``, every coefficient by itself; float64."""
    total = np.zeros(shape)
    for s, u, v in zip(values.astype(float), *places.astype(int).tolist(), strict=True):
        sides = []
        for k, size in ((u, shape[0]), (v, shape[1])):
            side = np.cos(np.pi * (2 * np.arange(size) + 1) * k / (2 * size)) * np.sqrt((1 if k == 0 else 2) / size)
            sides.append(side)
        total += s * np.outer(*sides)
    return total


def trained(rng, shape, n):
    """Values and whole places, some of them twice."""
    places = np.stack([rng.integers(0, side, n) for side in shape])
    places[:, 1], places[:, 2] = places[:, 0], 0
    return rng.normal(size=n).astype(np.float32), places


class TestLoCA(FamilyContract):
    family = "loca"

    def example(self, rng):
        tensors, want = {}, {}
        for module, shape in SHAPES.items():
            values, places = trained(rng, shape, 15)
            moved = (places + rng.uniform(-0.45, 0.45, places.shape)).astype(np.float32)
            tensors |= {f"{PREFIX}{module}.loca_spectrum": values, f"{PREFIX}{module}.loca_locations": moved}
            want[module] = 3.0 * definition(values, places, shape)
        return CONFIG, tensors, SHAPES, want


def read(tmp_path, values=None, places=None, **config):
    values = np.ones(3, np.float32) if values is None else values
    places = np.zeros((2, 3), np.int64) if places is None else places
    tensors = {f"{PREFIX}q.loca_spectrum": values, f"{PREFIX}q.loca_locations": places}
    fields = {key: value for key, value in {**CONFIG, **config}.items() if value != "left out"}
    return read_folder(write_peft_example(tmp_path / "a", fields, tensors), shapes={"q": (6, 10)})


def test_places_that_meet_add_and_halves_go_to_even(tmp_path):
    places = np.array([[2.5, 2.0, 5.4], [8.5, 7.6, 0.0]], np.float32)
    delta = read(tmp_path, np.array([1.0, 2.0, 4.0], np.float32), places).deltas["q"]
    found = dict(zip(zip(delta.rows.tolist(), delta.cols.tolist(), strict=True), delta.values.tolist(), strict=True))
    assert found == {(2, 8): 3.0, (5, 0): 4.0}


def test_written_and_read_again_it_is_the_same(tmp_path):
    adapter = read(tmp_path, places=np.array([[0, 0, 3], [9, 9, 1]]))
    write_folder(adapter, tmp_path / "again")
    again = read_folder(tmp_path / "again")
    assert torch.equal(adapter.deltas["q"].dense(dtype=torch.float64), again.deltas["q"].dense(dtype=torch.float64))


CASES = [
    ({"values": np.ones(4, np.float32)}, r"loca_spectrum is float32 \[4\], loca_locations int64 \[2, 3\]"),
    ({"values": np.ones(3, np.int32)}, r"loca_spectrum is int32 \[3\]"),
    ({"values": np.array([1, np.nan, 1], np.float32)}, "1 of 3 values are NaN"),
    ({"values": np.full(3, 3e38, np.float32)}, "places that meet added: 1 of 1 values are NaN or infinite"),
    ({"places": np.full((2, 3), np.nan, np.float32)}, "loca_locations: 6 of 6 values are NaN"),
    ({"places": np.array([[0, 0, -1], [0, 0, 0]])}, "coefficient 2 has row -1, outside 0…5"),
    ({"places": np.array([[0, 0, 0], [0, 9.6, 0]])}, "coefficient 1 has column 10, outside 0…9"),
    ({"scaling": "left out"}, "scaling is None"),
    ({"bias": "all"}, "changes biases"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("change", "message"), CASES)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, **change)


@pytest.mark.hostile
def test_values_without_places_are_refused(tmp_path):
    folder = write_peft_example(tmp_path / "a", CONFIG, {f"{PREFIX}q.loca_spectrum": np.ones(3, np.float32)})
    with pytest.raises(AdapterFileError, match="has loca_spectrum only"):
        read_folder(folder, shapes={"q": (6, 10)})


def run(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_merged_and_in_a_slot(bases, tmp_path):
    base, rng, module = bases("bert"), np.random.default_rng(3), "encoder.layer.0.attention.self.query"
    values, places = trained(rng, (48, 48), 40)
    tensors = {f"{PREFIX}{module}.loca_spectrum": values, f"{PREFIX}{module}.loca_locations": places}
    folder = write_peft_example(tmp_path / "a", CONFIG, tensors)
    run("merge", base, folder, "-o", tmp_path / "out")
    before, after = (load_file(at / "model.safetensors") for at in (base, tmp_path / "out"))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == [f"{module}.weight"]
    want = before[changed[0]] + 3.0 * definition(values, places, (48, 48))
    assert np.abs(after[changed[0]] - want).max() <= 1e-6 * np.abs(want).max()
    report = json.loads(run("export", "--onnx", base, folder, "-o", tmp_path / "onnx", "--json"))
    assert report["kinds"] == ["cosine"]
    run("verify", base, folder, tmp_path / "onnx")

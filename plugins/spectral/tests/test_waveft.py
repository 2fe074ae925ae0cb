"""WaveFT against PEFT's own layer in float64, its definition for Haar, and what it refuses."""

import builtins

import numpy as np
import peft
import pytest
import torch
from peft.tuners.waveft.layer import WaveFTLinear
from ssh_deploy_spectral import patches
from ssh_deploy_spectral.patches import PatchDelta

from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError, DependencyError
from ssh_deploy.graph.bank_file import slot_kind
from ssh_deploy.testing import DeltaContract, FamilyContract, write_peft_example

SHAPES = {"encoder.0.q": (6, 10), "encoder.1.v": (7, 9)}
PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "WAVEFT",
    "n_frequency": 14,
    "scaling": 9.0,
    "random_loc_seed": 778,
    "wavelet_family": "db1",
    "use_idwt": True,
}


def layer(shape, **config):
    """PEFT's layer in float64 with n trained values, and its ΔW."""
    known = peft.WaveFTConfig(init_weights=False, **config)
    built = WaveFTLinear(torch.nn.Linear(shape[1], shape[0]), "default", config=known, n_frequency=known.n_frequency)
    values = torch.randn(known.n_frequency, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    built.waveft_spectrum["default"] = torch.nn.Parameter(values.double(), requires_grad=False)
    return values.numpy(), built.get_delta_weight("default").numpy()


class TestWaveFT(FamilyContract):
    family, config = "waveft", CONFIG

    def example(self, rng):
        tensors, want = {}, {}
        fields = {key: value for key, value in self.config.items() if key != "peft_type"}
        for module, shape in SHAPES.items():
            tensors[f"{PREFIX}{module}.waveft_spectrum"], want[module] = layer(shape, **fields)
        return self.config, tensors, SHAPES, want


class TestSparse(TestWaveFT):
    config = CONFIG | {"use_idwt": False}


class TestLongFilters(TestWaveFT):
    config = CONFIG | {"wavelet_family": "sym4"}


class TestPatches(DeltaContract):
    def make(self, rng, shape):
        starts = tuple(rng.integers(-3, side + 1, 17) for side in shape)
        sides = tuple(rng.normal(size=(17, 4)) for _ in shape)
        return PatchDelta(shape, rng.normal(size=17).astype(np.float32), 1.5, starts, sides)

    def definition(self, delta):
        wide = np.zeros([side + 20 for side in delta.shape])
        for k, s in enumerate(delta.values.astype(np.float64)):
            u, v = (start[k] + 8 for start in delta.starts)
            wide[u : u + 4, v : v + 4] += 1.5 * s * np.outer(delta.sides[0][k], delta.sides[1][k])
        return wide[8:-12, 8:-12]


def test_patches_are_summed_in_parts(monkeypatch):
    delta = TestPatches().make(np.random.default_rng(0), (9, 11))
    whole = delta.dense(dtype=torch.float64)
    monkeypatch.setattr(patches, "_AT_ONCE", 50)
    torch.testing.assert_close(delta.dense(dtype=torch.float64), whole, rtol=0, atol=1e-14)


def read(tmp_path, shape=(6, 10), values=None, **config):
    values = np.ones(14, np.float32) if values is None else values
    fields = {key: value for key, value in {**CONFIG, **config}.items() if value != "left out"}
    folder = write_peft_example(tmp_path / "a", fields, {f"{PREFIX}q.waveft_spectrum": values})
    return read_folder(folder, shapes={"q": shape})


WAVELETS = [f"db{i}" for i in range(1, 11)] + [f"sym{i}" for i in range(2, 11)] + [f"coif{i}" for i in range(1, 5)]


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("shape", [(6, 10), (7, 9), (1, 24), (31, 2)])
def test_every_wavelet_peft_has(tmp_path, wavelet, shape):
    """All coefficients, so that every border is met."""
    fields = {key: value for key, value in CONFIG.items() if key != "peft_type"}
    fields |= {"wavelet_family": wavelet, "n_frequency": shape[0] * shape[1]}
    values, want = layer(shape, **fields)
    delta = read(tmp_path, shape, values, **fields).deltas["q"]
    np.testing.assert_allclose(delta.dense(dtype=torch.float64).numpy(), want, atol=1e-11)


def test_lengths_by_share_are_not_asked_of_the_config(tmp_path):
    assert read(tmp_path, values=np.ones(9, np.float32), proportional_parameters=True).parameters == 9


def test_no_slot_holds_it(tmp_path):
    with pytest.raises(AdapterMismatchError, match=r"(?s)no slot can hold a wavelet delta: .*ssh-deploy merge"):
        slot_kind("q", read(tmp_path).deltas["q"])


@pytest.mark.parametrize("fields", [{}, {"use_idwt": False}, {"wavelet_family": "sym3"}])
def test_written_and_read_again_it_is_the_same(tmp_path, fields):
    adapter = read(tmp_path, **fields)
    write_folder(adapter, tmp_path / "b")
    again = read_folder(tmp_path / "b").deltas["q"]
    torch.testing.assert_close(again.dense(dtype=torch.float64), adapter.deltas["q"].dense(dtype=torch.float64))


CONFIGS = [
    ({"wavelet_family": "db11"}, "wavelet_family is 'db11', of which PEFT has no filters"),
    ({"wavelet_family": "left out"}, "wavelet_family is None"),
    ({"wavelet_family": 3}, "wavelet_family is 3"),
    ({"wavelet_family": "coif5"}, "wavelet coif5 makes -12 of 6 numbers"),
    ({"use_idwt": "yes"}, "use_idwt is 'yes'"),
    ({"scaling": "left out"}, "scaling is None"),
    ({"random_loc_seed": "left out"}, "random_loc_seed is None"),
    ({"n_frequency": 13}, "14 values, n_frequency is 13"),
    ({"bias": "waveft_only"}, "changes biases"),
    ({"values": np.full(14, np.nan, np.float32)}, "14 of 14 values are NaN"),
    ({"values": np.ones((2, 7), np.float32)}, "not floats"),
    ({"shape": (3, 4)}, "14 values for the 12 places"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_what_cannot_be_honoured_is_refused(tmp_path, change, message):
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, **change)


def test_without_peft_it_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("peft"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match=r"(?s)filters of wavelet 'db1' are PEFT's.*pip install"):
        read(tmp_path)

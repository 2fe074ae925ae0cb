"""FourierFT against its float64 definition through the contract suite, and what it refuses."""

import ml_dtypes
import numpy as np
import pytest
import torch

from ssh_deploy.adapters.file import read_file, write_file
from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy.testing import FamilyContract, random_adapter, write_peft_example

SHAPES = {"encoder.0.q": (6, 10), "encoder.1.v": (7, 7)}
PREFIX = "base_model.model."
N = {"encoder.0.q": 12, "encoder.1.v": 49}
CONFIG = {
    "peft_type": "FOURIERFT",
    "n_frequency": 12,
    "n_frequency_pattern": {"v": 49},
    "scaling": 9.0,
    "random_loc_seed": 778,
    "bias": "none",
}


class TestFourierFT(FamilyContract):
    family = "fourierft"

    def example(self, rng):
        tensors, want = {}, {}
        for module, (m, n) in SHAPES.items():
            values = rng.normal(size=N[module]).astype(np.float32)
            flat = torch.randperm(m * n, generator=torch.Generator().manual_seed(778))[: values.size].numpy()
            spectrum = np.zeros((m, n))
            spectrum[flat // n, flat % n] = values
            want[module] = 9.0 * np.fft.ifft2(spectrum).real
            tensors[f"{PREFIX}{module}.fourierft_spectrum"] = values
        return CONFIG, tensors, SHAPES, want


def read(tmp_path, change=None, shapes=SHAPES, **config):
    fields, tensors, _, _ = TestFourierFT().example(np.random.default_rng(7))
    tensors = change(tensors) if change else tensors
    kept = {key: value for key, value in {**fields, **config}.items() if value != "left out"}
    return read_folder(write_peft_example(tmp_path / "a", kept, tensors), shapes=shapes)


def replaced(values, module="encoder.0.q"):
    return lambda tensors: tensors | {f"{PREFIX}{module}.fourierft_spectrum": values}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_floats_of_any_width_are_read(tmp_path, dtype):
    adapter = read(tmp_path, lambda t: {name: tensor.astype(dtype) for name, tensor in t.items()})
    values = adapter.deltas["encoder.0.q"].values
    assert values.dtype == (np.float16 if dtype == np.float16 else np.float32)
    _, tensors, _, _ = TestFourierFT().example(np.random.default_rng(7))
    first = tensors[f"{PREFIX}encoder.0.q.fourierft_spectrum"]
    np.testing.assert_array_equal(values.astype(np.float32), first.astype(dtype).astype(np.float32))


def test_a_compact_file_holds_the_places_and_goes_back(tmp_path):
    adapter = read(tmp_path)
    write_file(adapter, tmp_path / "a.safetensors", values_dtype=np.float32)
    compact = read_file(tmp_path / "a.safetensors")
    assert compact.settings == {"n": 49, "seed": 778}
    write_folder(compact, tmp_path / "again")
    again = read_adapter(tmp_path / "again")  # our own folders tell the shapes
    for module, delta in adapter.deltas.items():
        for other in (compact.deltas[module], again.deltas[module]):
            assert torch.equal(delta.dense(dtype=torch.float64), other.dense(dtype=torch.float64))


@pytest.mark.parametrize(
    ("family", "transform", "norm", "settings"),
    [
        ("fourierft", "fourier", "backward", {"seed": 5}),
        ("fourierft", "fourier", "backward", {"seed": "five"}),
        ("fourierft", "fourier", "backward", {}),
        ("fourierft", "hartley", "backward", {"seed": 778}),
    ],
)
def test_what_no_seed_draws_is_not_written_as_a_folder(tmp_path, family, transform, norm, settings):
    random = random_adapter({"a": (6, 10)}, n=60, transform=transform)
    adapter = type(random)(family, random.deltas, {}, "", tmp_path, settings=settings)
    with pytest.raises(AdapterMismatchError, match="has not the Fourier coefficients that seed"):
        write_folder(adapter, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_shapes_come_from_the_config_or_a_base(tmp_path):
    with pytest.raises(AdapterFileError, match=r"(?s)shape of encoder\.0\.q is neither.*--base"):
        read(tmp_path, shapes=None)


def test_shapes_that_differ_are_refused(tmp_path):
    with pytest.raises(AdapterMismatchError, match=r"trained on a weight of \[6, 11\], the base has \[6, 10\]"):
        read(tmp_path, module_shapes={"encoder.0.q": [6, 11]})


@pytest.mark.hostile
def test_a_shape_no_weight_has_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(AdapterFileError, match="a weight of 16777216×16777216 numbers"):
        read(tmp_path, shapes=None, module_shapes={module: [1 << 24, 1 << 24] for module in SHAPES})


TENSORS = [
    (replaced(np.ones((3, 4), np.float32)), r"spectrum is float32 \[3, 4\], not floats"),
    (replaced(np.ones(12, np.int32)), r"spectrum is int32 \[12\], not floats"),
    (replaced(np.ones(0, np.float32)), r"spectrum is float32 \[0\]"),
    (replaced(np.ones(11, np.float32)), "11 values, n_frequency is 12 or 49"),
    (replaced(np.ones(49, np.float32), "encoder.0.q.x"), r"the shape of encoder\.0\.q\.x is neither"),
    (replaced(np.array([np.nan] + [1.0] * 11, np.float32)), r"encoder\.0\.q: 1 of 12 values are NaN"),
    (replaced(np.full(12, 1e300)), "12 of 12 values are NaN or infinite"),
    (lambda t: {f"{PREFIX}x.lora_A.weight": np.ones((2, 2), np.float32)}, "no tensor of a FOURIERFT adapter"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, change)


@pytest.mark.hostile
def test_more_values_than_places_are_refused(tmp_path):
    with pytest.raises(AdapterFileError, match="61 values for the 60 places of a weight of 6×10"):
        read(tmp_path, replaced(np.ones(61, np.float32)), n_frequency=61)


CONFIGS = [
    ({"scaling": "left out"}, "scaling is None"),
    ({"scaling": float("inf")}, "scaling is inf"),
    ({"random_loc_seed": "left out"}, "random_loc_seed is None"),
    ({"random_loc_seed": 7.5}, r"random_loc_seed is 7\.5"),
    ({"random_loc_seed": True}, "random_loc_seed is True"),
    ({"random_loc_seed": 1 << 64}, "random_loc_seed is 18446744073709551616"),
    ({"random_loc_seed": -(1 << 63) - 1}, "random_loc_seed is -9223372036854775809"),
    ({"n_frequency": "left out"}, "n_frequency None"),
    ({"n_frequency": 0}, "n_frequency 0"),
    ({"n_frequency_pattern": {"v": "many"}}, "n_frequency 'many'"),
    ({"n_frequency_pattern": [49]}, "n_frequency None"),
    ({"n_frequency_pattern": {}}, "49 values, n_frequency is 12"),
    ({"bias": "all"}, "bias is 'all': it changes biases"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, config, message):
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, **config)

"""The SSH and sDCTFT families through the contract suite, as a plugin's families are."""

import numpy as np
import pytest

from ssh_deploy.adapters.peft_folder import read_folder
from ssh_deploy.errors import AdapterFileError, RegistryError
from ssh_deploy.testing import FamilyContract, sparse_spectrum, write_peft_example
from ssh_deploy.transforms import reference


class SpectralFamilyContract(FamilyContract):
    transform, norm = "hartley", "backward"

    def example(self, rng):
        shapes = {"encoder.q": (6, 10), "encoder.v": (7, 7)}
        config = {"peft_type": self.family.upper(), "scaling": 5.0, "transform": self.transform, "n_frequency": 8}
        tensors, want = {}, {}
        for module, shape in shapes.items():
            rows, cols, values = sparse_spectrum(rng, shape, 8)
            tensors[f"base_model.model.{module}.ssh_spectrum"] = values
            tensors[f"base_model.model.{module}.ssh_indices"] = np.stack([rows, cols]).astype(np.int32)
            want[module] = reference.delta(self.transform, rows, cols, values, shape, alpha=5.0, norm=self.norm)
        return config, tensors, shapes, want


class TestSSH(SpectralFamilyContract):
    family = "ssh"


class TestJointSSH(SpectralFamilyContract):
    family, transform = "ssh", "hartley-joint"


class TestSDCTFT(SpectralFamilyContract):
    family, transform, norm = "sdctft", "cosine", "ortho"


def test_transform_of_another_family_is_refused(tmp_path):
    config, tensors, shapes, _ = TestSSH().example(np.random.default_rng(0))
    folder = write_peft_example(tmp_path / "a", {**config, "transform": "cosine"}, tensors)
    with pytest.raises(AdapterFileError, match=r"(?s)'cosine' in a SSH adapter.*hartley, hartley-joint"):
        read_folder(folder, shapes=shapes)


def test_family_that_is_not_installed_lists_those_that_are(tmp_path):
    config, tensors, shapes, _ = TestSSH().example(np.random.default_rng(0))
    folder = write_peft_example(tmp_path / "a", {**config, "peft_type": "NO_SUCH"}, tensors)
    with pytest.raises(RegistryError, match=r"(?s)NO_SUCH.*sdctft, .*ssh"):
        read_folder(folder, shapes=shapes)


def test_places_come_ascending_whatever_their_order_in_the_folder(tmp_path):
    config, tensors, shapes, want = TestSSH().example(np.random.default_rng(0))
    adapter = read_folder(write_peft_example(tmp_path / "a", config, tensors), shapes=shapes)
    for module, delta in adapter.deltas.items():
        assert (np.diff(delta.rows.astype(np.int64) * delta.shape[1] + delta.cols) > 0).all()
        np.testing.assert_allclose(delta.dense().numpy(), want[module], atol=1e-5)


@pytest.mark.parametrize("n", [7, 9])
def test_as_many_values_as_places(tmp_path, n):
    config, tensors, shapes, _ = TestSSH().example(np.random.default_rng(0))
    tensors["base_model.model.encoder.q.ssh_spectrum"] = np.ones(n, np.float32)
    with pytest.raises(AdapterFileError, match=rf"encoder\.q: \({n},\) values, \(8,\) rows"):
        read_folder(write_peft_example(tmp_path / "a", config, tensors), shapes=shapes)

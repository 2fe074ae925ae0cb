"""Spectral deltas against the definition, and their scalings."""

import numpy as np
import pytest

from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.testing import DeltaContract, sparse_spectrum
from ssh_deploy.transforms import reference


class SpectralContract(DeltaContract):
    transform, norm = "hartley", "backward"

    def make(self, rng, shape):
        return SpectralDelta(shape, self.transform, *sparse_spectrum(rng, shape, 17), 12.0, self.norm)

    def definition(self, delta):
        return reference.delta(
            delta.transform, delta.rows, delta.cols, delta.values, delta.shape, alpha=delta.alpha, norm=delta.norm
        )


class TestSSH(SpectralContract):
    pass


class TestJoint(SpectralContract):
    transform = "hartley-joint"


class TestSDCTFT(SpectralContract):
    transform, norm = "cosine", "ortho"


class TestFourierFT(SpectralContract):
    transform = "fourier"


def test_gain_of_the_paper_and_of_the_orthonormal_form():
    places = sparse_spectrum(np.random.default_rng(0), (6, 24), 3)
    assert SpectralDelta((6, 24), "hartley", *places, 12.0, "backward").gain == pytest.approx(1.0)
    assert SpectralDelta((6, 24), "cosine", *places, 12.0, "ortho").gain == 12.0


def test_float16_values_lose_nothing_more_than_their_own_rounding():
    rows, cols, values = sparse_spectrum(np.random.default_rng(0), (12, 20), 9)
    half = values.astype(np.float16)
    got = SpectralDelta((12, 20), "hartley", rows, cols, half, 1.0, "ortho").dense().numpy()
    want = SpectralDelta((12, 20), "hartley", rows, cols, half.astype(np.float32), 1.0, "ortho").dense().numpy()
    np.testing.assert_array_equal(got, want)

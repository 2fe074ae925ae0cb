"""Spectral deltas against the definition, and their scalings."""

import numpy as np
import pytest

from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.spectral import SpectralDelta, Stack, Stacks, stacked
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


def test_stacks_are_the_deltas_of_their_sites():
    rng = np.random.default_rng(0)
    drawn = [sparse_spectrum(rng, (12, 20), 9) for _ in "ca"]
    rows, cols, values = (np.array(part) for part in zip(*drawn, strict=True))
    one = Stack((12, 20), "hartley", rows, cols, values, 3.0, "ortho", ("c", "a"))
    other = Stack((8, 8), "cosine", *(part[None] for part in sparse_spectrum(rng, (8, 8), 5)), 2.0, "backward", ("b",))
    deltas = Stacks(("a", "b", "c"), [one, other])
    assert (list(deltas), len(deltas), set(deltas.keys())) == (["a", "b", "c"], 3, {"a", "b", "c"})
    assert stacked(deltas) == ([one, other], {})
    assert deltas["a"] is deltas["a"]
    np.testing.assert_array_equal(deltas["a"].values, values[1])
    assert (deltas["b"].shape, deltas["b"].transform, deltas["b"].gain) == ((8, 8), "cosine", other.gain)
    assert np.shares_memory(deltas["c"].rows, rows)
    again, rest = stacked(dict(deltas))
    assert [stack.keys for stack in again] == [("a", "c"), ("b",)]
    np.testing.assert_array_equal(again[0].cols, cols[::-1])
    assert not rest


def test_what_differs_in_anything_but_its_numbers_is_not_stacked():
    places = sparse_spectrum(np.random.default_rng(0), (12, 12), 9)
    one = SpectralDelta((12, 12), "hartley", *places, 3.0, "ortho")
    deltas = {
        "one": one,
        "alpha": SpectralDelta((12, 12), "hartley", *places, 4.0, "ortho"),
        "norm": SpectralDelta((12, 12), "hartley", *places, 3.0, "backward"),
        "transform": SpectralDelta((12, 12), "cosine", *places, 3.0, "ortho"),
        "width": SpectralDelta((12, 12), "hartley", *(part[:8] for part in places), 3.0, "ortho"),
        "dtype": SpectralDelta((12, 12), "hartley", *places[:2], places[2].astype(np.float16), 3.0, "ortho"),
        "same": SpectralDelta((12, 12), "hartley", *places, 3.0, "ortho"),
        "thin": LowRankDelta(np.ones((12, 1), np.float32), np.ones((1, 12), np.float32), 1.0),
    }
    stacks, others = stacked(deltas)
    assert [stack.keys for stack in stacks] == [("one", "same"), *((name,) for name in list(deltas)[1:6])]
    assert list(others) == ["thin"]

"""Values at places through the contract suite."""

import numpy as np

from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.testing import DeltaContract, sparse_spectrum


class TestSparse(DeltaContract):
    def make(self, rng, shape):
        return SparseDelta(shape, *sparse_spectrum(rng, shape, 11))

    def definition(self, delta):
        want = np.zeros(delta.shape)
        for row, col, value in zip(delta.rows, delta.cols, delta.values, strict=True):
            want[row, col] += value
        return want


def test_norm_and_count():
    delta = SparseDelta((4, 5), np.array([0, 3]), np.array([1, 1]), np.array([3, 4], np.float16))
    assert (delta.norm, delta.parameters, delta.shape) == (5.0, 2, (4, 5))

"""Blocks of small integers: against the plain definition, in onnxruntime's own layout."""

import numpy as np
import pytest

from ssh_deploy.graph.blockwise import Blocks, quantize_blocks


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (7, 96), (5, 129)])
def test_every_number_is_within_half_a_step(bits, shape):
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    blocks = quantize_blocks(weight, bits=bits, block=32)
    assert blocks.dense().shape == shape
    steps = np.repeat(blocks.scales, 32, axis=1)[:, : shape[1]]
    # rounding the zero moves the whole range by up to half a step, and rounding a number by another half
    assert (np.abs(blocks.dense() - weight) <= 1.01 * steps).all()
    assert np.abs(blocks.dense() - weight).mean() < 0.3 * steps.mean()


def test_zero_and_constants_are_exact():
    weight = np.zeros((2, 64), np.float32)
    weight[1, 32:] = -3.0
    np.testing.assert_array_equal(quantize_blocks(weight, bits=4, block=32).dense(), weight)


def test_rows_do_not_depend_on_the_chunk_they_are_in(monkeypatch):
    weight = np.random.default_rng(2).normal(size=(9, 50)).astype(np.float32)
    whole = quantize_blocks(weight, bits=4, block=16)
    monkeypatch.setattr("ssh_deploy.graph.blockwise._CHUNK", 100)
    parts = quantize_blocks(weight, bits=4, block=16)
    for name in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_is_that_of_onnxruntimes_own_kernel(bits):
    """What onnxruntime's quantiser packs, `Blocks` reads; an odd number of blocks ends its zeros in half a byte."""
    native = pytest.importorskip("onnxruntime.capi._pybind_state")
    weight = np.random.default_rng(3).normal(size=(6, 160)).astype(np.float32)
    mine = quantize_blocks(weight, bits=bits, block=32)
    codes, scales, zeros = np.zeros_like(mine.codes), np.zeros(mine.scales.size, np.float32), np.zeros(mine.zeros.size)
    zeros = zeros.astype(np.uint8)
    pack = native.quantize_matmul_4bits if bits == 4 else native.quantize_matmul_8bits
    pack(codes, np.ascontiguousarray(weight.T), scales, zeros, 32, 6, 160, False)
    theirs = Blocks((6, 160), bits, 32, codes, scales.reshape(mine.scales.shape), zeros.reshape(mine.zeros.shape))
    np.testing.assert_allclose(theirs.dense(), mine.dense(), atol=1.01 * mine.scales.max())
    assert np.mean(np.abs(theirs.dense() - mine.dense()) > 1e-5) < 0.02
    np.testing.assert_allclose(theirs.scales, mine.scales, rtol=1e-5)

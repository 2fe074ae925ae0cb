"""Vectors in compiled code: halfs bit for bit, a turned tile, what lies beside it left alone."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from ssh_deploy.transforms import vectors
from ssh_deploy.transforms.vectors import BFLOAT, HALF, LANES, TILE, every, load, load_back, read, store, turn, write

EVERYWHERE = """
import json, ml_dtypes, numpy as np
from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import cpu, get_transform
found = []
for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
    for shape in ((40, 60), (40, 64)):
        weight = np.zeros(shape, dtype)
        t = get_transform("cosine")
        parts = sparse_spectrum(np.random.default_rng(0), shape, 50)
        cpu.add_synthesis(weight, t.axis, t.separable(*parts, shape), gain=1.0)
        found.append(float((weight.astype(np.float64) ** 2).sum()))
print(json.dumps([x / found[0] for x in found[:4]] + [x / found[4] for x in found[4:]]))
"""
KINDS = [(HALF, np.dtype(np.float16)), (BFLOAT, np.dtype(ml_dtypes.bfloat16))]


@njit
def widened(bits, out, kind):
    for i in range(0, bits.size, LANES):
        store(out, i, read(bits, i, kind))


@njit
def narrowed(numbers, out, kind):
    for i in range(0, numbers.size, LANES):
        write(out, i, load(numbers, i), kind)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_every_half_is_read_as_it_is(kind, dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = np.empty(bits.size, np.float32)
    widened(bits, got, kind)
    np.testing.assert_array_equal(got, bits.view(dtype).astype(np.float32))


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_numbers_are_rounded_to_halfs_as_numpy_rounds(kind, dtype):
    """Random bits, ties between all neighbours, the borders of the range, infinities, numbers that are none."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    finite = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(finite[np.isfinite(finite)])
    ties = (finite[1:] / 2 + finite[:-1] / 2).astype(np.float32)
    edges = np.array([np.inf, -np.inf, np.nan, -0.0, 65504, 65519.996, 65520, 3.4e38, 1e-45, 6e-8], np.float32)
    numbers = np.concatenate([random, ties, edges])
    numbers = np.append(numbers, np.zeros(-numbers.size % LANES, np.float32))
    got = np.empty(numbers.size, np.uint16)
    narrowed(numbers, got, kind)
    with np.errstate(over="ignore", invalid="ignore"):
        want = numbers.astype(dtype)
    none = np.isnan(numbers)
    np.testing.assert_array_equal(got[~none], want.view(np.uint16)[~none])
    assert np.isnan(got.view(dtype)[none].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tile_is_turned_from_any_places(dtype):
    rng = np.random.default_rng(0)
    z = rng.normal(size=40 * 2 * LANES).astype(dtype)
    order = rng.permutation(40)[:24] * 2 * LANES
    tile = np.full(LANES * TILE, 7, dtype)

    @njit
    def turned(z, order, tile):
        turn(z, LANES, order, 3, tile, 16)

    turned(z, order, tile)
    tile = tile.reshape(LANES, TILE)
    np.testing.assert_array_equal(tile[:, 16 : 16 + LANES], z.reshape(40, 2, LANES)[order[3:19] // (2 * LANES), 1].T)
    assert (np.delete(tile, np.s_[16 : 16 + LANES], axis=1) == 7).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arithmetic_backwards_and_one_number_in_every_lane(dtype):
    @njit
    def compute(a, b, out):
        store(out, 1, load(a, 1) * every(b, 2) + load(a, 3) - load_back(b, 0))

    rng = np.random.default_rng(0)
    a, b, out = rng.normal(size=20).astype(dtype), rng.normal(size=16).astype(dtype), np.zeros(18, dtype)
    compute(a, b, out)
    want = a[1:17].astype(np.float64) * b[2] + a[3:19] - b[::-1]
    np.testing.assert_allclose(out[1:17], want, rtol=0, atol=8 * np.finfo(dtype).eps)
    assert out[0] == out[17] == 0


def test_outside_of_compiled_code_halfs_are_an_error():
    with pytest.raises(NotImplementedError):
        read(np.zeros(16, np.uint16), 0, HALF)
    with pytest.raises(NotImplementedError):
        write(np.zeros(16, np.uint16), 0, None, HALF)


def test_kinds_of_arrays():
    found = [vectors.kind_of(np.dtype(t)) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8)]
    assert found == [vectors.NATIVE, vectors.NATIVE, HALF, BFLOAT, None]


def test_a_processor_without_vectors_or_halfs_of_its_own_computes_the_same():
    """Machine code of any x86-64 or ARM: no AVX, no conversions, no fused products; 60 columns are no whole vectors."""
    sums = []
    for name in ("", "generic"):
        environment = os.environ | ({"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""} if name else {})
        done = subprocess.run([sys.executable, "-c", EVERYWHERE], env=environment, capture_output=True, check=True)
        sums.append(np.array(json.loads(done.stdout)))
    np.testing.assert_allclose(sums[0], sums[1], atol=2e-3)
    assert np.abs(sums[0]).min() > 0.1

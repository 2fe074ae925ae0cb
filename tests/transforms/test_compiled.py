"""The compiled passes: every length, every place where a block can begin, and nothing written beside it."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import compiled, get_transform
from ssh_deploy.transforms.base import Separable
from ssh_deploy.transforms.compiled import write_rows
from ssh_deploy.transforms.row_plan import aligned, kept, plan_of, scratch_size, sums
from ssh_deploy.transforms.vectors import BFLOAT, HALF, NATIVE

DOUBLE, SINGLE = np.dtype(np.float64), np.dtype(np.float32)


def written(columns, plan, shape, start, *, dtype=DOUBLE, add=False, kind=NATIVE, before=0.0):
    """Rows ``start`` to the end, between two guards."""
    size = (shape[0] - start) * shape[1]
    memory = np.full(size + 64, before, dtype)
    scratch = aligned(scratch_size(plan), DOUBLE if dtype == DOUBLE else SINGLE)
    numbers = memory if kind == NATIVE else memory.view(np.uint16)
    write_rows(numbers[32 : 32 + size], start, add, kind, columns, plan, scratch)
    assert (np.r_[memory[:32], memory[32 + size :]] == np.asarray(before, dtype)).all()
    return memory[32 : 32 + size].reshape(-1, shape[1])


@pytest.mark.parametrize("name", ["hartley", "cosine"])
def test_every_length_is_the_matrix_of_the_axis(name):
    """1 to 140 and some of the lengths that models have: each stage, radices 2, 3, 4 and other odd ones, remainders."""
    axis = get_transform(name).axis
    for n in [*range(1, 141), 384, 576, 768, 43 * 16, 11 * 64, 1024, 43 * 256]:
        plan = plan_of(axis, n, DOUBLE)
        if plan is None:
            assert n in (67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 134, 137, 139)
            continue
        rng = np.random.default_rng(n)
        stage = np.zeros((n, 16 + compiled.ROWS))
        stage[:, :16] = rng.normal(size=(n, 16))
        got = written(kept(np.arange(n), stage / 2), plan, (16, n), 0)
        np.testing.assert_allclose(got, stage[:, :16].T @ axis.matrix(n), atol=1e-12)


@pytest.mark.parametrize("name", ["hartley", "cosine"])
@pytest.mark.parametrize("start", [0, 1, 31, 32, 65, 99])
def test_sums_begin_at_any_row(name, start):
    shape, axis = (100, 48), get_transform(name).axis
    rows, cols, values = sparse_spectrum(np.random.default_rng(0), shape, 70)
    columns = sums(shape, axis, Separable(rows, cols, values, 0.5), 3.0, DOUBLE)
    dense = np.zeros(shape)
    dense[rows, cols] = 1.5 * values.astype(np.float64)
    want = axis.matrix(100).T @ dense @ axis.matrix(48)
    got = written(columns, plan_of(axis, 48, DOUBLE), shape, start)
    np.testing.assert_allclose(got, want[start:], atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(SINGLE, NATIVE), (np.dtype(np.float16), HALF), (np.dtype(ml_dtypes.bfloat16), BFLOAT)]
)
@pytest.mark.parametrize("add", [False, True])
def test_what_is_written_is_rounded_once(dtype, kind, add):
    shape, axis = (50, 96), get_transform("hartley").axis
    rows, cols, values = sparse_spectrum(np.random.default_rng(1), shape, 90)
    columns = sums(shape, axis, Separable(rows, cols, values, 1.0), 1.0, SINGLE)
    plan = plan_of(axis, 96, SINGLE)
    exact = written(columns, plan, shape, 0, dtype=SINGLE)
    got = written(columns, plan, shape, 0, dtype=dtype, kind=kind, add=add, before=0.75)
    want = (exact + np.float32(0.75) if add else exact).astype(dtype)
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def test_the_shares_of_two_rows_do_not_meet():
    """Two rows go through one complex transform; where one is 1e20 times the other it must not show in others."""
    n, axis = 48, get_transform("hartley").axis
    stage = np.zeros((n, 32 + compiled.ROWS), np.float32)
    stage[:, :16] = np.random.default_rng(0).normal(size=(n, 16))
    stage[:, 3] *= 1e20
    got = written(kept(np.arange(n), stage / 2), plan_of(axis, n, SINGLE), (32, n), 0, dtype=SINGLE)
    others = [i for i in range(32) if i not in (3, 28)]  # 15 − 3 after the middle is its partner
    want = stage[:, :32].T.astype(np.float64) @ axis.matrix(n)
    np.testing.assert_allclose(got[others], want[others], atol=1e-5)
    np.testing.assert_allclose(got[3], want[3], rtol=1e-4, atol=1e15)


READ_ONLY = """
import sys
from numba.core import caching
caching.CacheImpl._locator_classes = []
import numpy as np
from ssh_deploy.transforms import cpu, get_transform
t = get_transform("hartley")
spectrum = t.separable(np.array([3]), np.array([5]), np.ones(1), (16, 16))
print(float(np.abs(cpu.synthesis((16, 16), t.axis, spectrum, gain=1.0)).max()) > 0)
"""


def test_without_a_place_to_keep_it_it_is_compiled_every_time():
    done = subprocess.run([sys.executable, "-c", READ_ONLY], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"

"""What the compiled transform is given: factors of lengths, coefficients by column, aligned memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssh_deploy.transforms import get_transform
from ssh_deploy.transforms.base import Separable
from ssh_deploy.transforms.row_plan import aligned, kept, plan_of, radices, sums

HARTLEY = get_transform("hartley").axis


@given(st.integers(1, 100_000))
def test_radices_make_the_length_or_there_is_a_large_prime(n):
    found = radices(n)
    if found is None:
        assert max(p for p in range(65, n + 1) if n % p == 0 and all(p % d for d in range(2, int(p**0.5) + 1))) > 64
    else:
        assert int(np.prod(found)) == n
        assert all(r in (2, 4, 8) or r % 2 for r in found[1:])
        assert all(r in (2, 4, 8, 12) or r % 2 for r in found[:1])
        assert max(found, default=1) <= 64


def test_the_first_stages_are_of_parts_that_fit_the_first_cache():
    for n in (768, 4096, 11008, 14336, 61 * 59):
        plan = plan_of(HARTLEY, n, np.dtype(np.float32))
        assert plan.inner <= 256
        assert n % plan.inner == 0
        places = np.sort(plan.places) // 32
        np.testing.assert_array_equal(places, np.arange(n))


def test_rows_are_parted_last_where_all_weights_are_alike_and_vectors_whole():
    mirrored = {n: plan_of(HARTLEY, n, np.dtype(np.float32)).mirrored for n in (16, 768, 4096, 11008, 12, 75)}
    assert mirrored == {16: True, 768: True, 4096: True, 11008: True, 12: False, 75: False}
    assert not plan_of(get_transform("cosine").axis, 768, np.dtype(np.float32)).mirrored


def test_three_and_four_are_one_stage_where_they_are_the_first():
    assert [radices(n) for n in (12, 768, 576, 60)] == [[12], [12, 8, 8], [3, 3, 8, 8], [3, 5, 4]]


def test_coefficients_stand_by_column():
    rows, cols = np.array([5, 1, 2, 1, 0]), np.array([7, 3, 7, 3, 0])
    found = sums((8, 9), HARTLEY, Separable(rows, cols, np.arange(1.0, 6.0), 2.0), 10.0, np.dtype(np.float64))
    np.testing.assert_array_equal(found.held, [0, 3, 7])
    np.testing.assert_array_equal(found.runs, [0, 1, 3, 5])
    np.testing.assert_array_equal(found.u, [0, 1, 1, 5, 2])
    np.testing.assert_allclose(found.weights[:5], np.array([5, 2, 4, 1, 3]) * 20 / np.sqrt(8))
    assert found.kept.size == 0


@pytest.mark.parametrize("place", [(8, 0), (-1, 0), (0, 9), (0, -1)])
def test_a_coefficient_outside_is_refused(place):
    spectrum = Separable(np.array([place[0]]), np.array([place[1]]), np.ones(1), 1.0)
    with pytest.raises(ValueError, match="outside of the matrix"):
        sums((8, 9), HARTLEY, spectrum, 1.0, np.dtype(np.float32))


def test_kept_columns_are_as_they_are():
    stage = np.arange(12.0).reshape(2, 6)
    found = kept(np.array([1, 4]), stage)
    assert (found.stride, found.kept.tolist(), found.u.size) == (6, stage.reshape(-1).tolist(), 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_memory_begins_where_a_line_of_the_cache_does(dtype):
    for size in (1, 7, 100, 100_000):
        memory = aligned(size, dtype)
        assert (memory.size, memory.dtype, memory.ctypes.data % 64) == (size, dtype, 0)
        assert memory.flags.writeable
        assert memory.flags.c_contiguous

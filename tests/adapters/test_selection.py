"""Which coefficients are chosen: counts, distinctness, the largest really there, the bands respected."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.adapters.selection import BANDS, band_of, by_energy, select_by_bands, select_by_energy
from ssh_deploy.errors import AdapterMismatchError

SELECT = [select_by_energy, select_by_bands]


@st.composite
def problems(draw):
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    n = draw(st.integers(0, shape[0] * shape[1]))
    delta = draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0]))
    seed = draw(st.integers(0, 2**40))
    spectrum = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)
    if draw(st.booleans()):
        spectrum = np.round(spectrum)  # ties, and zeros
    return spectrum, n, delta, seed


def flat(places, spectrum):
    return places[0] * spectrum.shape[1] + places[1]


@pytest.mark.parametrize("select", SELECT)
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_n_distinct_places_inside_in_order_and_repeatable(select, problem):
    spectrum, n, delta, seed = problem
    rows, cols = select(spectrum, n, delta=delta, seed=seed)
    assert rows.dtype == cols.dtype == np.int64
    assert rows.shape == cols.shape == (n,)
    assert ((rows >= 0) & (rows < spectrum.shape[0]) & (cols >= 0) & (cols < spectrum.shape[1])).all()
    assert (np.diff(flat((rows, cols), spectrum)) > 0).all()
    again = select(spectrum.copy(), n, delta=delta, seed=seed)
    assert np.array_equal(rows, again[0])
    assert np.array_equal(cols, again[1])


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_the_largest_are_included(problem):
    spectrum, n, delta, seed = problem
    chosen = np.zeros(spectrum.size, bool)
    chosen[flat(select_by_energy(spectrum, n, delta=delta, seed=seed), spectrum)] = True
    energy = np.abs(spectrum).reshape(-1)
    top = by_energy(n, delta)
    if top:
        least = np.sort(energy)[::-1][top - 1]
        assert chosen[energy > least].all()  # of those that tie at the edge, enough
        assert chosen[energy >= least].sum() >= top


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_bands_share_evenly_and_each_takes_its_largest(problem):
    spectrum, n, delta, seed = problem
    chosen = np.zeros(spectrum.size, bool)
    chosen[flat(select_by_bands(spectrum, n, delta=delta, seed=seed), spectrum)] = True
    band = band_of(spectrum.shape).reshape(-1)
    energy = np.abs(spectrum).reshape(-1)
    sizes = [int((band == b).sum()) for b in range(BANDS)]
    counts = [int(chosen[band == b].sum()) for b in range(BANDS)]
    for b in range(BANDS):
        # a band has less than its even share only when it is full, and more only when another is
        assert counts[b] >= min(sizes[b], n // BANDS)
        if counts[b] > -(-n // BANDS):
            assert any(counts[other] == sizes[other] < counts[b] for other in range(BANDS))
        top = by_energy(counts[b], delta)
        if top:
            inside = energy[band == b]
            assert chosen[band == b][inside > np.sort(inside)[::-1][top - 1]].all()


def test_bands_follow_the_distance_up_to_the_far_corner():
    band = band_of((30, 40))
    edge = np.hypot(15, 20)
    for u, v in ((0, 0), (8, 0), (0, 16), (9, 14), (15, 20), (29, 39)):
        distance = np.hypot(u, v)
        assert band[u, v] == (0 if distance <= edge / 3 else 1 if distance <= 2 * edge / 3 else 2)
    assert band[29, 39] == 2  # beyond d_max itself
    assert [int((band == b).sum()) for b in range(BANDS)] == [64, 172, 964]
    corner = np.zeros((30, 40))
    corner[29, 39] = 1.0
    rows, cols = select_by_bands(corner, 3, delta=1.0, seed=0)
    assert (29, 39) in zip(rows.tolist(), cols.tolist(), strict=True)


def test_the_random_part_depends_on_the_seed_and_covers_everything():
    spectrum = np.random.default_rng(0).normal(size=(20, 30))
    a = flat(select_by_energy(spectrum, 100, delta=0.5, seed=1), spectrum)
    b = flat(select_by_energy(spectrum, 100, delta=0.5, seed=2), spectrum)
    assert 50 <= np.intersect1d(a, b).size < 75
    assert np.array_equal(
        flat(select_by_energy(spectrum, 100, delta=1.0, seed=1), spectrum),
        flat(select_by_energy(spectrum, 100, delta=1.0, seed=2), spectrum),
    )
    hits = np.zeros(spectrum.size, int)
    for seed in range(300):
        hits[flat(select_by_energy(spectrum, 100, delta=0.2, seed=[seed, 7]), spectrum)] += 1
    largest = np.argsort(np.abs(spectrum), axis=None)[::-1][:20]
    assert (hits[largest] == 300).all()
    others = np.delete(hits, largest)  # 80 of 580 each time: 41 hits expected, standard deviation 6
    assert others.min() > 10
    assert others.max() < 75


def test_a_share_that_floats_just_below_a_whole_number_is_that_number():
    assert by_energy(750, 0.7) == 525
    assert by_energy(10, 0.7) == 7
    assert by_energy(100, 0.29) == 29  # 0.29·100 = 28.999999999999996
    assert by_energy(7, 0.5) == 3


@pytest.mark.parametrize("select", SELECT)
def test_out_of_range_is_refused(select):
    spectrum = np.ones((4, 5))
    with pytest.raises(AdapterMismatchError, match="21 coefficients cannot be chosen from a spectrum of 4×5"):
        select(spectrum, 21, delta=0.7, seed=0)
    with pytest.raises(AdapterMismatchError, match="-1 coefficients"):
        select(spectrum, -1, delta=0.7, seed=0)
    with pytest.raises(AdapterMismatchError, match=r"1\.01"):
        select(spectrum, 2, delta=1.01, seed=0)
    with pytest.raises(AdapterMismatchError, match="nan"):
        select(spectrum, 2, delta=float("nan"), seed=0)
    with pytest.raises(AdapterMismatchError, match="spectrum of 20"):
        select(spectrum.reshape(-1), 2, delta=0.5, seed=0)

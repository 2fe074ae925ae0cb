"""Checks of whole adapters agree with the check of one spectrum, which is their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.adapters.base import check_finite, check_shape, check_spectra, check_spectrum, finite
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy.testing import sparse_spectrum

KINDS = ["row", "column", "twice", "nan", "infinite", "length", "rank", "negative", "too many", "huge"]


def damage(kind, rows, cols, values, shape):
    """The same spectrum with one thing wrong."""
    rows, cols, values = rows.astype(np.int32), cols.astype(np.int64), values.astype(np.float64)
    last = rows.size - 1
    if kind == "row":
        rows[last] = shape[0]
    elif kind == "column":
        cols[0] = shape[1]
    elif kind == "twice":
        rows[last], cols[last] = rows[0], cols[0]
    elif kind == "nan":
        values[last] = np.nan
    elif kind == "infinite":
        values[0] = -np.inf
    elif kind == "huge":
        values[0] = 1e300  # finite only in float64
    elif kind == "length":
        values = values[1:]
    elif kind == "rank":
        rows, cols, values = rows[None], cols[None], values[None]
    elif kind == "negative":
        rows[0] = -1
    else:
        rows, cols, values = (np.resize(a, shape[0] * shape[1] + 1) for a in (rows, cols, values))
    return rows, cols, values


def verdict(check):
    try:
        check()
    except AdapterFileError as error:
        return str(error)
    return None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_spectra_at_once_are_refused_as_the_first_bad_one_is_alone(data):
    shapes, deltas = [(8, 8), (3, 40)], {}
    for i in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.sampled_from(shapes))
        spectrum = sparse_spectrum(np.random.default_rng(i), shape, data.draw(st.sampled_from([2, 7])))
        kind = data.draw(st.sampled_from([None, None, *KINDS]))
        rows, cols, values = spectrum if kind is None else damage(kind, *spectrum, shape)
        deltas[f"m{i}"] = SpectralDelta(shape, "hartley", rows, cols, values, 1.0, "ortho")

    def one_by_one():
        for module, d in deltas.items():
            check_spectrum(f"file: {module}", d.rows, d.cols, d.values, d.shape)

    assert verdict(lambda: check_spectra("file", deltas)) == verdict(one_by_one)


@pytest.mark.parametrize("kind", KINDS)
def test_each_damage_is_seen_beside_sound_sites(kind):
    """So that the property above compares refusals and not silence."""
    spectrum = sparse_spectrum(np.random.default_rng(0), (8, 8), 7)
    bad = SpectralDelta((8, 8), "hartley", *damage(kind, *spectrum, (8, 8)), 1.0, "ortho")
    good = SpectralDelta((8, 8), "hartley", *spectrum, 1.0, "ortho")
    check_spectra("file", {"a": good})
    with pytest.raises(AdapterFileError, match="file: b"):
        check_spectra("file", {"a": good, "b": bad, "c": good})


def test_places_of_a_weight_of_more_than_four_thousand_million_numbers():
    """Where 32 bits would wrap: distinct places stay distinct, equal ones are found."""
    shape, rows, cols = (1 << 20, 1 << 20), np.array([0, 1 << 12], np.uint32), np.zeros(2, np.uint32)
    values = np.ones(2, np.float16)
    check_spectra("file", {"a": SpectralDelta(shape, "hartley", rows, cols, values, 1.0, "ortho")})
    same = SpectralDelta(shape, "hartley", rows[[1, 1]], cols, values, 1.0, "ortho")
    with pytest.raises(AdapterFileError, match=r"place \(4096, 0\) occurs twice"):
        check_spectra("file", {"a": same})


def test_empty_spectra_are_sound():
    none = np.zeros(0, np.uint16)
    check_spectra("file", {"a": SpectralDelta((3, 3), "cosine", none, none, none.astype(np.float16), 1.0, "ortho")})


def test_every_float16_is_finite_when_numpy_says_so():
    for number in np.arange(1 << 16, dtype=np.uint16).view(np.float16):
        assert finite(np.array([1, number], np.float16)) is bool(np.isfinite(number))


def test_numbers_that_only_float64_holds_are_not_finite():
    with pytest.raises(AdapterFileError, match="1 of 2 values are NaN or infinite"):
        check_finite("x", np.array([1.0, 1e300]))


@pytest.mark.parametrize("shape", [(), (3,), (3, 3, 3), (0, 3), (3, True), (3.0, 3), ("3", 3), (3, (1 << 24) + 1)])
def test_what_is_no_shape(shape):
    assert check_shape("x", (1, 1 << 24)) == (1, 1 << 24)
    with pytest.raises(AdapterFileError, match="not two sides"):
        check_shape("x", shape)

"""Projections on the strongest coefficients: against the plain definition, whatever the change is made of."""

import numpy as np
import pytest

from ssh_deploy.adapters.projecting import as_spectra, keep_strongest, spectrum_of
from ssh_deploy.adapters.selection import band_of
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import reference

SHAPE = (12, 20)
TRANSFORMS = ["hartley", "hartley-joint", "cosine"]


def change(kind, rng):
    if kind == "lowrank":
        return LowRankDelta(rng.normal(size=(3, 20)), rng.normal(size=(12, 3)), 0.7)
    if kind == "dense":
        return rng.normal(size=SHAPE)
    rows, cols, values = sparse_spectrum(rng, SHAPE, 15)
    return SpectralDelta(SHAPE, kind, rows, cols, values, 2.5, "ortho" if kind == "cosine" else "backward")


def numbers(delta):
    import torch

    return delta if isinstance(delta, np.ndarray) else delta.dense(dtype=torch.float64).numpy()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["lowrank", "dense", "fourier", *TRANSFORMS])
def test_a_spectrum_is_the_definition_whatever_it_comes_from(kind, transform):
    delta = change(kind, np.random.default_rng(1))
    want = reference.analysis(transform, numbers(delta))
    np.testing.assert_allclose(spectrum_of(delta, transform), want, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_n_coefficients_are_the_n_largest_and_make_the_projection(transform):
    delta = change("lowrank", np.random.default_rng(2))
    kept = keep_strongest(delta, transform, count=30)
    spectrum = reference.analysis(transform, numbers(delta))
    largest = np.sort(np.abs(spectrum).reshape(-1))[::-1]
    np.testing.assert_allclose(np.sort(np.abs(kept.coefficients))[::-1], largest[:30], atol=1e-12)
    assert kept.total == pytest.approx(float(np.square(numbers(delta)).sum()))
    made = as_spectra({"m": kept}, transform)["m"]
    assert np.abs(made.values).max() == 1.0
    left = np.square(numbers(delta) - numbers(made)).sum()
    assert left == pytest.approx(kept.total - kept.energy, rel=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_energy_takes_the_fewest_that_hold_it(transform):
    delta = change("dense", np.random.default_rng(3))
    kept = keep_strongest(delta, transform, energy=0.8)
    assert kept.energy >= 0.8 * kept.total
    assert kept.energy - np.square(kept.coefficients).min() < 0.8 * kept.total
    whole = keep_strongest(delta, transform, energy=1.0)
    assert whole.energy == pytest.approx(whole.total, rel=1e-11)


def test_bands_are_chosen_from_one_by_one():
    delta = change("dense", np.random.default_rng(4))
    spectrum, band = spectrum_of(delta, "cosine"), band_of(SHAPE)
    kept = keep_strongest(delta, "cosine", count=30, bands=True)
    assert np.bincount(band[kept.rows, kept.cols]).tolist() == [10, 10, 10]
    held = keep_strongest(delta, "cosine", energy=0.6, bands=True)
    for b in range(3):
        inside = band[held.rows, held.cols] == b
        share = np.square(held.coefficients[inside]).sum() / np.square(spectrum[band == b]).sum()
        assert 0.6 <= share < 0.8
    plain = keep_strongest(delta, "cosine", energy=0.6)
    assert plain.coefficients.size <= held.coefficients.size


@pytest.mark.parametrize(
    ("kind", "transform"),
    [("fourier", "hartley"), ("hartley-joint", "hartley"), *zip(TRANSFORMS, TRANSFORMS, strict=True)],
)
def test_a_spectrum_is_kept_whole_where_it_is_exact(kind, transform):
    delta = change(kind, np.random.default_rng(5))
    kept = keep_strongest(delta, transform)
    assert kept.energy == pytest.approx(kept.total, rel=1e-12)
    assert (
        kept.coefficients.size <= {"fourier": 2, "hartley-joint": 4 if transform == "hartley" else 1}.get(kind, 1) * 15
    )
    made = as_spectra({"m": kept}, transform)["m"]
    np.testing.assert_allclose(numbers(made), numbers(delta), atol=1e-6 * np.abs(numbers(delta)).max())


def test_fourier_coefficients_that_mean_one_matrix_are_added():
    delta = SpectralDelta(
        SHAPE, "fourier", np.array([1, 11]), np.array([2, 18]), np.array([1.0, 2.0], np.float32), 1.0, "backward"
    )
    kept = keep_strongest(delta, "hartley")
    assert kept.coefficients.size == 2
    np.testing.assert_allclose(numbers(as_spectra({"m": kept}, "hartley")["m"]), numbers(delta), atol=1e-8)


def test_one_alpha_for_all_and_nothing_of_nothing():
    rng = np.random.default_rng(6)
    weak, strong = (
        keep_strongest(LowRankDelta(rng.normal(size=(2, 8)), rng.normal(size=(6, 2)), s), "hartley", count=5)
        for s in (1e-3, 10.0)
    )
    none = keep_strongest(np.zeros((6, 8)), "hartley", count=5)
    made = as_spectra({"weak": weak, "strong": strong, "none": none}, "hartley")
    assert len({d.alpha for d in made.values()}) == 1
    assert 0 < np.abs(made["weak"].values).max() < 1e-2 < np.abs(made["strong"].values).max()
    assert made["none"].values.tolist() == [0.0]
    assert as_spectra({"none": none}, "cosine")["none"].alpha == 1.0

"""Products out of spectra, products and plain numbers: exact where asked, the best of their rank otherwise."""

import numpy as np
import pytest

from ssh_deploy.deltas.factoring import factor, thin
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.testing import sparse_spectrum

SHAPE = (24, 40)


def change(kind):
    rng = np.random.default_rng(1)
    if kind == "lowrank":
        return LowRankDelta(
            rng.normal(size=(6, 40)).astype(np.float32), rng.normal(size=(24, 6)).astype(np.float32), 0.7
        )
    if kind == "dense":
        return rng.normal(size=SHAPE)
    rows, cols, values = sparse_spectrum(rng, SHAPE, 15)
    return SpectralDelta(SHAPE, kind, rows, cols, values, 2.5, "ortho" if kind == "cosine" else "backward")


def numbers(delta):
    import torch

    return delta if isinstance(delta, np.ndarray) else delta.dense(dtype=torch.float64).numpy()


KINDS = ["lowrank", "dense", "hartley", "hartley-joint", "cosine", "fourier"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_limit_it_is_the_change_and_of_its_rank(kind):
    delta = change(kind)
    made = factor(delta)
    want = numbers(delta)
    assert made.delta.rank == np.linalg.matrix_rank(want, tol=1e-6 * np.linalg.norm(want, 2))
    np.testing.assert_allclose(numbers(made.delta), want, atol=1e-6 * np.abs(want).max())
    assert made.energy == pytest.approx(made.total)
    assert made.total == pytest.approx(float(np.square(want).sum()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_is_the_best_of_that_rank(kind):
    delta = change(kind)
    made = factor(delta, rank=3)
    s = np.linalg.svd(numbers(delta), compute_uv=False)
    assert made.delta.rank == 3
    assert made.energy == pytest.approx(float(np.square(s[:3]).sum()), rel=1e-6)
    left = float(np.square(numbers(delta) - numbers(made.delta)).sum())
    assert left == pytest.approx(float(np.square(s[3:]).sum()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_energy_takes_the_lowest_rank_that_holds_it(kind):
    made = factor(change(kind), energy=0.7)
    s = np.square(np.linalg.svd(numbers(change(kind)), compute_uv=False))
    r = made.delta.rank
    assert s[:r].sum() >= 0.7 * s.sum() * (1 - 1e-9)
    assert s[: r - 1].sum() < 0.7 * s.sum()
    assert factor(change(kind), energy=0.7, rank=1).delta.rank == 1


def test_no_dense_matrix_is_made_of_a_spectrum():
    """Sides of 2²⁰: a dense ΔW would take 4 TB."""
    side = 1 << 20
    delta = SpectralDelta(
        (side, side),
        "hartley",
        np.array([3, 9, 77]),
        np.array([5, 5, 1]),
        np.array([2.0, 1.0, 4.0], np.float32),
        8.0,
        "backward",
    )
    made = factor(delta)
    assert made.delta.rank == 2
    assert made.total == pytest.approx((8 / side) ** 2 * (4 + 1 + 16))
    x = 1 << 10
    row = made.delta.b[x].astype(np.float64) @ made.delta.a.astype(np.float64)[:, : 1 << 8]
    y = np.arange(1 << 8)

    def cas(t):
        return np.cos(t) + np.sin(t)

    turn = 2 * np.pi / side
    want = (
        8 / side**2 * sum(s * cas(turn * u * x) * cas(turn * v * y) for u, v, s in ((3, 5, 2), (9, 5, 1), (77, 1, 4)))
    )
    np.testing.assert_allclose(row, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("empty", [0, 1])
def test_nothing_is_a_product_of_rank_one(empty):
    places = np.zeros(empty, np.uint16)
    made = factor(SpectralDelta((6, 8), "hartley", places, places, np.zeros(empty, np.float32), 1.0, "backward"))
    assert made.delta.rank == 1
    assert (made.energy, made.total) == (0.0, 0.0)
    assert not numbers(made.delta).any()


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_a_large_matrix_of_float32_numbers(shape):
    rng = np.random.default_rng(2)
    dense = (
        rng.normal(size=(shape[0], 70)) @ np.diag(np.geomspace(1, 1e-3, 70)) @ rng.normal(size=(70, shape[1]))
    ).astype(np.float32)
    s = np.linalg.svd(dense.astype(np.float64), compute_uv=False)
    made = factor(dense, rank=9)
    assert made.energy == pytest.approx(float(np.square(s[:9]).sum()), rel=1e-9)
    left = float(np.square(dense - numbers(made.delta)).sum())
    assert left == pytest.approx(float(np.square(s[9:]).sum()), rel=1e-4)
    whole = factor(dense)
    assert whole.delta.rank <= 70
    np.testing.assert_allclose(numbers(whole.delta), dense, atol=1e-3 * np.abs(dense).max())
    assert factor(np.zeros(shape, np.float32)).delta.rank == 1


@pytest.mark.parametrize("rank", [1, 5, 40, 64])
def test_thin_is_exact_whatever_the_rank(rank):
    rng = np.random.default_rng(3)
    dense = (rng.normal(size=(64, rank)) @ rng.normal(size=(rank, 90))).astype(np.float32)
    made = thin(dense, trained=7)
    assert (made.rank, made.parameters) == (rank, 7)
    np.testing.assert_allclose(numbers(made), dense, atol=1e-6 * np.abs(dense).max())
    nothing = thin(np.zeros((4, 6), np.float32))
    assert (nothing.rank, nothing.shape) == (1, (4, 6))
    assert not numbers(nothing).any()

"""The plugin's own deltas through the contract suite, and DoRA against its definition."""

import numpy as np
import pytest
import torch
from ssh_deploy_lowrank.dora import DoRADelta
from ssh_deploy_lowrank.loha import LoHaDelta
from ssh_deploy_lowrank.lokr import LoKrDelta

from ssh_deploy.deltas.factoring import exact_product
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.testing import DeltaContract


class TestLoHa(DeltaContract):
    def make(self, rng, shape):
        sides = [(shape[0], 2), (2, shape[1])] * 2
        return LoHaDelta(tuple(rng.normal(size=side).astype(np.float32) for side in sides), 1.5)

    def definition(self, delta):
        w = [factor.astype(np.float64) for factor in delta.factors]
        return 1.5 * (w[0] @ w[1]) * (w[2] @ w[3])


class TestLoKr(DeltaContract):
    def make(self, rng, shape):
        m, n = (2 if side % 2 == 0 else 1 for side in shape)
        sides = {"lokr_w1": (m, n), "lokr_w2_a": (shape[0] // m, 1), "lokr_w2_b": (1, shape[1] // n)}
        return LoKrDelta({k: rng.normal(size=s).astype(np.float32) for k, s in sides.items()}, 0.5, 1)

    def definition(self, delta):
        w1, a, b = (delta.parts[key].astype(np.float64) for key in ("lokr_w1", "lokr_w2_a", "lokr_w2_b"))
        return 0.5 * np.kron(w1, a @ b)


def lokr(rng, one, two):
    """A LoKr whose factors w1 and w2 have the sides given: two of a whole one, three with the rank in the middle."""
    parts = {}
    for name, sides in (("lokr_w1", one), ("lokr_w2", two)):
        ends = [""] if len(sides) == 2 else ["_a", "_b"]
        shapes = [sides] if len(sides) == 2 else [sides[:2], sides[1:]]
        parts |= {f"{name}{e}": rng.normal(size=s).astype(np.float32) for e, s in zip(ends, shapes, strict=True)}
    return LoKrDelta(parts, 0.5, 1)


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (lambda rng: TestLoHa().make(rng, (24, 20)), 4),
        (lambda rng: lokr(rng, (2, 3), (12, 1, 8)), 2),
        (lambda rng: lokr(rng, (3, 2), (8, 1, 12)), 2),
        (lambda rng: lokr(rng, (4, 1, 4), (6, 2, 5)), 2),
        (lambda rng: lokr(rng, (8, 2, 8), (2, 3)), 4),
    ],
)
def test_the_product_is_the_same_change_at_the_rank_it_says(make, rank):
    delta = make(np.random.default_rng(3))
    product = exact_product(delta)
    assert (product.rank, delta.product_rank, product.shape, product.parameters) == (
        rank, rank, delta.shape, delta.parameters
    )  # fmt: skip
    want = delta.dense(dtype=torch.float64)
    torch.testing.assert_close(product.dense(dtype=torch.float64), want, rtol=0, atol=3e-7 * float(want.abs().max()))
    assert np.linalg.matrix_rank(want.numpy()) == rank  # no lower one holds it


def test_what_is_not_thin_is_no_product():
    rng = np.random.default_rng(0)
    assert exact_product(TestLoHa().make(rng, (8, 8))).rank == 4  # as many numbers as ΔW has
    assert exact_product(TestLoHa().make(rng, (8, 7))) is None
    assert exact_product(lokr(rng, (6, 6), (8, 8))) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dora_brings_every_row_to_its_magnitude(dtype):
    rng = np.random.default_rng(0)
    product = LowRankDelta(rng.normal(size=(2, 7)).astype("f"), rng.normal(size=(5, 2)).astype("f"), 0.5)
    delta = DoRADelta(product, rng.uniform(1, 2, size=5).astype("f"))
    weight = torch.from_numpy(rng.normal(size=(5, 7))).to(dtype)
    exact = weight.double().numpy() + 0.5 * product.b.astype(float) @ product.a
    want = delta.magnitude[:, None] * exact / np.linalg.norm(exact, axis=1, keepdims=True)
    got = delta.add_to(weight.clone())
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=tolerance * 2)
    assert (delta.shape, delta.parameters) == ((5, 7), 2 * 12 + 5)

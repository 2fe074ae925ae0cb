"""The plugin's own deltas through the contract suite, and DoRA against its definition."""

import numpy as np
import pytest
import torch
from ssh_deploy_lowrank.dora import DoRADelta
from ssh_deploy_lowrank.loha import LoHaDelta
from ssh_deploy_lowrank.lokr import LoKrDelta

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

"""Low-rank deltas, formulas and changes that depend on their weight, against float64 definitions."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from ssh_deploy.deltas.formula import FormulaDelta, RelativeDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.testing import DeltaContract


def product(rng, shape, rank=3, dtype=np.float32):
    a, b = rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank))
    return LowRankDelta(a.astype(dtype), b.astype(dtype), 0.75)


def definition(delta):
    return delta.scaling * delta.b.astype(np.float64) @ delta.a.astype(np.float64)


class TestLowRank(DeltaContract):
    def make(self, rng, shape):
        return product(rng, shape)

    def definition(self, delta):
        return definition(delta)


class TestFloat16(TestLowRank):
    def make(self, rng, shape):
        return product(rng, shape, dtype=np.float16)


@dataclass(frozen=True, slots=True, eq=False)
class Scaled(FormulaDelta):
    """A matrix times two: the least a formula can be."""

    matrix: np.ndarray
    kind: ClassVar[str] = "scaled"

    @property
    def shape(self):
        return self.matrix.shape

    def dense(self, *, device="cpu", dtype=None):
        return 2 * torch.from_numpy(self.matrix).to(device, dtype or torch.float32)


class TestFormula(DeltaContract):
    def make(self, rng, shape):
        return Scaled(rng.normal(size=shape))

    def definition(self, delta):
        return 2 * delta.matrix


@dataclass(frozen=True, slots=True, eq=False)
class Squared(RelativeDelta):
    """ΔW = W²."""

    shape: tuple[int, int]
    kind: ClassVar[str] = "squared"

    def change(self, weight):
        return weight**2


def test_shape_rank_parameters_and_norm():
    delta = product(np.random.default_rng(0), (7, 13))
    assert (delta.shape, delta.rank, delta.parameters) == ((7, 13), 3, 60)
    assert LowRankDelta(delta.a, delta.b, 1.0, trained=5).parameters == 5
    assert delta.norm == pytest.approx(np.linalg.norm(definition(delta)), rel=1e-12)


def test_a_weight_of_any_stride_is_added_to():
    delta, stored = product(np.random.default_rng(0), (7, 13)), torch.zeros(13, 7, dtype=torch.float64)
    assert delta.add_to(stored.T) is not None
    np.testing.assert_allclose(stored.numpy().T, definition(delta), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_relative_delta_reads_the_weight_and_rounds_once(dtype):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    work = weight.double() if dtype == torch.float64 else weight.float()
    want = (work + 0.5 * work**2).to(dtype)
    got = Squared((4, 6)).add_to(weight, scale=0.5)
    assert torch.equal(got, want)
    assert (got is weight) == (dtype != torch.bfloat16)


@pytest.mark.parametrize("ask", [lambda d: d.dense(), lambda d: d.apply(torch.ones(6))])
def test_a_relative_delta_alone_has_no_matrix(ask):
    with pytest.raises(AdapterMismatchError, match=r"(?s)Squared has no ΔW of its own.*Merge it"):
        ask(Squared((4, 6)))

"""Changes that depend on the weight: scales and thin maps against float64 definitions, on weights of every dtype."""

import numpy as np
import pytest
import torch

from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.deltas.reflection import ReflectionDelta, ThinMap, reflected
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.testing import SHAPES

DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def diagonal(rng, shape):
    outer, inner = normal(rng, shape[0]), normal(rng, shape[1])
    delta = DiagonalDelta(shape, {"outer": outer, "inner": inner}, outer=outer, inner=inner)
    return delta, lambda w: np.diag(outer.astype(float)) @ w @ np.diag(inner.astype(float))


def thin(rng, shape):
    maps = [ThinMap(rng.normal(size=(2, side)), rng.normal(size=(2, side))) for side in shape]
    delta = ReflectionDelta(shape, {"u": maps[0].p}, outer=maps[0], inner=maps[1])
    left, right = (np.eye(side) + m.p.T @ m.q for side, m in zip(shape, maps, strict=True))
    return delta, lambda w: left @ w @ right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [diagonal, thin])
def test_it_is_the_definition_in_every_dtype(make, shape, dtype):
    rng = np.random.default_rng(3)
    delta, definition = make(rng, shape)
    weight = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    exact = weight.double().numpy()
    want = exact + 0.5 * (definition(exact) - exact)
    got = delta.add_to(weight.clone(), scale=0.5)
    assert got.dtype == dtype
    size = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=DTYPES[dtype] * size)
    for refused in (delta.dense, lambda: delta.apply(torch.zeros(1, shape[1]))):
        with pytest.raises(AdapterMismatchError, match="depends on the weight"):
            refused()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_reflections_one_after_another(rank):
    vectors = normal(np.random.default_rng(0), rank, 7)
    found = reflected(vectors)
    want = np.eye(7)
    for u in vectors.astype(float):
        want = want @ (np.eye(7) - 2 * np.outer(u, u) / (u @ u))
    got = np.eye(7) + found.p.T @ found.q
    np.testing.assert_allclose(got, want, atol=1e-14)
    np.testing.assert_allclose(got @ got.T, np.eye(7), atol=1e-14)
    assert (found.rank, found.side) == (rank, 7)


def test_a_bias_goes_with_the_rows():
    outer, shift, bias = np.array([2, 0.5], np.float16), np.array([1, -1], np.float32), np.array([3.0, 4.0])
    made = {}
    assert DiagonalDelta((2, 3), made, outer=outer, shift=shift).bias_change(bias).tolist() == [4, -3]
    assert DiagonalDelta((2, 3), made, outer=outer).bias_change(bias).tolist() == [3, -2]
    assert DiagonalDelta((2, 3), made, outer=outer).bias_change(None).tolist() == [0, 0]
    assert DiagonalDelta((2, 3), made, shift=shift).bias_change(None).tolist() == [1, -1]
    assert DiagonalDelta((2, 3), made, inner=np.ones(3)).bias_change(bias) is None
    assert ReflectionDelta((2, 3), made, inner=reflected(np.ones((1, 3)))).bias_change(bias) is None

"""The sparse product and its gradients against the dense float64 definition."""

import numpy as np
import pytest
import torch
from ssh_deploy_train.sparse import Plan, apply_spectrum

from ssh_deploy.transforms import reference

SHAPES = [(8, 8), (12, 20), (7, 13), (1, 9), (9, 1), (1, 1), (32, 48)]
KINDS = [("hartley", "backward"), ("hartley-joint", "backward"), ("cosine", "ortho")]


def example(shape, transform, norm, n=11, alpha=3.0):
    rng = np.random.default_rng(1)
    n = min(n, shape[0] * shape[1])
    rows, cols = np.divmod(rng.choice(shape[0] * shape[1], n, replace=False), shape[1])
    values = rng.normal(size=n)
    gain = alpha / np.sqrt(shape[0] * shape[1]) if norm == "backward" else alpha
    indices = torch.from_numpy(np.stack([rows, cols]).astype(np.int32))
    plan = Plan.make(indices, shape=shape, transform=transform, gain=gain)
    dense = reference.delta(transform, rows, cols, values, shape, alpha=alpha, norm=norm)
    basis = np.stack(
        [alpha * reference.basis(transform, u, v, shape, norm=norm) for u, v in zip(rows, cols, strict=True)]
    )
    return plan, torch.from_numpy(values), torch.from_numpy(dense), torch.from_numpy(basis)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("transform", "norm"), KINDS)
def test_forward_and_gradients_are_the_dense_definition(shape, transform, norm):
    plan, values, dense, basis = example(shape, transform, norm)
    torch.manual_seed(0)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    y = apply_spectrum(x, values, plan)
    torch.testing.assert_close(y, x @ dense.T, rtol=0, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ dense, rtol=0, atol=1e-11)
    whole = g.reshape(-1, shape[0]).T @ x.detach().reshape(-1, shape[1])
    torch.testing.assert_close(values.grad, (basis * whole).sum((1, 2)), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("transform", "norm"), KINDS)
def test_gradcheck(transform, norm):
    plan, values, _, _ = example((6, 5), transform, norm, n=7)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, s: apply_spectrum(a, s, plan), (x, values.requires_grad_()))


@pytest.mark.parametrize(("transform", "norm"), KINDS)
def test_float32_and_half_inputs(transform, norm):
    plan, values, dense, _ = example((32, 48), transform, norm)
    x = torch.randn(40, 48)
    want = x.double() @ dense.T
    size = float(want.abs().max())
    got = apply_spectrum(x, values.float(), plan)
    assert got.dtype == torch.float32
    assert float((got - want).abs().max()) < 4e-6 * size
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        half = apply_spectrum(x.to(dtype), values.float(), plan)
        assert half.dtype == torch.float32
        assert float((half - want).abs().max()) < tolerance * size


def test_more_coefficients_than_one_chunk_of_row_products():
    plan, values, dense, basis = example((32, 48), "hartley", "backward", n=700)
    x = torch.randn(5, 48, dtype=torch.float64)
    values.requires_grad_()
    y = apply_spectrum(x, values, plan)
    torch.testing.assert_close(y, x @ dense.T, rtol=0, atol=1e-12)
    y.sum().backward()
    torch.testing.assert_close(values.grad, (basis * x.sum(0)).sum((1, 2)), rtol=0, atol=1e-11)


def test_no_tokens():
    plan, values, _, _ = example((12, 20), "hartley", "backward")
    x = torch.randn(0, 20, requires_grad=True)
    spectrum = values.float().requires_grad_()
    y = apply_spectrum(x, spectrum, plan)
    assert y.shape == (0, 12)
    y.sum().backward()
    assert x.grad.shape == (0, 20)
    assert not spectrum.grad.any()


def test_the_input_is_not_overwritten():
    plan, values, _, _ = example((12, 20), "hartley", "backward")
    x = torch.randn(6, 20)
    before = x.clone()
    spectrum = values.float().requires_grad_()
    y = apply_spectrum(x.requires_grad_(), spectrum, plan)
    gradient = torch.randn_like(y)
    kept = gradient.clone()
    y.backward(gradient)
    assert torch.equal(x, before)
    assert torch.equal(gradient, kept)


def test_only_the_input_and_the_spectrum_are_saved_for_backward():
    plan, values, _, _ = example((32, 48), "hartley", "backward", n=300)
    saved = []
    x, spectrum = torch.randn(64, 48, requires_grad=True), values.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_spectrum(x, spectrum, plan)
    assert sorted(t.data_ptr() for t in saved) == sorted([x.data_ptr(), spectrum.data_ptr()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("transform", "norm"), KINDS)
def test_a_cuda_device_gives_the_same(transform, norm):
    plan, values, dense, _ = example((32, 48), transform, norm)
    indices = torch.stack([plan.rows, plan.cols])[:, : values.numel()].to("cuda", torch.int32)
    there = Plan.make(indices, shape=plan.shape, transform=transform, gain=plan.gain)
    x = torch.randn(40, 48, dtype=torch.float64, device="cuda", requires_grad=True)
    spectrum = values.to("cuda").requires_grad_()
    y = apply_spectrum(x, spectrum, there)
    torch.testing.assert_close(y.cpu(), x.detach().cpu() @ dense.T, rtol=0, atol=1e-11)
    y.sum().backward()
    here_x, here_s = x.detach().cpu().requires_grad_(), values.detach().clone().requires_grad_()
    apply_spectrum(here_x, here_s, plan).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), here_x.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(spectrum.grad.cpu(), here_s.grad, rtol=0, atol=1e-11)

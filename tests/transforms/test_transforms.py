"""Every built-in transform against the float64 definitions, and the identities of the paper."""

import ducc0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.errors import RegistryError
from ssh_deploy.testing import TransformContract, in_two_stages, sparse_spectrum
from ssh_deploy.transforms import cpu, get_transform, reference, transform_names


class TestHartley(TransformContract):
    name = "hartley"


class TestJointHartley(TransformContract):
    name = "hartley-joint"


class TestCosine(TransformContract):
    name = "cosine"


class TestFourier(TransformContract):
    name = "fourier"


@pytest.mark.parametrize("shape", [(6, 10), (7, 5), (1, 8)])
def test_fourier_is_the_real_part_of_ifft2(shape):
    rows, cols, values = sparse_spectrum(np.random.default_rng(3), shape, 9)
    spectrum = np.zeros(shape)
    spectrum[rows, cols] = values
    got = reference.delta("fourier", rows, cols, values, shape, alpha=1.0, norm="backward")
    np.testing.assert_allclose(got, np.fft.ifft2(spectrum).real, atol=1e-14)


def test_joint_and_separable_are_different_transforms():
    weight = np.random.default_rng(0).normal(size=(64, 64))
    strongest = [
        {*np.argsort(-np.abs(get_transform(name).analyze(weight)).ravel())[:200]}
        for name in ("hartley", "hartley-joint")
    ]
    assert len(strongest[0] & strongest[1]) < 100


def test_hartley_sign_is_cos_plus_sin():
    """ducc0 has both signs; the wrong one is an involution too, so only the definition tells them apart."""
    matrix = get_transform("hartley").axis.matrix(5)
    assert matrix[1, 1] == pytest.approx((np.cos(2 * np.pi / 5) + np.sin(2 * np.pi / 5)) / np.sqrt(5))
    other = ducc0.fft.separable_hartley(np.eye(5), axes=[0], inorm=1)
    assert np.abs(other - matrix).max() > 0.5


def test_unknown_transform_lists_what_is_installed():
    with pytest.raises(RegistryError, match="cosine, fourier, hartley, hartley-joint"):
        get_transform("wavelet")
    assert transform_names() == ["cosine", "fourier", "hartley", "hartley-joint"]


sides = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 13, 31, 97, 64]))


@settings(max_examples=60, deadline=None)
@given(
    m=sides,
    n=sides,
    count=st.integers(0, 60),
    name=st.sampled_from(["hartley", "hartley-joint", "cosine", "fourier"]),
    seed=st.integers(0, 9),
)
def test_fast_path_is_the_definition_for_any_shape(m, n, count, name, seed):
    rows, cols, values = sparse_spectrum(np.random.default_rng(seed), (m, n), count)
    transform = get_transform(name)
    spectrum = transform.separable(rows, cols, values, (m, n))
    got = cpu.synthesis((m, n), transform.axis, spectrum, gain=1.0, dtype=np.float64)
    want = reference.delta(name, rows, cols, values, (m, n), alpha=1.0, norm="ortho")
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_column_blocks_join(monkeypatch):
    """More columns than one block, not a multiple of it; strided and transposed outputs are written in place."""
    monkeypatch.setattr(cpu, "_BLOCK", 16)
    monkeypatch.setattr(cpu, "_ALONE", 0)
    transform = get_transform("hartley")
    rows, cols, values = sparse_spectrum(np.random.default_rng(0), (20, 50), 30)
    spectrum = transform.separable(rows, cols, values, (20, 50))
    want = reference.delta("hartley", rows, cols, values, (20, 50), alpha=1.0, norm="ortho")
    wide = np.full((20, 100), 7.0)
    cpu.add_synthesis(wide[:, ::2], transform.axis, spectrum, gain=2.0)
    np.testing.assert_allclose(wide[:, ::2], 7 + 2 * want, atol=1e-12)
    assert (wide[:, 1::2] == 7).all()
    columns_only = transform.separable(rows, np.full_like(cols, 3)[:1].repeat(rows.size), values, (20, 50))
    assert np.unique(columns_only.cols).size == 1  # fewer columns than rows: the transposed problem
    got = cpu.synthesis((20, 50), transform.axis, columns_only, gain=1.0, dtype=np.float64)
    want = reference.delta("hartley", rows, columns_only.cols, values, (20, 50), alpha=1.0, norm="ortho")
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_float32_error_is_within_twice_plain_torch():
    """n = 1000 at 384²: our f32 error against float64, and that of torch's own f32 inverse FFT of the same spectrum."""
    import torch

    shape = (384, 384)
    rows, cols, values = sparse_spectrum(np.random.default_rng(0), shape, 1000)
    transform = get_transform("hartley")
    spectrum = transform.separable(rows, cols, values, shape)
    exact = cpu.synthesis(shape, transform.axis, spectrum, gain=1.0, dtype=np.float64)
    ours = np.abs(cpu.synthesis(shape, transform.axis, spectrum, gain=1.0) - exact).max()
    dense = torch.zeros(shape, dtype=torch.float32)
    dense[torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(cols.astype(np.int64))] = torch.from_numpy(values)
    exact_fft = torch.fft.ifft2(dense.double(), norm="ortho").real
    plain = (torch.fft.ifft2(dense, norm="ortho").real - exact_fft).abs().max().item()
    assert ours <= 2 * max(plain, 1.2e-7 * np.abs(exact).max())


@pytest.mark.parametrize(("n", "factors"), [(13, (1, 13)), (768, (48, 16)), (1536, (96, 16)), (4096, (128, 32))])
@pytest.mark.parametrize("name", ["hartley", "cosine"])
def test_factors_of_a_length(name, n, factors):
    """4096 as 64·64 takes as many multiply-adds and twice the numbers; 1536 as 48·32 seven for eight, and 1.7 times."""
    axis = get_transform(name).axis
    stages = axis.two_stage(n)
    assert axis.output_order(n)[0] == (stages.p, stages.q) == factors
    x = np.random.default_rng(n).normal(size=(n, 2))
    np.testing.assert_allclose(in_two_stages(axis, x), axis.forward_cpu(x, 0), atol=1e-11)

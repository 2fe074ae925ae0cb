"""Which way a device sums, and what it says and does when a way is closed."""

import logging

import numpy as np
import pytest
import torch
from triton_here import DEVICE, mend_interpreter, needs_cuda, needs_triton

from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import cpu, device, get_transform
from ssh_deploy.transforms.cuda.fused import Addend


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Reasons are told once a process; here, once a test."""
    device._tell.cache_clear()
    mend_interpreter(monkeypatch)


@pytest.fixture
def fuses(monkeypatch):
    """The fused way without a GPU."""
    monkeypatch.setattr(device, "_fuses", lambda weight: True)


def problem(shape, count, *, name="hartley", n=20):
    """``count`` weights of ones, their addends, and the exact sums."""
    rng, transform = np.random.default_rng(0), get_transform(name)
    addends = []
    for _ in range(count):
        spectrum = transform.separable(*sparse_spectrum(rng, shape, n), shape)
        addends.append(Addend(transform.axis, spectrum, 2.0))
    wants = [1 + cpu.synthesis(shape, transform.axis, a.spectrum, gain=a.gain, dtype=np.float64) for a in addends]
    return [torch.ones(shape, device=DEVICE) for _ in addends], addends, wants


def check(weights, wants):
    for weight, want in zip(weights, wants, strict=True):
        np.testing.assert_allclose(weight.cpu().double().numpy(), want, atol=1e-5)


def test_the_cpu_sums_by_fft_and_says_so(caplog):
    weights, addends, wants = problem((24, 20), 2)
    weights = [w.cpu() for w in weights]
    with caplog.at_level(logging.WARNING):
        device.add_on_device(weights, addends)
    check(weights, wants)
    assert [r.message for r in caplog.records] == [
        "ΔW by plain torch (FFT), not by the fused kernels: the device is cpu."
    ]


@needs_triton
def test_odd_sizes_take_the_plain_way_and_the_rest_is_fused(caplog, fuses, monkeypatch):
    """Weights of several shapes, dtypes and orientations in one call; an empty spectrum; one launch per shape."""
    launched = []
    add_batch = device.add_batch
    monkeypatch.setattr(device, "add_batch", lambda b, w: (launched.append((b.shape, len(w))), add_batch(b, w)))
    odd, even, tall = problem((33, 20), 1), problem((32, 20), 2), problem((20, 48), 1, name="cosine")
    flat = [torch.ones((48, 20), device=DEVICE).T]
    nothing = problem((32, 20), 1, n=0)
    weights, addends, wants = (
        [x for part in parts for x in part] for parts in zip(odd, even, (flat, tall[1], tall[2]), nothing, strict=True)
    )
    with caplog.at_level(logging.WARNING):
        device.add_on_device(weights, addends)
    check(weights, wants)
    assert sorted(launched) == [((32, 20), 2), ((48, 20), 1)]
    assert [r.message.partition(": ")[2] for r in caplog.records] == ["16 does not divide a side of 33."]


@needs_triton
def test_float64_is_summed_in_float64(fuses):
    weights, addends, wants = problem((32, 20), 1)
    weights = [weights[0].double()]
    device.add_on_device(weights, addends)
    np.testing.assert_allclose(weights[0].cpu().numpy(), wants[0], atol=1e-12)


@needs_triton
def test_out_of_memory_takes_fewer_at_once_then_the_cpu(caplog, fuses, monkeypatch):
    """Room for two, then for none: every weight gets its sum exactly once."""
    room = 2
    prepare = device.prepare

    def narrow(shape, addends, **kwargs):
        if len(addends) > room:
            raise torch.OutOfMemoryError("no room")
        return prepare(shape, addends, **kwargs)

    monkeypatch.setattr(device, "prepare", narrow)
    weights, addends, wants = problem((32, 20), 5)
    with caplog.at_level(logging.WARNING):
        device.add_on_device(weights, addends)
    check(weights, wants)
    assert ["2 matrices at once instead of 5" in r.message for r in caplog.records] == [True, False]
    caplog.clear()
    room = 0
    weights, addends, wants = problem((32, 20), 2)
    with caplog.at_level(logging.WARNING):
        device.add_on_device(weights, addends)
    check(weights, wants)
    assert sum("summed on the CPU" in r.message for r in caplog.records) == 2


def test_the_plain_way_falls_back_too(caplog, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(device, "_plain", full)
    weights, addends, wants = problem((33, 20), 1)
    weights = [weights[0].bfloat16()]
    with caplog.at_level(logging.WARNING):
        device.add_on_device(weights, addends)
    assert torch.equal(weights[0].cpu(), torch.from_numpy(wants[0]).float().bfloat16())
    assert "summed on the CPU" in caplog.text


def test_a_device_without_room_for_the_result(caplog, monkeypatch):
    """What merges ask for: ΔW of its own, from the CPU then."""
    zeros = torch.zeros

    def narrow(*args, device=None, **kwargs):
        if device == "cuda":
            raise torch.OutOfMemoryError("no room")
        return zeros(*args, device=device, **kwargs)

    monkeypatch.setattr(torch, "zeros", narrow)
    _, (addend,), (want,) = problem((33, 20), 1)
    delta = device.synthesis_torch((33, 20), addend.axis, addend.spectrum, gain=addend.gain, device="cuda")
    assert delta.device.type == "cpu"
    np.testing.assert_allclose(1 + delta.double().numpy(), want, atol=1e-5)
    assert "cuda is out of memory: a 33×20 matrix is made on the CPU" in caplog.text


@needs_triton
def test_large_stages_are_summed_in_parts(fuses, monkeypatch):
    monkeypatch.setattr(device, "_AT_ONCE", 4 * 20 * 20 * 2)  # two stages of 20 rows
    sizes = []
    add_batch = device.add_batch
    monkeypatch.setattr(device, "add_batch", lambda b, w: (sizes.append(len(w)), add_batch(b, w)))
    weights, addends, wants = problem((32, 20), 5)
    device.add_on_device(weights, addends)
    check(weights, wants)
    assert sizes == [2, 2, 1]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_deltas_on_a_gpu(dtype):
    """`SpectralDelta` as merges and `swap` call it: dense, and added to a weight, beside the CPU's."""
    from ssh_deploy.testing import random_adapter

    delta = random_adapter({"x": (256, 320)}, n=200).deltas["x"]
    base = torch.randn((256, 320), generator=torch.Generator().manual_seed(0)).to(dtype)
    step = torch.finfo(dtype).eps
    for ours, cpus in (
        (delta.dense(device="cuda", dtype=dtype), delta.dense(dtype=dtype)),
        (delta.add_to(base.cuda(), scale=0.5), delta.add_to(base.clone(), scale=0.5)),
    ):
        assert ours.dtype == dtype
        close = torch.isclose(
            ours.cpu().double(), cpus.double(), rtol=2 * step, atol=2 * step * cpus.abs().max().item()
        )
        assert close.all()

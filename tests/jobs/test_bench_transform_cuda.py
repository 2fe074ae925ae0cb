"""The device's bench, without a device: every variant, the summary, and the refusal where there is no GPU."""

import numpy as np
import pytest
import torch
from triton_here import mend_interpreter, needs_cuda, needs_triton

from ssh_deploy.errors import DependencyError, VerificationError
from ssh_deploy.jobs import bench_transform_cuda
from ssh_deploy.jobs.bench_transform_cuda import CudaOptions, measure_cuda
from ssh_deploy.jobs.benching import Bench, describe_machine
from ssh_deploy.transforms.cuda.fused import Tile

SMALL = CudaOptions(
    sizes=((32, 32),),
    dtypes=("bfloat16", "float32"),
    coefficients=9,
    seconds=0.0,
    layers=((32, 16, 2),),
    tiles=(Tile(16, 8, 32), Tile(64, 8, 32)),
    copies=2,
    device="cpu",
)


@pytest.fixture
def quick(monkeypatch):
    mend_interpreter(monkeypatch)
    monkeypatch.setattr(bench_transform_cuda, "_PASSES", 1)
    interleaved = bench_transform_cuda.interleaved
    monkeypatch.setattr(bench_transform_cuda, "interleaved", lambda *a, **k: interleaved(*a, **k, least=1))


def bench():
    return Bench("transform", describe_machine())


@needs_triton
def test_every_variant_is_a_row(quick):
    found = measure_cuda(bench(), options=SMALL)
    names = ["copy", "fused", "ssh", "fused 16·8·32 8 warps", "fused_launched", "added", "peft", "torch_fft"]
    assert [r["variant"] for r in found.results if r["dtype"] == "bfloat16"] == names
    assert [r["variant"] for r in found.results if r["dtype"] == "float32"] == [n for n in names if "warps" not in n]
    by = {r["variant"]: r for r in found.results if r["dtype"] == "bfloat16"}
    assert by["copy"]["bandwidth_share"] == 1.0
    assert by["fused"]["ratio"] == 1.0
    assert 0 < by["fused"]["error"] < 0.02
    assert set(found.summary) == {
        "bandwidth_share_32",
        "speedup_vs_peft_32",
        "speedup_vs_torch_fft_32",
        "qv_8b_ms",
        "qv_8b_from_host_ms",
    }
    assert found.summary["bandwidth_share_32"] == pytest.approx(by["copy"]["ratio"], abs=1e-4)
    assert found.summary["speedup_vs_peft_32"] == pytest.approx(by["peft"]["ratio"], abs=0.01)
    assert found.summary["qv_8b_ms"] > 0  # the interpreter's times mean nothing, but they are taken


@needs_triton
def test_a_wrong_kernel_is_not_timed(quick, monkeypatch):
    monkeypatch.setattr(bench_transform_cuda, "add_batch", lambda batch, weights, **_: None)
    with pytest.raises(VerificationError, match="off by 1 of itself"):
        measure_cuda(bench(), options=SMALL)


@needs_triton
def test_the_same_change_as_peft(quick):
    """What is timed beside PEFT is PEFT's own ΔW."""
    layer, addend = bench_transform_cuda._peft((48, 32), 20, "cpu")
    want = layer.module.get_delta_weight("default").detach().double().numpy()
    got = bench_transform_cuda.cpu.synthesis((48, 32), addend.axis, addend.spectrum, gain=addend.gain, dtype=np.float64)
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DependencyError, match=r"--device cuda: torch .* sees no CUDA device"):
        measure_cuda(bench())


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu():
    found = measure_cuda(bench(), options=CudaOptions(sizes=((1024, 1024),), seconds=1.0, layers=((1024, 1024, 2),)))
    assert found.summary["speedup_vs_peft_1024"] > 1
    assert found.machine["gpu"]

"""The fused kernels: compiled on a GPU, in Triton's interpreter elsewhere, always against the float64 definitions."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from triton_here import DEVICE, mend_interpreter, needs_cuda, needs_triton

from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import cpu, get_transform, reference
from ssh_deploy.transforms.cuda import fused
from ssh_deploy.transforms.cuda.fused import Addend, Tile, add_batch, oriented, prepare, refusal, tile_of

pytestmark = needs_triton
NAMES = ["hartley", "hartley-joint", "cosine", "fourier"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    mend_interpreter(monkeypatch)


def spectra(name, shape, counts, seed=0):
    """An addend for each of ``counts`` coefficients, gain 0.5, 1.5, …, and the float64 ΔW of each."""
    rng, transform = np.random.default_rng(seed), get_transform(name)
    addends, exact = [], []
    for i, n in enumerate(counts):
        rows, cols, values = sparse_spectrum(rng, shape, n)
        spectrum = transform.separable(rows, cols, values, shape)
        addends.append(Addend(transform.axis, spectrum, 0.5 + i))
        if shape[0] * shape[1] < 5000:
            exact.append(reference.delta(name, rows, cols, values, shape, alpha=0.5 + i, norm="ortho"))
        else:
            exact.append(cpu.synthesis(shape, transform.axis, spectrum, gain=0.5 + i, dtype=np.float64))
    return addends, exact


def error(got, want):
    return float(np.linalg.norm(got.detach().cpu().double().numpy() - want) / np.linalg.norm(want))


def rounding(want, dtype):
    """What plain torch makes of ``want`` at best: its error when the exact numbers are rounded once."""
    return error(torch.from_numpy(want).to(torch.float32).to(dtype), want)


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (32, 47)) for name in NAMES), ("hartley", (16, 7)), ("hartley", (48, 1)), ("cosine", (512, 33))],
)
def test_a_batch_is_the_definition(name, shape):
    """Spectra of unlike density in one batch; every tile poisoned first, to see that it is written, not added to."""
    addends, exact = spectra(name, shape, (25, 1, 40))
    weights = [torch.full(shape, 3.0, device=DEVICE) for _ in addends]
    add_batch(prepare(shape, addends, device=DEVICE, dtype=torch.float32), weights)
    for weight, want in zip(weights, exact, strict=True):
        np.testing.assert_allclose(weight.cpu().numpy(), 3 + want, atol=2e-6 * max(1, np.abs(want).max()))


@pytest.mark.parametrize(
    "tile", [Tile(16, 8, 32), Tile(32, 8, 16), Tile(64, 8, 16), Tile(64, 16, 32, warps=16)], ids=str
)
def test_every_tile_gives_the_same(tile):
    addends, exact = spectra("cosine", (192, 37), (300,))
    weight = torch.zeros((192, 37), device=DEVICE)
    add_batch(prepare((192, 37), addends, device=DEVICE, dtype=torch.float32, tile=tile), [weight])
    assert error(weight, exact[0]) < 1e-6


def test_more_rows_than_one_step_of_the_first_product():
    """All 192 rows hold coefficients: a pair has more than K rows of the stage."""
    addends, exact = spectra("hartley", (192, 20), (600,))
    batch = prepare((192, 20), addends, device=DEVICE, dtype=torch.float32)
    assert int(batch.most) > batch.tile.k
    weight = torch.zeros((192, 20), device=DEVICE)
    add_batch(batch, [weight])
    assert error(weight, exact[0]) < 1e-6


@pytest.mark.parametrize("name", ["hartley", "cosine"])
def test_float16_is_rounded_once(name):
    addends, exact = spectra(name, (64, 48), (60,))
    weight = torch.zeros((64, 48), dtype=torch.float16, device=DEVICE)
    add_batch(prepare((64, 48), addends, device=DEVICE, dtype=torch.float16), [weight])
    assert error(weight, exact[0]) < 1.05 * rounding(exact[0], torch.float16)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_operands_of_bfloat16_keep_three_bits_more_than_it(scale):
    """The float16 products alone, into float32; values of any size, since each matrix is scaled to float16's range."""
    addends, exact = spectra("hartley", (64, 48), (200, 40))
    addends = [replace(a, gain=a.gain * scale) for a in addends]
    small = replace(prepare((64, 48), addends, device=DEVICE, dtype=torch.bfloat16), dtype=torch.float32)
    assert small.stage.dtype == torch.float16
    weights = [torch.zeros((64, 48), device=DEVICE) for _ in addends]
    add_batch(small, weights)
    for weight, want in zip(weights, exact, strict=True):
        assert 1e-5 < error(weight, want * scale) < rounding(want, torch.bfloat16) / 2


def test_bfloat16_weights():
    """Rounded to nearest on a GPU; Triton's interpreter truncates, which may be off by one step."""
    addends, exact = spectra("hartley", (64, 48), (60,))
    base = torch.randn((64, 48), generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = base.clone().to(DEVICE)
    add_batch(prepare((64, 48), addends, device=DEVICE, dtype=torch.bfloat16), [weight])
    want = base.double().numpy() + exact[0]
    step = 2.0 ** (np.floor(np.log2(np.abs(want).clip(1e-30))) - 7)
    off = np.abs(weight.cpu().double().numpy() - want)
    assert (off <= step * (1 if DEVICE == "cpu" else 0.5) + 1e-3 * np.abs(exact[0]).max()).all()


def test_only_the_weight_is_written():
    """Rows far apart, an odd address, columns beyond the last tile: what lies between stays NaN."""
    addends, exact = spectra("hartley", (32, 45), (50,))
    wide = torch.full((32, 100), torch.nan, device=DEVICE)
    wide[:, 3:48] = 1.0
    add_batch(prepare((32, 45), addends, device=DEVICE, dtype=torch.float32), [wide[:, 3:48]])
    np.testing.assert_allclose(wide[:, 3:48].cpu(), 1 + exact[0], atol=2e-6)
    assert wide[:, :3].isnan().all()
    assert wide[:, 48:].isnan().all()


def test_a_spectrum_of_zeros_changes_nothing():
    (addend,), _ = spectra("hartley", (32, 16), (9,))
    nothing = replace(addend, spectrum=replace(addend.spectrum, values=np.zeros_like(addend.spectrum.values)))
    weight = torch.ones((32, 16), device=DEVICE)
    add_batch(prepare((32, 16), [nothing], device=DEVICE, dtype=torch.float32), [weight])
    assert (weight == 1).all()


def test_long_rows_need_wide_products():
    """60,000 columns: the place in the table is a product beyond 32 bits."""
    transform, shape = get_transform("cosine"), (16, 60_000)
    rows, cols = np.array([3, 5]), np.array([59_999, 40_001])
    spectrum = transform.separable(rows, cols, np.array([1.0, -2.0]), shape)
    weight = torch.zeros(shape, device=DEVICE)
    tile = None if DEVICE == "cuda" else Tile(16, 8, 4096)  # the interpreter is slow by the program
    addend = Addend(transform.axis, spectrum, 1.0)
    add_batch(prepare(shape, [addend], device=DEVICE, dtype=torch.float32, tile=tile), [weight])
    want = cpu.synthesis(shape, transform.axis, spectrum, gain=1.0, dtype=np.float64)
    assert error(weight, want) < 1e-6


def test_what_the_kernels_do_not_take():
    (addend,), _ = spectra("hartley", (32, 16), (9,))
    assert refusal(torch.zeros(32, 16), addend) is None
    assert "float64" in refusal(torch.zeros(32, 16, dtype=torch.float64), addend)
    assert "contiguous" in refusal(torch.zeros(64, 32)[::2, ::2], addend)
    (odd,), _ = spectra("hartley", (33, 16), (9,))
    assert "16 does not divide a side of 33" in refusal(torch.zeros(33, 16), odd)
    assert refusal(torch.zeros(16, 33).T, odd) is None  # as its transpose, which has 16 rows
    (full,), _ = spectra("hartley", (16, 200), (2000,))
    assert "more than 64 coefficients" in refusal(torch.zeros(16, 200), full)
    unknown = replace(addend, axis=type("Wavelet", (), {"name": "wavelet"})())
    assert "wavelet" in refusal(torch.zeros(32, 16), unknown)


def test_without_triton(monkeypatch):
    (addend,), _ = spectra("hartley", (32, 16), (9,))
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert refusal(torch.zeros(32, 16), addend) == "triton is not installed"


def test_a_transposed_weight_is_the_transposed_problem():
    (addend,), (want,) = spectra("cosine", (40, 48), (30,))
    weight = torch.zeros((48, 40), device=DEVICE).T
    turned = oriented(weight)
    add_batch(prepare(tuple(turned.shape), [addend.turned], device=DEVICE, dtype=torch.float32), [turned])
    assert error(weight, want) < 1e-6


@pytest.mark.parametrize("m", [16, 48, 128, 512, 576, 768, 1024, 3072, 4096, 11008, 14336])
def test_tiles_divide_and_fit(m):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tile = tile_of(m, dtype)
        assert m % tile.p == 0
        assert tile.p * tile.b * tile.bn <= 16384
        assert min(tile.bn, 2 * tile.b) >= 16


_COMPILE = """
import os, subprocess, sys, tempfile, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ssh_deploy.transforms.cuda import kernels

def compiled(kernel, signature, constants, arch, warps):
    names = kernel.arg_names
    whole = {n: "constexpr" if n in constants else signature[n] for n in names}
    values = {(names.index(n),): v for n, v in constants.items()}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n not in constants and n != "offset"}
    source = ASTSource(kernel, signature=whole, constexprs=values, attrs=even)
    options = {"num_warps": warps, "num_stages": 2}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(done.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        use = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return done.asm["ptx"], use

def columns(arch, stage, dtype, tile, precision, warps=8):
    signature = dict.fromkeys(("pair_starts", "most", "local", "rows"), "*i32")
    signature |= dict.fromkeys(("n", "q", "row_stride"), "i32") | dict.fromkeys(("stage", "second", "first"), stage)
    signature |= {"weights": "*i64", "scales": "*fp32"}
    constants = dict(zip(("P", "B", "BN", "K"), tile)) | {"DTYPE": dtype, "ALIGNED": True, "PRECISION": precision}
    return compiled(kernels.add_columns, signature, constants, arch, warps)

for arch in (80, 90):
    ptx, use = columns(arch, "*fp16", tl.bfloat16, (64, 8, 32, 16), "ieee")
    assert "mma.sync" in ptx and "STACK:0" in use, (arch, use)
    assert arch == 80 or "wgmma" in ptx
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx
signature = dict.fromkeys(("starts", "cols"), "*i32") | dict.fromkeys(("n", "period"), "i32")
signature |= {"stage": "*fp16", "values": "*fp32", "table": "*fp32"}
for wide in (False, True):
    compiled(kernels.transform_rows, signature, {"STEP": 2, "OFFSET": 1, "WIDE": wide, "BN": 1024}, 90, 4)
print("compiled")
"""


def test_compiles_for_the_chips_without_one():
    """To machine code of sm_80 and sm_90: tensor cores, 16-byte accesses, no spills."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "compiled", done.stderr


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (768, 768), (576, 1536)])
@pytest.mark.parametrize("name", NAMES)
def test_error_is_within_twice_plain_torch(name, shape, dtype):
    """n = 1000 at real sizes: ΔW alone, and added to weights; against torch's FFT in float32, cast to ``dtype``."""
    from ssh_deploy.transforms import device

    addends, exact = spectra(name, shape, (1000, 700))
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for start in (torch.zeros(shape), base):
        ours = [start.to("cuda", dtype) for _ in addends]
        before = ours[0].cpu().double().numpy()
        add_batch(prepare(shape, addends, device="cuda", dtype=dtype), ours)
        for weight, addend, want in zip(ours, addends, exact, strict=True):
            plain = start.to("cuda", dtype)
            delta = device._plain(shape, addend, device="cuda", dtype=torch.float32)
            plain += delta.to(dtype)
            assert error(weight, before + want) <= 2 * error(plain, before + want)

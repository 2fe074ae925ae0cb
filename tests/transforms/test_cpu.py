"""The CPU path in blocks of rows: both first passes, threads, dtypes, layouts, memory."""

import multiprocessing
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import cpu, get_transform, reference, transform_names

sides = st.one_of(st.integers(1, 70), st.sampled_from([1, 2, 31, 64, 97]))


def spectrum_of(name, shape, n, seed=0):
    rows, cols, values = sparse_spectrum(np.random.default_rng(seed), shape, n)
    return get_transform(name).separable(rows, cols, values, shape), (rows, cols, values)


def definition(name, shape, parts):
    return reference.delta(name, *parts, shape, alpha=1.0, norm="ortho")


@settings(max_examples=60, deadline=None)
@given(m=sides, n=sides, count=st.integers(1, 60), name=st.sampled_from(transform_names()), threads=st.integers(1, 3))
def test_sums_of_few_coefficients_are_the_definition(m, n, count, name, threads):
    """No first pass is kept, blocks of 16 rows: what large matrices do."""
    spectrum, parts = spectrum_of(name, (m, n), count)
    with pytest.MonkeyPatch.context() as patch:
        for constant, value in (("_SMALL", 0), ("_KEPT", -1), ("_FEW", 1000), ("_BLOCK", 1)):
            patch.setattr(cpu, constant, value)
        made = []
        patch.setattr(cpu, "_Summed", lambda *args, kind=cpu._Summed: made.append(1) or kind(*args))
        got = cpu.synthesis((m, n), get_transform(name).axis, spectrum, gain=1.0, dtype=np.float64, threads=threads)
    layers = np.bincount(spectrum.cols).max()
    assert bool(made) == (layers <= cpu._LAYERS)
    np.testing.assert_allclose(got, definition(name, (m, n), parts), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(m=sides, n=sides, count=st.integers(1, 60), name=st.sampled_from(transform_names()), threads=st.integers(1, 3))
def test_many_coefficients_are_the_definition(m, n, count, name, threads):
    spectrum, parts = spectrum_of(name, (m, n), count)
    with pytest.MonkeyPatch.context() as patch:
        for constant, value in (("_SMALL", 0), ("_KEPT", -1), ("_FEW", 0), ("_BLOCK", 1)):
            patch.setattr(cpu, constant, value)
        got = cpu.synthesis((m, n), get_transform(name).axis, spectrum, gain=1.0, dtype=np.float64, threads=threads)
    np.testing.assert_allclose(got, definition(name, (m, n), parts), atol=1e-12)


def test_places_that_repeat_add_in_both_ways(monkeypatch):
    shape = (40, 30)
    rows, cols = np.array([3, 3, 3, 7, 7]), np.array([5, 5, 6, 5, 5])
    values = np.array([1.0, 2.0, -1.0, 0.5, 0.25])
    spectrum = get_transform("hartley").separable(rows, cols, values, shape)
    want = definition("hartley", shape, (rows, cols, values))
    monkeypatch.setattr(cpu, "_KEPT", -1)
    for small, few in ((0, 0), (0, 1000), (1 << 20, 0)):
        monkeypatch.setattr(cpu, "_SMALL", small)
        monkeypatch.setattr(cpu, "_FEW", few)
        got = cpu.synthesis(shape, get_transform("hartley").axis, spectrum, gain=1.0, dtype=np.float64)
        np.testing.assert_allclose(got, want, atol=1e-13)


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_rounded_once(dtype, threads, small, monkeypatch):
    """The sum in float32, rounded to nearest even: within half a step of the exact sum, and bit for bit ours."""
    monkeypatch.setattr(cpu, "_BLOCK", 64)
    monkeypatch.setattr(cpu, "_SMALL", small)
    shape = (70, 48)
    spectrum, parts = spectrum_of("cosine", shape, 60)
    axis = get_transform("cosine").axis
    weight = np.random.default_rng(1).normal(size=shape).astype(dtype)
    before = weight.copy()
    cpu.add_synthesis(weight, axis, spectrum, gain=1.0, threads=threads)
    added = before.astype(np.float32) + cpu.synthesis(shape, axis, spectrum, gain=1.0)
    np.testing.assert_array_equal(weight.view(np.uint16), added.astype(dtype).view(np.uint16))
    exact = before.astype(np.float64) + definition("cosine", shape, parts)
    step = {np.float16: 2.0**-10, ml_dtypes.bfloat16: 2.0**-7}[dtype]
    assert (np.abs(weight.astype(np.float64) - exact) <= 0.5 * step * np.maximum(np.abs(exact), 2**-6) + 1e-6).all()


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("layout", ["C", "F", "strided", "reversed"])
def test_any_layout_is_written_in_place(layout, small, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 64)
    monkeypatch.setattr(cpu, "_SMALL", small)
    shape = (50, 40)
    spectrum, parts = spectrum_of("hartley", shape, 30)
    whole = {
        "C": lambda: np.ones(shape),
        "F": lambda: np.ones(shape, order="F"),
        "strided": lambda: np.ones((100, 120))[::2, ::3],
        "reversed": lambda: np.ones(shape)[::-1, ::-1],
    }[layout]()
    cpu.add_synthesis(whole, get_transform("hartley").axis, spectrum, gain=-3.0)
    np.testing.assert_allclose(whole, 1 - 3 * definition("hartley", shape, parts), atol=1e-12)


@pytest.mark.parametrize("name", ["hartley", "cosine"])
@pytest.mark.parametrize(("shape", "n"), [((1024, 1536), 1000), ((1024, 1536), 60_000), ((96, 4096), 300)])
def test_float32_at_real_sizes(name, shape, n):
    """Both first passes as they are chosen by themselves, against the same transform in float64 by other means."""
    spectrum, (rows, cols, values) = spectrum_of(name, shape, n)
    axis = get_transform(name).axis
    dense = np.zeros(shape)
    dense[rows, cols] = values
    want = axis.inverse_cpu(axis.inverse_cpu(dense, 0), 1)
    weight = np.zeros(shape, np.float32)
    cpu.add_synthesis(weight, axis, spectrum, gain=1.0)
    assert np.abs(weight - want).max() <= 4e-7 * np.abs(want).max()


def test_blocks_are_even():
    assert cpu.block_rows((4096, 4096), 2) == 64
    assert cpu.block_rows((768, 768), 2) == 192  # four of them, not three for two threads
    assert cpu.block_rows((5, 1 << 20), 2) == 5
    assert cpu.block_rows((1, 1)) == 1


MEASURE = """
import numpy as np
from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import cpu, get_transform

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

shape = (4096, 4096)
t = get_transform("hartley")
rows, cols, values = sparse_spectrum(np.random.default_rng(0), shape, 1000)
weight = np.ones(shape, np.float32)
small = np.zeros((2048, 1024), np.float32)
cpu.add_synthesis(small, t.axis, t.separable(rows % 2048, cols % 1024, values, small.shape), gain=1.0, threads=2)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
cpu.add_synthesis(weight, t.axis, t.separable(rows, cols, values, shape), gain=1.0, threads=2)
print(peak() - before)
"""


def test_scratch_is_a_few_megabytes():
    """ΔW would be 67 MB."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12e6


def add_in_a_child(shape, queue):
    spectrum, _ = spectrum_of("hartley", shape, 20)
    queue.put(float(cpu.synthesis(shape, get_transform("hartley").axis, spectrum, gain=1.0, threads=2).sum()))


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(monkeypatch):
    """The parent's do not live in the child: to wait for them would be to wait for ever."""
    monkeypatch.setattr(cpu, "_BLOCK", 16)
    monkeypatch.setattr(cpu, "_SMALL", 0)
    shape = (64, 16)
    spectrum, _ = spectrum_of("hartley", shape, 20)
    want = float(cpu.synthesis(shape, get_transform("hartley").axis, spectrum, gain=1.0, threads=2).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=add_in_a_child, args=(shape, queue))
    child.start()
    try:
        assert queue.get(timeout=30) == pytest.approx(want)
    finally:
        child.kill()
        child.join()

"""The CPU path in blocks of rows: both first passes, lengths, threads, dtypes, layouts, memory."""

import multiprocessing
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.testing import sparse_spectrum
from ssh_deploy.transforms import cpu, get_transform, reference, row_plan, transform_names
from ssh_deploy.transforms.base import Separable

sides = st.one_of(st.integers(1, 70), st.sampled_from([1, 2, 31, 64, 97]))


def spectrum_of(name, shape, n, seed=0):
    rows, cols, values = sparse_spectrum(np.random.default_rng(seed), shape, n)
    return get_transform(name).separable(rows, cols, values, shape), (rows, cols, values)


def definition(name, shape, parts):
    return reference.delta(name, *parts, shape, alpha=1.0, norm="ortho")


@pytest.mark.parametrize("few", [0, 1000])
@settings(max_examples=60, deadline=None)
@given(m=sides, n=sides, count=st.integers(1, 60), name=st.sampled_from(transform_names()), threads=st.integers(1, 3))
def test_both_first_passes_are_the_definition(few, m, n, count, name, threads):
    """FFTs of the columns that hold anything (few = 0) and sums, in blocks of one transform: what large matrices do."""
    spectrum, parts = spectrum_of(name, (m, n), count)
    with pytest.MonkeyPatch.context() as patch:
        for constant, value in (("_ALONE", 0), ("_FEW", few), ("_BLOCK", 1)):
            patch.setattr(cpu, constant, value)
        passed = []
        patch.setattr(cpu, "_first_pass", lambda *args, kind=cpu._first_pass: passed.append(1) or kind(*args))
        got = cpu.synthesis((m, n), get_transform(name).axis, spectrum, gain=1.0, dtype=np.float64, threads=threads)
    assert bool(passed) == (few == 0 or row_plan.radices(n) is None)
    np.testing.assert_allclose(got, definition(name, (m, n), parts), atol=1e-12)


@pytest.mark.parametrize("few", [0, 1000])
def test_places_that_repeat_add(few, monkeypatch):
    shape = (40, 30)
    rows, cols = np.array([3, 3, 3, 7, 7]), np.array([5, 5, 6, 5, 5])
    values = np.array([1.0, 2.0, -1.0, 0.5, 0.25])
    spectrum = get_transform("hartley").separable(rows, cols, values, shape)
    monkeypatch.setattr(cpu, "_FEW", few)
    got = cpu.synthesis(shape, get_transform("hartley").axis, spectrum, gain=1.0, dtype=np.float64)
    np.testing.assert_allclose(got, definition("hartley", shape, (rows, cols, values)), atol=1e-13)


@pytest.mark.parametrize("columns", [30, 67])  # compiled, and a prime
@pytest.mark.parametrize("place", [(40, 0), (-1, 0), (0, 67), (0, -1)])
def test_a_coefficient_outside_is_refused_and_nothing_written(place, columns):
    rows, cols = np.array([1, place[0]]), np.array([2, place[1]])
    weight = np.ones((40, columns), np.float32)
    with pytest.raises(ValueError, match="outside of the matrix"):
        cpu.add_synthesis(weight, get_transform("hartley").axis, Separable(rows, cols, np.ones(2), 1.0), gain=1.0)
    assert (weight == 1).all()


@pytest.mark.parametrize("columns", [48, 47])  # whole vectors, and not
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_rounded_once(dtype, threads, columns, monkeypatch):
    """The sum in float32, rounded to nearest even: within half a step of the exact sum, and bit for bit ours."""
    monkeypatch.setattr(cpu, "_BLOCK", 64)
    monkeypatch.setattr(cpu, "_ALONE", 0)
    shape = (70, columns)
    spectrum, parts = spectrum_of("cosine", shape, 60)
    axis = get_transform("cosine").axis
    weight = np.random.default_rng(1).normal(size=shape).astype(dtype)
    before = weight.copy()
    cpu.add_synthesis(weight, axis, spectrum, gain=1.0, threads=threads)
    added = before.astype(np.float32) + cpu.synthesis(shape, axis, spectrum, gain=1.0, threads=threads)
    np.testing.assert_array_equal(weight.view(np.uint16), added.astype(dtype).view(np.uint16))
    exact = before.astype(np.float64) + definition("cosine", shape, parts)
    step = {np.float16: 2.0**-10, ml_dtypes.bfloat16: 2.0**-7}[dtype]
    assert (np.abs(weight.astype(np.float64) - exact) <= 0.5 * step * np.maximum(np.abs(exact), 2**-6) + 1e-6).all()


@pytest.mark.parametrize("alone", [0, 1 << 20])
@pytest.mark.parametrize("layout", ["C", "F", "strided", "reversed"])
def test_any_layout_is_written_in_place(layout, alone, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 64)
    monkeypatch.setattr(cpu, "_ALONE", alone)
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


def test_blocks_are_whole_transforms_and_some_for_each_thread():
    assert cpu.block_rows((4096, 4096), 2) == 64
    assert cpu.block_rows((768, 768), 1) == 320
    assert cpu.block_rows((768, 768), 2) == 96
    assert cpu.block_rows((100, 1 << 20), 2) == 32
    assert cpu.block_rows((5, 1 << 20), 2) == 5
    assert cpu.block_rows((1, 1)) == 1


def test_what_fails_in_a_thread_is_raised_and_nobody_writes_afterwards(monkeypatch):
    monkeypatch.setattr(cpu, "_ALONE", 0)
    monkeypatch.setattr(cpu, "_BLOCK", 1)
    spectrum, _ = spectrum_of("hartley", (320, 16), 20)
    seen = threading.Event()

    def fail(self, target, start, scratch):
        if threading.current_thread() is threading.main_thread():
            seen.wait(10)  # the other one has begun
        else:
            seen.set()
            raise MemoryError("no room")

    monkeypatch.setattr(cpu.RowSynthesis, "add", fail)
    with pytest.raises(MemoryError, match="no room"):
        cpu.add_synthesis(np.zeros((320, 16)), get_transform("hartley").axis, spectrum, gain=1.0, threads=2)


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
    monkeypatch.setattr(cpu, "_ALONE", 0)
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

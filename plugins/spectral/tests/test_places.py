"""Places from a seed against `torch.randperm`, bit for bit."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssh_deploy_spectral import places
from ssh_deploy_spectral.places import LARGE, drawn_places

SEEDS = [0, 777, 2**31, 2**32 - 1, 2**32 + 5, 2**40, 2**63 + 3, 2**64 - 1, -1, -777, -(2**63)]


def drawn_by_torch(size, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 624, 625, 48 * 80, 97 * 101, 768 * 768])
def test_places_are_torchs(size, seed):
    want = drawn_by_torch(size, seed)
    for n in {0, 1, min(5, size), min(1000, size)}:
        np.testing.assert_array_equal(drawn_places(size, n, seed), want[:n])


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64 - 1))
def test_whole_permutations_are_torchs(size, seed):
    np.testing.assert_array_equal(drawn_places(size, size, seed), drawn_by_torch(size, seed))


@pytest.mark.parametrize(("size", "n"), [(1, 1), (50, 7), (50, 50), (1000, 3)])
def test_the_form_for_large_sizes_is_the_shuffle_it_says(monkeypatch, size, n):
    """Written out step by step; chunks of 16 so that they meet."""
    monkeypatch.setattr(places, "_CHUNK", 16)
    draw = np.random.RandomState(777)
    halves = [int(draw.randint(0, 1 << 32, dtype=np.uint32)) for _ in range(2 * size)]
    want = [0] * size
    for i in range(size):
        z = (halves[2 * i] << 32 | halves[2 * i + 1]) % (i + 1)
        want[i] = want[z]
        want[z] = i
    assert sorted(want) == list(range(size))
    np.testing.assert_array_equal(places._inside_out(places._mt19937(777), size, n), want[:n])


@pytest.mark.slow
def test_from_torchs_limit_on_places_are_torchs():
    """A weight of 15,000 squared; torch takes a minute and 1.7 GB for it. (One number below the limit agrees too.)"""
    np.testing.assert_array_equal(drawn_places(LARGE, 1000, 777), drawn_by_torch(LARGE, 777)[:1000])


def test_places_are_kept_and_cannot_be_changed():
    first = drawn_places(100, 10, 3)
    assert drawn_places(100, 10, 3) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_reading_needs_no_torch():
    code = "import sys, ssh_deploy_spectral.fourierft as f; f.drawn_places(60, 5, 1); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""Places that PEFT draws with `torch.randperm` from a seed, to the bit and without torch.

FourierFT and WaveFT files hold values only. Their places are ``randperm(out·in, generator=manual_seed(seed))[:n]``,
so whoever reads such a file must draw the same numbers: torch's CPU generator is MT19937 (Matsumoto, Nishimura 1998)
seeded with the low 32 bits, and its permutation is one of two shuffles, by size.

Below `LARGE` numbers it is Fisher and Yates' from the front: step i swaps i with i + r mod (size − i), so the first n
places need n draws, however large the weight. From `LARGE` on it is their inside-out form on 64-bit numbers: step i
puts i at z = r mod (i+1) and what was there at i. There place p < n ends up with the last i that hit it, so all
``size`` draws must be looked at; it takes seconds where torch also needs gigabytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGE = 0xFFFFFFFF // 20  # torch's own limit: modulo bias of 32-bit numbers grows with the size
_CHUNK = 1 << 20


@lru_cache(maxsize=64)
def drawn_places(size: int, n: int, seed: int) -> NDArray[np.int64]:
    """``torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n]``, int64 [n], read-only.

    ``0 ≤ n ≤ size``, ``−2⁶³ ≤ seed < 2⁶⁴``, as torch has them.
    """
    generator = _mt19937(seed)
    places = _front(generator, size, n) if size < LARGE else _inside_out(generator, size, n)
    places.setflags(write=False)
    return places


def _mt19937(seed: int) -> np.random.MT19937:
    """As torch has it: the classic initialisation, where `np.random.MT19937(seed)` would hash the seed first."""
    state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
    generator = np.random.MT19937()
    generator.state = state
    return generator


def _front(generator: np.random.MT19937, size: int, n: int) -> NDArray[np.int64]:
    steps = np.arange(n, dtype=np.uint64)
    others = (steps + generator.random_raw(steps.size) % (np.uint64(size) - steps)).tolist()
    moved: dict[int, int] = {}  # what the swaps so far put where, of a list that starts as 0, 1, 2, …
    places = []
    for i, other in enumerate(others):
        places.append(moved.get(other, other))
        moved[other] = moved.get(i, i)
    return np.array(places, dtype=np.int64)


def _inside_out(generator: np.random.MT19937, size: int, n: int) -> NDArray[np.int64]:
    places = np.zeros(n, dtype=np.int64)
    for start in range(0, size, _CHUNK):
        steps = np.arange(start, min(start + _CHUNK, size), dtype=np.uint64)
        halves = generator.random_raw(2 * steps.size)
        hits = ((halves[::2] << np.uint64(32)) | halves[1::2]) % (steps + np.uint64(1))
        for k in np.flatnonzero(hits < n).tolist():  # few: n·(1 + ln(size/n)) of all
            i, z = start + k, int(hits[k])
            if i < n:
                places[i] = places[z]
            places[z] = i
    return places

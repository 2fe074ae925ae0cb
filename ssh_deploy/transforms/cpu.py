"""The sparse inverse transform on the CPU, row block by row block, added straight into W: no ΔW is ever in memory.

``ΔW = F_Mᵀ S F_N`` has two passes. The first, along M, is needed only in the columns of S that hold coefficients (at
most n of N). The second, along N, runs over blocks of rows, so that W is read and written in the order it lies in.
Threads take block after block, each with scratch of its own that fits its cache.

* Few coefficients a column: a block's part of the first pass is their sum by definition, ``Re(w_k e^{−iθ_k j})`` in
  row j. Many: FFTs of all those columns once, kept for the blocks.
* Sums and the second pass are compiled (`transforms.compiled`) and read and write W's own numbers. Where that cannot
  be, FFTs and numpy do the work or a part of it: lengths with a prime factor above 64, columns that lie apart, rows in
  half precision that are no whole number of vectors.

FFTs are ducc0's. A weight that lies transposed in memory is the transposed problem: ``ΔWᵀ = F_Nᵀ Sᵀ F_M``.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms import row_plan
from ssh_deploy.transforms.base import Axis, Index, Separable
from ssh_deploy.transforms.compiled import ROWS, write_rows
from ssh_deploy.transforms.vectors import LANES, kind_of

_BLOCK = 1 << 18  # elements of a block: 1 MB of float32
_PAD = 16  # elements between rows: rows 2^k bytes apart share their cache lines, and FFTs take three times as long
_ALONE = 1 << 20  # elements of a matrix that one thread has done before another is awake and in step
_FEW = 8  # coefficients a column up to which sums are cheaper than an FFT, or as cheap


def add_synthesis(weight: NDArray[Any], axis: Axis, spectrum: Separable, *, gain: float, threads: int = 0) -> None:
    """``weight += gain · factor · F_Mᵀ S F_N``, in place.

    Args:
        weight: [M, N], any strides. float64 is summed in float64, all else in float32 and rounded once.
        axis: the 1-D kernel ``F``.
        spectrum: separable coefficients; rows below M, columns below N.
        gain: factor on the orthonormal synthesis.
        threads: 0 = all cores.

    Raises:
        ValueError: a coefficient lies outside of the matrix.
    """
    if spectrum.rows.size == 0:
        return
    if abs(weight.strides[0]) < abs(weight.strides[1]):
        weight, spectrum = weight.T, transposed(spectrum)
    work = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
    alone = weight.size <= _ALONE
    threads = 1 if alone else threads or cores()
    step = weight.shape[0] if alone else block_rows(weight.shape, threads)
    rows = RowSynthesis(weight.shape, axis, spectrum, gain=gain, rows=step, dtype=work, threads=threads)
    starts = iter(range(0, weight.shape[0], step))  # whoever is free takes the next

    def add() -> None:
        scratch = rows.scratch()
        for start in starts:
            rows.add(weight[start : start + step], start, scratch)

    helpers = [pool(threads).submit(add) for _ in range(threads - 1)]
    try:
        add()
    finally:  # whatever happened here, nobody writes into W afterwards
        for helper in helpers:
            helper.result()


@lru_cache(maxsize=4)
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: what a new one allocates is new pages, and to fault them in takes a quarter of the time."""
    return ThreadPoolExecutor(threads, thread_name_prefix="synthesis")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a forked child has none of them


def synthesis(
    shape: tuple[int, int], axis: Axis, spectrum: Separable, *, gain: float, dtype: Any = np.float32, threads: int = 0
) -> NDArray[Any]:
    """``gain · factor · F_Mᵀ S F_N`` as a new array [M, N] of ``dtype`` (float32 or float64)."""
    out = np.zeros(shape, dtype=dtype)
    add_synthesis(out, axis, spectrum, gain=gain, threads=threads)
    return out


def transposed(spectrum: Separable) -> Separable:
    """Sᵀ."""
    return Separable(spectrum.cols, spectrum.rows, spectrum.values, spectrum.factor)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def block_rows(shape: tuple[int, int], threads: int = 1) -> int:
    """Rows of [M, N] to handle at once: whole compiled transforms, few enough to stay in the cache.

    Each of ``threads`` gets four at least, so that one that begins late leaves more to the others.
    """
    most = max(1, _BLOCK // max(1, shape[1] * ROWS))
    own = -(-shape[0] // (ROWS * (4 * threads if threads > 1 else 1)))
    return min(shape[0], ROWS * max(1, min(most, own)))


@dataclass(slots=True, eq=False)
class Scratch:
    """One thread's own memory: what the second pass works in, and, where it is asked for, the block [rows, N]."""

    work: NDArray[Any]
    block: NDArray[Any] | None = None


class RowSynthesis:
    """``gain · factor · F_Mᵀ S F_N``, made in blocks of rows where and when they are asked for.

    Several threads may ask at once, each with its own `scratch`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        axis: Axis,
        spectrum: Separable,
        *,
        gain: float,
        rows: int,
        dtype: Any = np.float32,
        threads: int = 1,
    ) -> None:
        """Prepare for blocks of at most ``rows`` rows of ``dtype`` float32 or float64; ``threads``: of this alone.

        Raises:
            ValueError: a coefficient lies outside of the matrix.
        """
        self.shape, self._axis, self._rows, self._dtype = shape, axis, rows, np.dtype(dtype)
        self._plan = row_plan.plan_of(axis, shape[1], self._dtype)
        if self._plan is not None:
            sums = row_plan.sums(shape, axis, spectrum, gain, self._dtype)
            if spectrum.values.size <= _FEW * sums.held.size:
                self._columns = sums
                return
            gain /= 2  # of `row_plan.kept`
        self._held, self._stage = _first_pass(shape, axis, spectrum, gain, self._dtype, threads)
        if self._plan is not None:
            self._columns = row_plan.kept(self._held, self._stage)

    def scratch(self) -> Scratch:
        """Memory for one thread."""
        if self._plan is None:
            return Scratch(np.zeros(self.shape[1] * self._rows, self._dtype))
        return Scratch(row_plan.aligned(row_plan.scratch_size(self._plan), self._dtype))

    def block(self, start: int, count: int, scratch: Scratch) -> NDArray[Any]:
        """Rows ``start`` to ``start + count``, [count, N]; lies in ``scratch`` and holds until the next call."""
        if scratch.block is None:
            side = self.shape[1]
            pad = _PAD if self._plan is None else 0
            scratch.block = row_plan.aligned(self._rows * (side + pad), self._dtype).reshape(-1, side + pad)[:, :side]
        block = scratch.block[:count]
        if self._plan is None:
            coefficients = scratch.work.reshape(self.shape[1], -1)[:, :count]
            coefficients[self._held] = self._stage[:, start : start + count]
            return self._axis.inverse_cpu(coefficients.T, 1, threads=1, out=block)
        self._write(block, start, scratch, add=False)
        return block

    def add(self, target: NDArray[Any], start: int, scratch: Scratch) -> None:
        """``target`` [count, N] += rows ``start`` to ``start + count``, rounded once to its dtype."""
        if self._plan is not None and self._reads(target):
            self._write(target, start, scratch, add=True)
        elif target.dtype == self._dtype:
            target += self.block(start, target.shape[0], scratch)
        else:
            target[:] = self.block(start, target.shape[0], scratch) + target.astype(self._dtype)

    def _reads(self, target: NDArray[Any]) -> bool:
        """Whether compiled code can add to ``target``: rows of its own kind of numbers, one after another."""
        own = target.dtype == self._dtype or (kind_of(target.dtype) and target.shape[1] % LANES == 0)
        return bool(own and target.flags.c_contiguous and target.flags.aligned)

    def _write(self, target: NDArray[Any], start: int, scratch: Scratch, *, add: bool) -> None:
        kind = kind_of(target.dtype)
        flat = (target.view(np.uint16) if kind else target).reshape(-1)
        write_rows(flat, start, add, kind, self._columns, self._plan, scratch.work)


def _first_pass(
    shape: tuple[int, int], axis: Axis, spectrum: Separable, gain: float, dtype: np.dtype[Any], threads: int
) -> tuple[Index, NDArray[Any]]:
    """The columns that hold coefficients, and all of their rows by FFT: [held, M and at least a transform's more]."""
    for places, end in ((spectrum.rows, shape[0]), (spectrum.cols, shape[1])):
        if places.min() < 0 or places.max() >= end:
            raise ValueError("A coefficient lies outside of the matrix.")
    values = spectrum.values.astype(np.float64) * (gain * spectrum.factor)
    holds = np.zeros(shape[1], dtype=bool)
    holds[spectrum.cols] = True
    held = np.flatnonzero(holds)
    stage = np.zeros((held.size, shape[0] + ROWS + _PAD), dtype)
    rows = stage[:, : shape[0]]
    np.add.at(rows, (np.searchsorted(held, spectrum.cols), spectrum.rows), values.astype(dtype))
    axis.inverse_cpu(rows, 1, threads=threads)
    return held, stage

"""The sparse inverse transform on the CPU, row block by row block, added straight into W: no ΔW is ever in memory.

``ΔW = F_Mᵀ S F_N`` has two passes. The first, along M, is needed only in the columns of S that hold coefficients (at
most n of N). The second, along N, runs over blocks of rows, so that W is read and written in the order it lies in,
by several threads, each with its own block in the cache. A block's part of the first pass comes from one of two:

* few coefficients: their sum by definition, ``F[k, j] = Re(w_k e^{−iθ_k j})``, where the turn to the block's first row
  is one factor a coefficient and the turns within a block are the same for all: three multiply-adds each, no memory;
* many of them: FFTs of all those columns once, kept for the blocks.

A small matrix is transformed whole: it is in the cache as it is. Nothing that was measured against its two FFTs at 768²
and n = 1000 is worth its code: the stages of `Axis.two_stage`, the inner ones on the coefficients alone (a product for
each pair of blocks), take 0.9 to 1.1 of their time; rows of ``F_N`` summed in place of one FFT, 1.1 to 1.4.

FFTs are ducc0's. A weight that lies transposed in memory is the transposed problem: ``ΔWᵀ = F_Nᵀ Sᵀ F_M``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms.base import Axis, Float, Index, Separable

_BLOCK = 1 << 18  # elements of a block: 1 MB of float32, in and out of its FFTs
_LEAST = 16  # rows of a block: as many as ducc0 takes through one FFT at once
_PAD = 16  # elements between rows: rows 2^k bytes apart share their cache lines, and FFTs take three times as long
_SMALL = 1 << 20  # elements of a matrix that is transformed whole
_KEPT = 1 << 20  # numbers of a first pass that is kept whole in any case
_FEW = 4  # coefficients a column up to which sums are cheaper than an FFT, or as cheap
_LAYERS = 16  # most coefficients in one column for sums


def add_synthesis(weight: NDArray[Any], axis: Axis, spectrum: Separable, *, gain: float, threads: int = 0) -> None:
    """``weight += gain · factor · F_Mᵀ S F_N``, in place.

    Args:
        weight: [M, N], any strides. float64 is summed in float64, all else in float32 and rounded once.
        axis: the 1-D kernel ``F``.
        spectrum: separable coefficients; rows below M, columns below N (checked by whoever read the file).
        gain: factor on the orthonormal synthesis.
        threads: 0 = all cores.
    """
    if spectrum.rows.size == 0:
        return
    if abs(weight.strides[0]) < abs(weight.strides[1]):
        weight, spectrum = weight.T, transposed(spectrum)
    work = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
    threads = threads or cores()
    if weight.size <= _SMALL:
        whole = _whole(weight.shape, axis, spectrum, gain, work, threads)
        if weight.dtype == work:
            weight += whole
        else:
            weight[:] = weight.astype(work) + whole
        return
    step = block_rows(weight.shape, threads)
    rows = RowSynthesis(weight.shape, axis, spectrum, gain=gain, rows=step, dtype=work, threads=threads)
    starts = range(0, weight.shape[0], step)

    def add(mine: Iterable[int], scratch: Scratch) -> None:
        for start in mine:
            target = weight[start : start + step]
            if target.dtype == work:
                target += rows.block(start, target.shape[0], scratch)
            else:
                target[:] = rows.block(start, target.shape[0], scratch) + target.astype(work)

    shares = [starts[i::threads] for i in range(min(threads, len(starts)))]
    own = [rows.scratch() for _ in shares]
    if len(shares) == 1:
        add(shares[0], own[0])
    else:
        list(pool(threads).map(add, shares, own))


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


def _whole(
    shape: tuple[int, ...], axis: Axis, spectrum: Separable, gain: float, dtype: np.dtype[Any], threads: int
) -> NDArray[Any]:
    """All of ``gain · factor · F_Mᵀ S F_N``."""
    whole = np.zeros((shape[0], shape[1] + _PAD), dtype)[:, : shape[1]]
    values = spectrum.values.astype(np.float64) * (gain * spectrum.factor)
    np.add.at(whole, (spectrum.rows, spectrum.cols), values.astype(dtype))
    return axis.inverse_cpu(axis.inverse_cpu(whole, 0, threads=threads), 1, threads=threads)


def transposed(spectrum: Separable) -> Separable:
    """Sᵀ."""
    return Separable(spectrum.cols, spectrum.rows, spectrum.values, spectrum.factor)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def block_rows(shape: tuple[int, int], threads: int = 1) -> int:
    """Rows of [M, N] to handle at once, so that they stay in the cache, and each of ``threads`` gets as many blocks."""
    most = max(_LEAST, _BLOCK // max(1, shape[1]))
    rounds = -(-shape[0] // (most * threads))
    return min(shape[0], max(_LEAST, -(-shape[0] // (rounds * threads))))


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """One thread's own memory: ``coefficients`` [N, rows] and the block they become, [rows, N] with padded rows."""

    coefficients: NDArray[Any]
    block: NDArray[Any]
    terms: NDArray[Any]


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
        """Prepare for blocks of at most ``rows`` rows of ``dtype`` float32 or float64; ``threads``: of this alone."""
        self.shape, self._axis, self._rows, self._dtype = shape, axis, rows, np.dtype(dtype)
        values = spectrum.values.astype(np.float64) * (gain * spectrum.factor)
        holds = np.zeros(shape[1], dtype=bool)
        holds[spectrum.cols] = True
        held = np.flatnonzero(holds)
        few = held.size * shape[0] > _KEPT and values.size <= _FEW * held.size
        layers = _layers(spectrum.cols) if few else []
        self._first: _Summed | _Transformed
        if few and len(layers) <= _LAYERS:
            self._first = _Summed(shape[0], axis, spectrum, values, layers, rows, self._dtype)
        else:
            self._first = _Transformed(shape[0], axis, spectrum, values, held, self._dtype, threads)

    def scratch(self) -> Scratch:
        """Memory for one thread."""
        side, rows = self.shape[1], self._rows
        return Scratch(
            np.zeros((side, rows), self._dtype),
            np.empty((rows, side + _PAD), self._dtype)[:, :side],
            np.empty((2, *self._first.terms, rows), self._dtype),
        )

    def block(self, start: int, count: int, scratch: Scratch) -> NDArray[Any]:
        """Rows ``start`` to ``start + count``, [count, N]; lies in ``scratch`` and holds until the next call."""
        coefficients = scratch.coefficients[:, :count]
        self._first.write(coefficients, start, scratch.terms[:, :, :count])
        return self._axis.inverse_cpu(coefficients.T, 1, threads=1, out=scratch.block[:count])


class _Transformed:
    """The first pass by FFTs of the columns that hold coefficients, kept whole: [held, M]."""

    terms = (0,)

    def __init__(
        self, m: int, axis: Axis, spectrum: Separable, values: Float, held: Index, dtype: np.dtype[Any], threads: int
    ) -> None:
        self._held = held
        stage = np.zeros((held.size, m + _PAD), dtype)[:, :m]
        np.add.at(stage, (np.searchsorted(held, spectrum.cols), spectrum.rows), values.astype(dtype))
        self._stage = axis.inverse_cpu(stage, 1, threads=threads)

    def write(self, out: NDArray[Any], start: int, terms: NDArray[Any]) -> None:
        """Put rows from ``start`` on into ``out`` [N, rows]; what no coefficient reaches is left alone."""
        del terms
        out[self._held] = self._stage[:, start : start + out.shape[1]]


class _Summed:
    """The first pass as a sum over coefficients, ``Re(a_k e^{−iθ_k j})`` in row ``start + j``, nothing kept."""

    def __init__(
        self,
        m: int,
        axis: Axis,
        spectrum: Separable,
        values: Float,
        layers: list[Index],
        rows: int,
        dtype: np.dtype[Any],
    ) -> None:
        order = np.concatenate(layers)
        u = spectrum.rows[order]
        self._u, self._cols = u, [spectrum.cols[layer] for layer in layers]
        period = axis.period(m)
        self._roots = np.exp((-2j * np.pi / period) * np.arange(period))
        self._weights = values[order] * axis.weights(m)[u]
        turns = np.ones((u.size, rows), np.complex128)
        done = 1
        while done < rows:  # e^{−iθ(j+2ᵏ)} = e^{−iθj}·e^{−iθ2ᵏ}: a rounding for each doubling
            more = min(done, rows - done)
            turns[:, done : done + more] = turns[:, :more] * self._roots[u * done % period][:, None]
            done += more
        self._cos, self._sin = turns.real.astype(dtype), turns.imag.astype(dtype)
        self.terms = (u.size,)

    def write(self, out: NDArray[Any], start: int, terms: NDArray[Any]) -> None:
        """See `_Transformed.write`; ``terms`` [2, n, rows] is scratch."""
        first = self._weights * self._roots[self._u * start % self._roots.size]
        sums, sines = terms
        count = out.shape[1]
        np.multiply(self._cos[:, :count], first.real.astype(out.dtype)[:, None], out=sums)
        np.multiply(self._sin[:, :count], first.imag.astype(out.dtype)[:, None], out=sines)
        np.subtract(sums, sines, out=sums)
        end = 0
        for layer, cols in enumerate(self._cols):
            begin, end = end, end + cols.size
            if layer == 0:
                out[cols] = sums[begin:end]
            else:
                out[cols] += sums[begin:end]


def _layers(cols: Index) -> list[Index]:
    """Numbers of the coefficients in groups that name each column once; the first group names all that are held."""
    order = np.argsort(cols, kind="stable")
    ordered = cols[order]
    begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    nth = np.arange(cols.size) - np.repeat(begins, np.diff(np.r_[begins, cols.size]))
    order = order[np.argsort(nth, kind="stable")]
    return np.split(order, np.cumsum(np.bincount(nth))[:-1])

"""Rows of ``ΔW = F_Mᵀ S F_N`` out of coefficients, compiled: both passes, 32 rows at a time.

A row is ``F_Nᵀ y`` with y real, which is the real part of a Fourier transform: ``Re Σ_k w_k y_k e^{−iθjk}``
(transforms.base). It is made real altogether by half of ``w_k y_k`` in place k and half of its conjugate in place n−k;
then two rows share one complex transform, the one as its real, the other as its imaginary part. Sixteen such pairs go
through it side by side, a vector in each place, so that no step reaches across lanes; only what comes out is turned,
16×16 at a time, on its way to the rows of W.

The transform is Cooley and Tukey's (1965), decimated in time and in place: coefficients are put where the reversed
digits of their frequency say, and nothing else is permuted. Its first stages are taken a part at a time that fits the
first cache; of the last one, what fits is turned and written before the rest is computed.

Numba compiles all this at first use and keeps it beside this file or in the user's cache. A function too long to become
part of its caller is not called in an inner loop: every array that is handed over is counted, which takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ssh_deploy.transforms.vectors import LANES, LINE, TILE, every, expect, load, load_back, read, store, turn, write

ROWS = 2 * LANES  # of one transform
PLACE = 2 * LANES  # numbers of a place: real parts, then imaginary ones


def _jit(function: Callable[..., Any]) -> Any:
    """Compiled at first use, without the interpreter's lock; kept on disk where there is a place to keep it."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return njit(**options)(function)


class Columns(NamedTuple):
    """Columns of ``F_Mᵀ S`` that hold anything, as sums by definition or as they are.

    Coefficient ``k`` of column ``h`` (``runs[h] <= k < runs[h + 1]``) is ``Re(weights_k · e^{−iθ_k j})`` in row j,
    ``θ_k = 2π u_k / P``. In the rows l + ½ after and before a middle, `LANES` each, that is ``Re(c · e^{∓iθ(l+½)})``:
    the same two products, once added and once subtracted. Complex numbers are two arrays, the real parts first, filled
    up to whole vectors.
    """

    held: Any  # int64 [columns]
    kept: Any  # [columns · stride]: the columns' rows, or empty: sums
    stride: int
    runs: Any  # int64 [columns + 1]
    u: Any  # int64 [k]
    weights: Any  # float64 [2, k]
    steps: Any  # float64 [2, k], e^{−iθ_k · ROWS}
    roots: Any  # complex128 [2P], e^{−πi/P} to every power
    turns: Any  # [M, 2, LANES], cos and sin of θ (l+½) for every u


class Plan(NamedTuple):
    """The transform of one length and axis."""

    places: Any  # int64 [n]: where frequency k goes, in z
    order: Any  # int64 [n and up to LANES more]: where column j comes from
    weights: Any  # [n, 2], half of w_k
    stages: Any  # int64 [stages, 4]: radix, places before, where in ``turns`` its factors and an odd radix's roots are
    turns: Any
    inner: int  # the first stages are those of parts of so many places
    own: int  # places that an odd radix needs
    blended: bool  # the last stage may be written as it comes: radix 4, whole tiles, columns in order


@_jit
def _radix2(z: Any, begin: int, end: int, s: int, turns: Any, at: int) -> None:
    for group in range(begin, end, 2 * s):
        for j in range(s):
            t = at + 2 * j
            a = (group + j) * PLACE
            b = a + s * PLACE
            ar, ai, xr, xi = load(z, a), load(z, a + LANES), load(z, b), load(z, b + LANES)
            br, bi = xr * every(turns, t) - xi * every(turns, t + 1), xr * every(turns, t + 1) + xi * every(turns, t)
            store(z, a, ar + br)
            store(z, a + LANES, ai + bi)
            store(z, b, ar - br)
            store(z, b + LANES, ai - bi)


@_jit
def _radix4(z: Any, begin: int, end: int, s: int, turns: Any, at: int, first: int, last: int) -> None:
    """Of each group those ``first`` to ``last`` of s."""
    for group in range(begin, end, 4 * s):
        for j in range(first, last):
            t = at + 6 * j
            a = (group + j) * PLACE
            b, c, d = a + s * PLACE, a + 2 * s * PLACE, a + 3 * s * PLACE
            ar, ai, xr, xi = load(z, a), load(z, a + LANES), load(z, b), load(z, b + LANES)
            br, bi = xr * every(turns, t) - xi * every(turns, t + 1), xr * every(turns, t + 1) + xi * every(turns, t)
            xr, xi = load(z, c), load(z, c + LANES)
            cr, ci = (
                xr * every(turns, t + 2) - xi * every(turns, t + 3),
                xr * every(turns, t + 3) + xi * every(turns, t + 2),
            )
            xr, xi = load(z, d), load(z, d + LANES)
            dr, di = (
                xr * every(turns, t + 4) - xi * every(turns, t + 5),
                xr * every(turns, t + 5) + xi * every(turns, t + 4),
            )
            pr, pi, qr, qi = ar + cr, ai + ci, ar - cr, ai - ci
            ur, ui, vr, vi = br + dr, bi + di, br - dr, bi - di
            store(z, a, pr + ur)
            store(z, a + LANES, pi + ui)
            store(z, b, qr + vi)
            store(z, b + LANES, qi - vr)
            store(z, c, pr - ur)
            store(z, c + LANES, pi - ui)
            store(z, d, qr - vi)
            store(z, d + LANES, qi + vr)


@_jit
def _radix3(z: Any, begin: int, end: int, s: int, turns: Any, at: int, roots: int) -> None:
    cos, sin = every(turns, roots + 2), every(turns, roots + 3)
    for group in range(begin, end, 3 * s):
        for j in range(s):
            t = at + 4 * j
            a = (group + j) * PLACE
            b, c = a + s * PLACE, a + 2 * s * PLACE
            ar, ai, xr, xi = load(z, a), load(z, a + LANES), load(z, b), load(z, b + LANES)
            br, bi = xr * every(turns, t) - xi * every(turns, t + 1), xr * every(turns, t + 1) + xi * every(turns, t)
            xr, xi = load(z, c), load(z, c + LANES)
            cr, ci = (
                xr * every(turns, t + 2) - xi * every(turns, t + 3),
                xr * every(turns, t + 3) + xi * every(turns, t + 2),
            )
            ur, ui, vr, vi = br + cr, bi + ci, (br - cr) * sin, (bi - ci) * sin
            pr, pi = ar + ur * cos, ai + ui * cos
            store(z, a, ar + ur)
            store(z, a + LANES, ai + ui)
            store(z, b, pr + vi)
            store(z, b + LANES, pi - vr)
            store(z, c, pr - vi)
            store(z, c + LANES, pi + vr)


@_jit
def _radix_odd(z: Any, begin: int, end: int, p: int, s: int, turns: Any, at: int, roots: int, own: Any) -> None:
    """Any odd p, by pairs k and p−k: sums go with cosines, differences with sines. ``own``: p places of scratch."""
    half = p // 2
    for group in range(begin, end, p * s):
        for j in range(s):
            t = at + 2 * (p - 1) * j
            a = (group + j) * PLACE
            ar, ai = load(z, a), load(z, a + LANES)
            tr, ti = ar, ai
            for k in range(1, half + 1):
                b, c = a + k * s * PLACE, a + (p - k) * s * PLACE
                x, y = t + 2 * (k - 1), t + 2 * (p - k - 1)
                xr, xi, yr, yi = load(z, b), load(z, b + LANES), load(z, c), load(z, c + LANES)
                br, bi = (
                    xr * every(turns, x) - xi * every(turns, x + 1),
                    xr * every(turns, x + 1) + xi * every(turns, x),
                )
                cr, ci = (
                    yr * every(turns, y) - yi * every(turns, y + 1),
                    yr * every(turns, y + 1) + yi * every(turns, y),
                )
                o = 2 * (k - 1) * PLACE
                store(own, o, br + cr)
                store(own, o + LANES, bi + ci)
                store(own, o + PLACE, br - cr)
                store(own, o + PLACE + LANES, bi - ci)
                tr, ti = tr + (br + cr), ti + (bi + ci)
            store(z, a, tr)
            store(z, a + LANES, ti)
            for m in range(1, half + 1):
                er, ei = ar, ai
                x = roots + 2 * m
                fr, fi = load(own, PLACE) * every(turns, x + 1), load(own, PLACE + LANES) * every(turns, x + 1)
                for k in range(1, half + 1):
                    x = roots + 2 * (k * m % p)
                    o = 2 * (k - 1) * PLACE
                    er, ei = er + load(own, o) * every(turns, x), ei + load(own, o + LANES) * every(turns, x)
                    if k > 1:
                        fr = fr + load(own, o + PLACE) * every(turns, x + 1)
                        fi = fi + load(own, o + PLACE + LANES) * every(turns, x + 1)
                b, c = a + m * s * PLACE, a + (p - m) * s * PLACE
                store(z, b, er + fi)
                store(z, b + LANES, ei - fr)
                store(z, c, er - fi)
                store(z, c + LANES, ei + fr)


@_jit
def _stages(z: Any, begin: int, end: int, stages: Any, first: int, last: int, turns: Any, own: Any) -> None:
    """Stages ``first`` to ``last`` of the transforms in places ``begin`` to ``end``; of each: radix, s, and places."""
    for i in range(first, last):
        radix, s, at, roots = stages[i, 0], stages[i, 1], stages[i, 2], stages[i, 3]
        if radix == 4:
            _radix4(z, begin, end, s, turns, at, 0, s)
        elif radix == 2:
            _radix2(z, begin, end, s, turns, at)
        elif radix == 3:
            _radix3(z, begin, end, s, turns, at, roots)
        else:
            _radix_odd(z, begin, end, radix, s, turns, at, roots, own)


@_jit
def sort_columns(u: Any, v: Any, values: Any, gain: float, phases: Any, roots: Any, columns: int) -> Any:
    """Coefficients (u, v, value) by column: what `Columns` has of them for sums.

    Raises:
        ValueError: one lies outside of the matrix.
    """
    counts = np.zeros(columns + 1, np.int64)
    for k in range(v.size):
        if not (0 <= u[k] < phases.size and 0 <= v[k] < columns):
            raise ValueError("A coefficient lies outside of the matrix.")
        counts[v[k] + 1] += 1
    used = np.flatnonzero(counts).size
    held, runs, at = np.empty(used, np.int64), np.zeros(used + 1, np.int64), 0
    for column in range(columns):
        if counts[column + 1] > 0:
            held[at] = column
            at += 1
            runs[at] = runs[at - 1] + counts[column + 1]
        counts[column + 1] += counts[column]
    size = -(-v.size // LANES) * LANES
    rows, weights, steps = np.empty(v.size, np.int64), np.zeros(2 * size), np.zeros(2 * size)
    for i in range(v.size):
        k, row = counts[v[i]], u[i]
        counts[v[i]] += 1
        rows[k] = row
        weight, step = gain * values[i] * phases[row], roots[np.uint64(2 * ROWS * row) % np.uint64(roots.size)]
        weights[k], weights[size + k] = weight.real, weight.imag
        steps[k], steps[size + k] = step.real, step.imag
    return held, runs, rows, weights, steps


@_jit
def _place(z: Any, frequency: int, plan: Any, a: Any, b: Any) -> None:
    """Add rows a and b of one column: as ``w(a + ib)/2`` in place k, ``w̄(a + ib)/2`` in place n−k."""
    n = plan.places.size
    p, q = plan.places[frequency], plan.places[n - frequency if frequency else 0]
    wr, wi = every(plan.weights, 2 * frequency), every(plan.weights, 2 * frequency + 1)
    ar, ai, br, bi = a * wr, a * wi, b * wr, b * wi
    store(z, p, load(z, p) + (ar - bi))
    store(z, p + LANES, load(z, p + LANES) + (br + ai))
    store(z, q, load(z, q) + (ar + bi))
    store(z, q + LANES, load(z, q + LANES) + (br - ai))


@_jit
def _begin(state: Any, start: int, columns: Any) -> None:
    """``state`` = weights turned to the middle of the `ROWS` rows from ``start`` on."""
    size, halves = state.size // 2, 2 * start + ROWS - 1
    for k in range(columns.u.size):
        root = columns.roots[np.uint64(columns.u[k] * halves) % np.uint64(columns.roots.size)]
        wr, wi = columns.weights[k], columns.weights[size + k]
        state[k], state[size + k] = wr * root.real - wi * root.imag, wr * root.imag + wi * root.real


@_jit
def _go_on(state: Any, middle: Any, steps: Any) -> None:
    """``middle`` = ``state`` in the dtype of the rows; ``state`` goes on to the next `ROWS` of them."""
    size = state.size // 2
    for k in range(0, size, LANES):
        r, i, sr, si = load(state, k), load(state, size + k), load(steps, k), load(steps, size + k)
        store(middle, k, r)
        store(middle, size + k, i)
        store(state, k, r * sr - i * si)
        store(state, size + k, r * si + i * sr)


@_jit
def _sum_columns(z: Any, middle: Any, columns: Any, plan: Any, rows: Any) -> None:
    """``z`` = all columns in the rows around ``middle``, each in its places; ``rows`` of W are asked for meanwhile."""
    z[:] = 0
    size, turns, u = middle.size // 2, columns.turns, columns.u
    line = LINE // rows.itemsize
    share = (rows.size // (columns.held.size * line) + 1) * line
    for h in range(columns.held.size):
        k, end = columns.runs[h], columns.runs[h + 1]
        at = u[k] * PLACE
        even, odd = load(turns, at) * every(middle, k), load(turns, at + LANES) * every(middle, size + k)
        for other in range(k + 1, end):
            at = u[other] * PLACE
            even = even + load(turns, at) * every(middle, other)
            odd = odd + load(turns, at + LANES) * every(middle, size + other)
        _place(z, columns.held[h], plan, even + odd, even - odd)
        for at in range(h * share, min((h + 1) * share, rows.size), line):
            expect(rows, at)


@_jit
def _take_columns(z: Any, start: int, columns: Any, plan: Any, rows: Any) -> None:
    """``z`` = all columns in the rows from ``start`` on, each in its places; ``rows`` of W are asked for meanwhile."""
    z[:] = 0
    line = LINE // rows.itemsize
    share = (rows.size // (columns.held.size * line) + 1) * line
    for h in range(columns.held.size):
        at = h * columns.stride + start
        _place(z, columns.held[h], plan, load(columns.kept, at + LANES), load_back(columns.kept, at))
        for at in range(h * share, min((h + 1) * share, rows.size), line):
            expect(rows, at)


@_jit
def write_rows(out: Any, start: int, add: bool, kind: int, columns: Any, plan: Any, scratch: Any) -> None:
    """Put rows of the result into ``out``, or add them.

    Args:
        out: [count · n], the numbers, or the bits of halfs in uint16.
        start: the first row.
        add: ``out +=`` instead of ``out =``.
        kind: `NATIVE`, `HALF` or `BFLOAT`.
        columns: the first pass.
        plan: of the second.
        scratch: `scratch_size` numbers.
    """
    n, stages = plan.places.size, plan.stages
    count = out.size // n
    z, tile, own = scratch[: n * PLACE], scratch[n * PLACE :], scratch[n * PLACE + LANES * TILE :]
    state, middle = np.zeros_like(columns.weights), np.zeros(columns.weights.size, z.dtype)
    _begin(state, start, columns)
    parted = 0
    while parted < stages.shape[0] and stages[parted, 0] * stages[parted, 1] <= plan.inner:
        parted += 1
    for begin in range(0, count, ROWS):
        rows = out[begin * n : (begin + ROWS) * n]
        if columns.kept.size > 0:
            _take_columns(z, start + begin, columns, plan, rows)
        else:
            _go_on(state, middle, columns.steps)
            _sum_columns(z, middle, columns, plan, rows)
        for part in range(0, n, plan.inner):
            _stages(z, part, part + plan.inner, stages, 0, parted, plan.turns, own)
        last = stages.shape[0] - 1 if plan.blended else stages.shape[0]
        _stages(z, 0, n, stages, parted, last, plan.turns, own)
        if plan.blended:  # a tile of each quarter goes out while it is in the first cache
            s, at = stages[last, 1], stages[last, 2]
            for j in range(0, s, TILE):
                _radix4(z, 0, n, s, plan.turns, at, j, j + TILE)
                for quarter in range(4):
                    _put_columns(out, z, tile, plan.order, quarter * s + j, TILE, n, begin, count, add, kind)
        else:
            for j in range(0, n, TILE):
                _put_columns(out, z, tile, plan.order, j, min(TILE, n - j), n, begin, count, add, kind)


@_jit
def _put_columns(
    out: Any,
    z: Any,
    tile: Any,
    order: Any,
    first: int,
    wide: int,
    n: int,
    begin: int,
    count: int,
    add: bool,
    kind: int,
) -> None:
    """``wide`` columns of all rows: real parts to those after the middle, imaginary ones before it, the last first."""
    for side in range(2):
        for column in range(0, wide, LANES):
            turn(z, side * LANES, order, first + column, tile, column)
        for r in range(LANES):
            row = begin + (LANES - 1 - r if side else LANES + r)
            if row < count:
                _put(out, row * n + first, tile, r * TILE, wide, add, kind)


@_jit
def _put(out: Any, at: int, tile: Any, source: int, count: int, add: bool, kind: int) -> None:
    """``count`` numbers of one row, from the tile; what fills no vector is native."""
    whole = count - count % LANES
    if add:
        for c in range(0, whole, LANES):
            write(out, at + c, read(out, at + c, kind) + load(tile, source + c), kind)
        for c in range(whole, count):
            out[at + c] += tile[source + c]
    else:
        for c in range(0, whole, LANES):
            write(out, at + c, load(tile, source + c), kind)
        for c in range(whole, count):
            out[at + c] = tile[source + c]

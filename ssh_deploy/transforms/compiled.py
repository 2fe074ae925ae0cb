"""Rows of ``ΔW = F_Mᵀ S F_N`` out of coefficients, compiled: both passes, 32 rows at a time.

A row is ``F_Nᵀ y`` with y real, which is the real part of a Fourier transform: ``Re Σ_k w_k y_k e^{−iθjk}``
(transforms.base). Two rows share one complex transform; they are half the sum E and half the difference O of two rows
of W. Sixteen such pairs go through it side by side, a vector in each place, so that no step reaches across lanes; only
what comes out is turned, 16×16 at a time, on its way to the rows of W.

* Hartley's weights are all alike, ``(1+i)/√n``. Out of ``Z = Σ (E + iO)_k e^{−iθjk}`` come ``Re Z_j + Im Z_{n−j}``, the
  transform of E + O, and ``Re Z_{n−j} − Im Z_j``, that of E − O, because those of E and O alone are each other's
  conjugates in j and n−j.
* Other weights cannot wait until the end. Half of ``w_k y_k`` goes to place k and half of its conjugate to place n−k,
  which makes the transform real; the one row is its real, the other its imaginary part.

The transform is Cooley and Tukey's (1965), decimated in time and in place: coefficients are put where the reversed
digits of their frequency say, and nothing else is permuted. Its first stages are taken a part at a time that fits the
first cache.

What inner loops call is `inlined`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssh_deploy.transforms.stages import PLACE, run_stages
from ssh_deploy.transforms.vectors import (
    LANES,
    LINE,
    TILE,
    every,
    expect,
    inlined,
    jit,
    load,
    load_back,
    read,
    store,
    turn,
    turn_differences,
    turn_sums,
    write,
)

ROWS = 2 * LANES  # of one transform


class Columns(NamedTuple):
    """Columns of ``F_Mᵀ S`` that hold anything, as sums by definition or as they are.

    Coefficient ``k`` of column ``h`` (``runs[h] <= k < runs[h + 1]``) is ``Re(weights_k · e^{−iθ_k j})`` in row j,
    ``θ_k = 2π u_k / P``. In the rows l + ½ after and before a middle, `LANES` each, that is ``Re(c · e^{∓iθ(l+½)})``:
    the same two products, once added and once subtracted. Complex numbers are two arrays, the real parts first, filled
    up to whole vectors.
    """

    held: Any  # int64 [columns]
    kept: Any  # [columns · stride]: halves of the columns' rows, or empty: sums
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
    weights: Any  # [n, 2], half of Re w_k + Im w_k, and of their difference
    stages: Any  # int64 [stages, 4]: radix, places before, where in ``turns`` its factors and an odd radix's roots are
    turns: Any
    inner: int  # the first stages are those of parts of so many places
    own: int  # places that an odd radix needs
    mirrored: bool  # rows come out of places j and n−j: Hartley's weights, whole vectors of columns in order


@jit
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


@inlined
def _place(z: Any, frequency: int, plan: Any, even: Any, odd: Any) -> None:
    """The rows even + odd and even − odd of one column, each column once."""
    p, sums = plan.places[frequency], every(plan.weights, 2 * frequency)
    if plan.mirrored:
        store(z, p, even * sums)
        store(z, p + LANES, odd * sums)
        return
    # w(a + ib)/2 to place k, w̄(a + ib)/2 to place n−k
    q, differences = (
        plan.places[plan.places.size - frequency if frequency else 0],
        every(plan.weights, 2 * frequency + 1),
    )
    es, ed, os, od = even * sums, even * differences, odd * sums, odd * differences
    store(z, p, load(z, p) + (ed + os))
    store(z, p + LANES, load(z, p + LANES) + (es - od))
    store(z, q, load(z, q) + (es + od))
    store(z, q + LANES, load(z, q + LANES) + (ed - os))


@jit
def _begin(state: Any, start: int, columns: Any) -> None:
    """``state`` = weights turned to the middle of the `ROWS` rows from ``start`` on."""
    size, halves = state.size // 2, 2 * start + ROWS - 1
    for k in range(columns.u.size):
        root = columns.roots[np.uint64(columns.u[k] * halves) % np.uint64(columns.roots.size)]
        wr, wi = columns.weights[k], columns.weights[size + k]
        state[k], state[size + k] = wr * root.real - wi * root.imag, wr * root.imag + wi * root.real


@inlined
def _go_on(state: Any, middle: Any, steps: Any) -> None:
    """``middle`` = ``state`` in the dtype of the rows; ``state`` goes on to the next `ROWS` of them."""
    size = state.size // 2
    for k in range(0, size, LANES):
        r, i, sr, si = load(state, k), load(state, size + k), load(steps, k), load(steps, size + k)
        store(middle, k, r)
        store(middle, size + k, i)
        store(state, k, r * sr - i * si)
        store(state, size + k, r * si + i * sr)


@inlined
def _ask(rows: Any, h: int, share: int, line: int) -> None:
    """Ask for the h-th share of ``rows`` of W."""
    for ahead in range(h * share, min((h + 1) * share, rows.size), line):
        expect(rows, ahead)


@jit
def _sum_columns(z: Any, middle: Any, columns: Any, plan: Any, rows: Any, share: int, line: int) -> None:
    """``z`` = all columns in the rows around ``middle``, each in its places; ``rows`` of W are asked for by shares."""
    z[:] = 0
    size, turns, u = middle.size // 2, columns.turns, columns.u
    for h in range(columns.held.size):
        k, end = columns.runs[h], columns.runs[h + 1]
        at = u[k] * PLACE
        even, odd = load(turns, at) * every(middle, k), load(turns, at + LANES) * every(middle, size + k)
        for other in range(k + 1, end):
            at = u[other] * PLACE
            even = even + load(turns, at) * every(middle, other)
            odd = odd + load(turns, at + LANES) * every(middle, size + other)
        _place(z, columns.held[h], plan, even, odd)
        _ask(rows, h, share, line)


@jit
def _take_columns(z: Any, start: int, columns: Any, plan: Any, rows: Any, share: int, line: int) -> None:
    """``z`` = all columns in the rows from ``start`` on, each in its places; ``rows`` of W are asked for by shares."""
    z[:] = 0
    for h in range(columns.held.size):
        at = h * columns.stride + start
        a, b = load(columns.kept, at + LANES), load_back(columns.kept, at)
        _place(z, columns.held[h], plan, a + b, a - b)
        _ask(rows, h, share, line)


@jit
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
    line = LINE // out.itemsize
    for begin in range(0, count, ROWS):
        rows = out[begin * n : (begin + ROWS) * n]
        share = (rows.size // (columns.held.size * line) + 1) * line
        if columns.kept.size > 0:
            _take_columns(z, start + begin, columns, plan, rows, share, line)
        else:
            _go_on(state, middle, columns.steps)
            _sum_columns(z, middle, columns, plan, rows, share, line)
        for part in range(0, z.size, plan.inner * PLACE):
            run_stages(z[part : part + plan.inner * PLACE], stages[:parted], plan.turns, own)
        run_stages(z, stages[parted:], plan.turns, own)
        for j in range(0, n, TILE):
            _put_columns(out, z, tile, plan, j, min(TILE, n - j), begin, count, add, kind)


@inlined
def _put_columns(
    out: Any,
    z: Any,
    tile: Any,
    plan: Any,
    first: int,
    wide: int,
    begin: int,
    count: int,
    add: bool,
    kind: int,
) -> None:
    """``wide`` columns of all rows, of those after the middle and of those before it, the last first."""
    n = plan.places.size
    for side in range(2):
        for column in range(0, wide, LANES):
            if not plan.mirrored:
                turn(z, side * LANES, plan.order, first + column, tile, column)
            elif side == 0:
                turn_sums(z, n, first + column, tile, column)
            else:
                turn_differences(z, n, first + column, tile, column)
        for r in range(LANES):
            row = begin + (LANES - 1 - r if side else LANES + r)
            if row < count:
                _put(out, row * n + first, tile, r * TILE, wide, add, kind)


@inlined
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

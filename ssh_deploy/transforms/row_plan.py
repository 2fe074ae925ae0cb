"""What the compiled transform of one length needs beforehand, and the coefficients in the form that it reads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.transforms.base import Axis, Index, Separable
from ssh_deploy.transforms.compiled import Columns, Plan, sort_columns
from ssh_deploy.transforms.stages import PLACE
from ssh_deploy.transforms.vectors import LANES, LINE, TILE

_INNER = 256  # places whose transform stays in the first cache: 32 KB of float32
_LARGEST = 64  # prime factor that is worth its p²/2 products


def radices(n: int) -> list[int] | None:
    """Factors of ``n`` in the order of the stages; None where one is too large a prime."""
    odd, rest = [], n
    while rest % 2 == 0:
        rest //= 2
    p = 3
    while rest > 1 and p <= _LARGEST:
        while rest % p == 0:
            odd.append(p)
            rest //= p
        p += 2
    twos = (n & -n).bit_length() - 1
    eights, more = divmod(twos, 3)
    if more == 1 and eights:  # 4·4 for 8·2
        eights, more = eights - 1, 4
    factors = odd + [4] * (more // 2) + [2] * (more % 2) + [8] * eights
    if factors[:2] == [3, 4]:  # where nothing is turned yet, one stage for two
        factors[:2] = [12]
    return None if rest > 1 else factors


@lru_cache(maxsize=16)
def plan_of(axis: Axis, n: int, dtype: np.dtype[Any]) -> Plan | None:
    """The plan for length ``n`` in float32 or float64; None where `radices` has none."""
    factors = radices(n)
    if factors is None:
        return None
    order = np.arange(n)  # of the frequencies: digits reversed
    for i, radix in enumerate(reversed(factors)):
        rest = int(np.prod(factors[: len(factors) - i]))
        order = order.reshape(-1, rest // radix, radix).transpose(0, 2, 1).reshape(-1)
    places = np.empty(n, np.int64)
    places[order] = np.arange(n)
    stages, turns, s, inner, at = [], [], 1, 1, 0
    for radix in factors:
        powers = np.outer(np.arange(s), np.arange(1, radix)) / (radix * s)
        roots = np.array([np.sqrt(0.5)]) if radix in (2, 4, 8) else np.exp(2j * np.pi * np.arange(radix) / radix)
        stages.append((radix, s, at, at + 2 * powers.size))
        turns += [np.exp(-2j * np.pi * powers).reshape(-1), roots]
        at += 2 * (powers.size + roots.size)
        s *= radix
        inner = s if s <= _INNER else inner
    permutation, weights = axis.permutation(n), axis.weights(n)
    alike = bool(permutation is None and (weights == weights[0].real * (1 + 1j)).all())
    back = np.arange(n) if permutation is None else np.argsort(permutation)
    return Plan(
        places * PLACE,
        np.append(back, np.zeros(LANES, np.int64)) * PLACE,
        _pairs(weights.conj() * (0.5 + 0.5j), dtype),
        np.array(stages, np.int64).reshape(-1, 4),
        _pairs(np.concatenate([np.empty(0), *turns]), dtype),
        inner,
        max([radix for radix in factors if radix % 2], default=0),
        alike and n % LANES == 0,
    )


@lru_cache(maxsize=8)
def _turns(axis: Axis, m: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """``w`` of length m; ``e^{−πi/P}`` to every power; the turns of every frequency (`Columns`)."""
    period = axis.period(m)
    roots = np.exp((-1j * np.pi / period) * np.arange(2 * period))
    around = np.outer(np.arange(m), 2 * np.arange(LANES) + 1) % (2 * period)
    table = aligned(m * PLACE, dtype).reshape(m, 2, LANES)
    table[:, 0], table[:, 1] = roots.real.astype(dtype)[around], -roots.imag.astype(dtype)[around]
    return axis.weights(m), roots, table.reshape(-1)


def _pairs(numbers: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Complex numbers as two real ones each."""
    return np.ascontiguousarray(numbers, np.complex128).view(np.float64).astype(dtype)


def sums(shape: tuple[int, int], axis: Axis, spectrum: Separable, gain: float, dtype: np.dtype[Any]) -> Columns:
    """First pass by definition.

    Raises:
        ValueError: a coefficient lies outside of the matrix.
    """
    phases, roots, turns = _turns(axis, shape[0], dtype)
    held, runs, u, weights, steps = sort_columns(
        spectrum.rows,
        spectrum.cols,
        spectrum.values.astype(np.float64),
        gain * spectrum.factor,
        phases,
        roots,
        shape[1],
    )
    return Columns(held, turns[:0], 0, runs, u, weights, steps, roots, turns)


def kept(held: Index, stage: NDArray[Any]) -> Columns:
    """First pass that is there: half of it in ``stage`` [held, rows], contiguous, `ROWS` more rows than there are."""
    none, nothing = np.empty(0, np.int64), np.empty(0)
    flat = stage.reshape(-1)
    return Columns(held, flat, stage.shape[1], none, none, nothing, nothing, np.empty(0, complex), flat[:0])


def aligned(size: int, dtype: Any) -> NDArray[Any]:
    """Uninitialised numbers that begin where a cache line does: a vector then never lies in two of them."""
    item = np.dtype(dtype).itemsize
    raw = np.empty(size * item + LINE, np.uint8)
    begin = -raw.__array_interface__["data"][0] % LINE
    return raw[begin : begin + size * item].view(dtype)


def scratch_size(plan: Plan) -> int:
    """Numbers that `write_rows` needs as scratch."""
    return (plan.places.size + plan.own) * PLACE + LANES * TILE

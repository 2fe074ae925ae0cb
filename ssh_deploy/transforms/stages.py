"""The stages of a complex Fourier transform in place, for sixteen pairs of rows side by side (`transforms.compiled`).

A place holds one frequency's real parts and then its imaginary ones. Decimated in time: of a stage of radix r, after
s places each have been transformed, place j of part k is multiplied with ``e^{−2πi·jk/rs}``, and the parts go through a
transform of length r. Odd primes take p²/2 products, by pairs k and p−k (Singleton 1969).
"""

from __future__ import annotations

from typing import Any

from ssh_deploy.transforms.vectors import LANES, every, inlined, jit, load, store

PLACE = 2 * LANES  # numbers of a place: real parts, then imaginary ones


@inlined
def _loaded(z: Any, a: int) -> Any:
    return load(z, a), load(z, a + LANES)


@inlined
def _stored(z: Any, a: int, r: Any, i: Any) -> None:
    store(z, a, r)
    store(z, a + LANES, i)


@inlined
def _turned(z: Any, a: int, turns: Any, t: int) -> Any:
    """Place a times the t-th factor."""
    (xr, xi), wr, wi = _loaded(z, a), every(turns, t), every(turns, t + 1)
    return xr * wr - xi * wi, xr * wi + xi * wr


@inlined
def _three(a: Any, b: Any, c: Any, cos: Any, sin: Any) -> Any:
    """Transform of length 3 of complex numbers; ``cos``, ``sin`` of 2π/3."""
    ur, ui, vr, vi = b[0] + c[0], b[1] + c[1], (b[0] - c[0]) * sin, (b[1] - c[1]) * sin
    pr, pi = a[0] + ur * cos, a[1] + ui * cos
    return (a[0] + ur, a[1] + ui), (pr + vi, pi - vr), (pr - vi, pi + vr)


@inlined
def _four(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Transform of length 4 of complex numbers."""
    pr, pi, qr, qi = a[0] + c[0], a[1] + c[1], a[0] - c[0], a[1] - c[1]
    ur, ui, vr, vi = b[0] + d[0], b[1] + d[1], b[0] - d[0], b[1] - d[1]
    return (pr + ur, pi + ui), (qr + vi, qi - vr), (pr - ur, pi - ui), (qr - vi, qi + vr)


@jit
def _radix2(z: Any, s: int, turns: Any, at: int) -> None:
    for group in range(0, z.size // PLACE, 2 * s):
        for j in range(s):
            a = (group + j) * PLACE
            b = a + s * PLACE
            ar, ai = _loaded(z, a)
            br, bi = _turned(z, b, turns, at + 2 * j)
            _stored(z, a, ar + br, ai + bi)
            _stored(z, b, ar - br, ai - bi)


@jit
def _radix3(z: Any, s: int, turns: Any, at: int, roots: int) -> None:
    cos, sin, step = every(turns, roots + 2), every(turns, roots + 3), s * PLACE
    for group in range(0, z.size // PLACE, 3 * s):
        for j in range(s):
            t = at + 4 * j
            a = (group + j) * PLACE
            b, c = _turned(z, a + step, turns, t), _turned(z, a + 2 * step, turns, t + 2)
            o, p, q = _three(_loaded(z, a), b, c, cos, sin)
            _stored(z, a, o[0], o[1])
            _stored(z, a + step, p[0], p[1])
            _stored(z, a + 2 * step, q[0], q[1])


@jit
def _radix4(z: Any, s: int, turns: Any, at: int) -> None:
    step = s * PLACE
    for group in range(0, z.size // PLACE, 4 * s):
        for j in range(s):
            t = at + 6 * j
            a = (group + j) * PLACE
            b, c = _turned(z, a + step, turns, t), _turned(z, a + 2 * step, turns, t + 2)
            o, p, q, r = _four(_loaded(z, a), b, c, _turned(z, a + 3 * step, turns, t + 4))
            _stored(z, a, o[0], o[1])
            _stored(z, a + step, p[0], p[1])
            _stored(z, a + 2 * step, q[0], q[1])
            _stored(z, a + 3 * step, r[0], r[1])


@jit
def _radix8(z: Any, s: int, turns: Any, at: int, root: int) -> None:
    """Two of radix 4, of the even and of the odd inputs, and a stage of radix 2; ``root``: where √½ is."""
    half, step = every(turns, root), s * PLACE
    for group in range(0, z.size // PLACE, 8 * s):
        for j in range(s):
            t = at + 14 * j
            a = (group + j) * PLACE
            b, c = _turned(z, a + 2 * step, turns, t + 2), _turned(z, a + 4 * step, turns, t + 6)
            e0, e1, e2, e3 = _four(_loaded(z, a), b, c, _turned(z, a + 6 * step, turns, t + 10))
            b, c = _turned(z, a + 3 * step, turns, t + 4), _turned(z, a + 5 * step, turns, t + 8)
            o0, o1, o2, o3 = _four(_turned(z, a + step, turns, t), b, c, _turned(z, a + 7 * step, turns, t + 12))
            # the second turned by an eighth, the third by −i, the fourth by three eighths
            xr, xi = (o1[0] + o1[1]) * half, (o1[1] - o1[0]) * half
            yr, yi = (o3[1] - o3[0]) * half, (o3[1] + o3[0]) * half
            _stored(z, a, e0[0] + o0[0], e0[1] + o0[1])
            _stored(z, a + step, e1[0] + xr, e1[1] + xi)
            _stored(z, a + 2 * step, e2[0] + o2[1], e2[1] - o2[0])
            _stored(z, a + 3 * step, e3[0] + yr, e3[1] - yi)
            _stored(z, a + 4 * step, e0[0] - o0[0], e0[1] - o0[1])
            _stored(z, a + 5 * step, e1[0] - xr, e1[1] - xi)
            _stored(z, a + 6 * step, e2[0] - o2[1], e2[1] + o2[0])
            _stored(z, a + 7 * step, e3[0] - yr, e3[1] + yi)


@jit
def _first12(z: Any, turns: Any, roots: int) -> None:
    """Twelve places side by side, as 3·4: 3 and 4 have no common factor, so nothing is turned (Good 1958)."""
    cos, sin = every(turns, roots + 8), every(turns, roots + 9)
    for group in range(0, z.size // PLACE, 12):
        a = group * PLACE
        p0, p1, p2 = _three(_loaded(z, a), _loaded(z, a + 4 * PLACE), _loaded(z, a + 8 * PLACE), cos, sin)
        q0, q1, q2 = _three(_loaded(z, a + 3 * PLACE), _loaded(z, a + 7 * PLACE), _loaded(z, a + 11 * PLACE), cos, sin)
        r0, r1, r2 = _three(_loaded(z, a + 6 * PLACE), _loaded(z, a + 10 * PLACE), _loaded(z, a + 2 * PLACE), cos, sin)
        s0, s1, s2 = _three(_loaded(z, a + 9 * PLACE), _loaded(z, a + PLACE), _loaded(z, a + 5 * PLACE), cos, sin)
        b, c, d, e = _four(p0, q0, r0, s0)
        _stored(z, a, b[0], b[1])
        _stored(z, a + 9 * PLACE, c[0], c[1])
        _stored(z, a + 6 * PLACE, d[0], d[1])
        _stored(z, a + 3 * PLACE, e[0], e[1])
        b, c, d, e = _four(p1, q1, r1, s1)
        _stored(z, a + 4 * PLACE, b[0], b[1])
        _stored(z, a + PLACE, c[0], c[1])
        _stored(z, a + 10 * PLACE, d[0], d[1])
        _stored(z, a + 7 * PLACE, e[0], e[1])
        b, c, d, e = _four(p2, q2, r2, s2)
        _stored(z, a + 8 * PLACE, b[0], b[1])
        _stored(z, a + 5 * PLACE, c[0], c[1])
        _stored(z, a + 2 * PLACE, d[0], d[1])
        _stored(z, a + 11 * PLACE, e[0], e[1])


@jit
def _radix_odd(z: Any, p: int, s: int, turns: Any, at: int, roots: int, own: Any) -> None:
    """Any odd p, by pairs k and p−k: sums go with cosines, differences with sines. ``own``: p places of scratch."""
    half = p // 2
    for group in range(0, z.size // PLACE, p * s):
        for j in range(s):
            t = at + 2 * (p - 1) * j
            a = (group + j) * PLACE
            ar, ai = _loaded(z, a)
            tr, ti = ar, ai
            for k in range(1, half + 1):
                b, c = a + k * s * PLACE, a + (p - k) * s * PLACE
                br, bi = _turned(z, b, turns, t + 2 * (k - 1))
                cr, ci = _turned(z, c, turns, t + 2 * (p - k - 1))
                o = 2 * (k - 1) * PLACE
                _stored(own, o, br + cr, bi + ci)
                _stored(own, o + PLACE, br - cr, bi - ci)
                tr, ti = tr + (br + cr), ti + (bi + ci)
            _stored(z, a, tr, ti)
            for m in range(1, half + 1):
                x = roots + 2 * m
                er, ei = ar + load(own, 0) * every(turns, x), ai + load(own, LANES) * every(turns, x)
                fr, fi = load(own, PLACE) * every(turns, x + 1), load(own, PLACE + LANES) * every(turns, x + 1)
                for k in range(2, half + 1):
                    x = roots + 2 * (k * m % p)
                    o = 2 * (k - 1) * PLACE
                    er, ei = er + load(own, o) * every(turns, x), ei + load(own, o + LANES) * every(turns, x)
                    fr = fr + load(own, o + PLACE) * every(turns, x + 1)
                    fi = fi + load(own, o + PLACE + LANES) * every(turns, x + 1)
                b, c = a + m * s * PLACE, a + (p - m) * s * PLACE
                _stored(z, b, er + fi, ei - fr)
                _stored(z, c, er - fi, ei + fr)


@jit
def run_stages(z: Any, stages: Any, turns: Any, own: Any) -> None:
    """``stages`` of the transforms in all places of ``z``; of each: radix, s, and places (`Plan`)."""
    for i in range(stages.shape[0]):
        radix, s, at, roots = stages[i, 0], stages[i, 1], stages[i, 2], stages[i, 3]
        if radix == 4:
            _radix4(z, s, turns, at)
        elif radix == 8:
            _radix8(z, s, turns, at, roots)
        elif radix == 2:
            _radix2(z, s, turns, at)
        elif radix == 12:
            _first12(z, turns, roots)
        elif radix == 3:
            _radix3(z, s, turns, at, roots)
        else:
            _radix_odd(z, radix, s, turns, at, roots, own)

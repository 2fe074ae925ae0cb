"""The stages of a complex Fourier transform in place, for sixteen pairs of rows side by side (`transforms.compiled`).

A place holds one frequency's real parts and then its imaginary ones. Decimated in time: of a stage of radix r, after
s places each have been transformed, place j of part k is multiplied with ``e^{−2πi·jk/rs}``, and the parts go through a
transform of length r. Odd primes take p²/2 products, by pairs k and p−k (Singleton 1969).
"""

from __future__ import annotations

from typing import Any

from ssh_deploy.transforms.vectors import LANES, every, jit, load, store

PLACE = 2 * LANES  # numbers of a place: real parts, then imaginary ones


@jit
def _turned(z: Any, a: int, turns: Any, t: int) -> Any:
    """Place a times the t-th factor."""
    xr, xi, wr, wi = load(z, a), load(z, a + LANES), every(turns, t), every(turns, t + 1)
    return xr * wr - xi * wi, xr * wi + xi * wr


@jit
def _radix2(z: Any, begin: int, end: int, s: int, turns: Any, at: int) -> None:
    for group in range(begin, end, 2 * s):
        for j in range(s):
            t = at + 2 * j
            a = (group + j) * PLACE
            b = a + s * PLACE
            ar, ai = load(z, a), load(z, a + LANES)
            br, bi = _turned(z, b, turns, t)
            store(z, a, ar + br)
            store(z, a + LANES, ai + bi)
            store(z, b, ar - br)
            store(z, b + LANES, ai - bi)


@jit
def radix4(z: Any, begin: int, end: int, s: int, turns: Any, at: int, first: int, last: int) -> None:
    """Of each group those ``first`` to ``last`` of s."""
    for group in range(begin, end, 4 * s):
        for j in range(first, last):
            t = at + 6 * j
            a = (group + j) * PLACE
            b, c, d = a + s * PLACE, a + 2 * s * PLACE, a + 3 * s * PLACE
            ar, ai = load(z, a), load(z, a + LANES)
            br, bi = _turned(z, b, turns, t)
            cr, ci = _turned(z, c, turns, t + 2)
            dr, di = _turned(z, d, turns, t + 4)
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


@jit
def _radix8(z: Any, begin: int, end: int, s: int, turns: Any, at: int, root: int) -> None:
    """Two of radix 4, of the even and of the odd inputs, and a stage of radix 2; ``root``: where √½ is."""
    half, step = every(turns, root), s * PLACE
    for group in range(begin, end, 8 * s):
        for j in range(s):
            t = at + 14 * j
            a = (group + j) * PLACE
            br, bi = _turned(z, a + 2 * step, turns, t + 2)
            cr, ci = _turned(z, a + 4 * step, turns, t + 6)
            dr, di = _turned(z, a + 6 * step, turns, t + 10)
            ar, ai = load(z, a), load(z, a + LANES)
            pr, pi, qr, qi = ar + cr, ai + ci, ar - cr, ai - ci
            ur, ui, vr, vi = br + dr, bi + di, br - dr, bi - di
            e0r, e0i, e2r, e2i = pr + ur, pi + ui, pr - ur, pi - ui
            e1r, e1i, e3r, e3i = qr + vi, qi - vr, qr - vi, qi + vr
            ar, ai = _turned(z, a + step, turns, t)
            br, bi = _turned(z, a + 3 * step, turns, t + 4)
            cr, ci = _turned(z, a + 5 * step, turns, t + 8)
            dr, di = _turned(z, a + 7 * step, turns, t + 12)
            pr, pi, qr, qi = ar + cr, ai + ci, ar - cr, ai - ci
            ur, ui, vr, vi = br + dr, bi + di, br - dr, bi - di
            o0r, o0i, o2r, o2i = pr + ur, pi + ui, pi - ui, ur - pr  # the third turned by −i
            xr, xi, yr, yi = qr + vi, qi - vr, qr - vi, qi + vr
            o1r, o1i, o3r, o3i = (xr + xi) * half, (xi - xr) * half, (yi - yr) * half, (yr + yi) * half
            store(z, a, e0r + o0r)
            store(z, a + LANES, e0i + o0i)
            store(z, a + step, e1r + o1r)
            store(z, a + step + LANES, e1i + o1i)
            store(z, a + 2 * step, e2r + o2r)
            store(z, a + 2 * step + LANES, e2i + o2i)
            store(z, a + 3 * step, e3r + o3r)
            store(z, a + 3 * step + LANES, e3i - o3i)
            store(z, a + 4 * step, e0r - o0r)
            store(z, a + 4 * step + LANES, e0i - o0i)
            store(z, a + 5 * step, e1r - o1r)
            store(z, a + 5 * step + LANES, e1i - o1i)
            store(z, a + 6 * step, e2r - o2r)
            store(z, a + 6 * step + LANES, e2i - o2i)
            store(z, a + 7 * step, e3r - o3r)
            store(z, a + 7 * step + LANES, e3i + o3i)


@jit
def _radix3(z: Any, begin: int, end: int, s: int, turns: Any, at: int, roots: int) -> None:
    cos, sin = every(turns, roots + 2), every(turns, roots + 3)
    for group in range(begin, end, 3 * s):
        for j in range(s):
            t = at + 4 * j
            a = (group + j) * PLACE
            b, c = a + s * PLACE, a + 2 * s * PLACE
            ar, ai = load(z, a), load(z, a + LANES)
            br, bi = _turned(z, b, turns, t)
            cr, ci = _turned(z, c, turns, t + 2)
            ur, ui, vr, vi = br + cr, bi + ci, (br - cr) * sin, (bi - ci) * sin
            pr, pi = ar + ur * cos, ai + ui * cos
            store(z, a, ar + ur)
            store(z, a + LANES, ai + ui)
            store(z, b, pr + vi)
            store(z, b + LANES, pi - vr)
            store(z, c, pr - vi)
            store(z, c + LANES, pi + vr)


@jit
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
                br, bi = _turned(z, b, turns, t + 2 * (k - 1))
                cr, ci = _turned(z, c, turns, t + 2 * (p - k - 1))
                o = 2 * (k - 1) * PLACE
                store(own, o, br + cr)
                store(own, o + LANES, bi + ci)
                store(own, o + PLACE, br - cr)
                store(own, o + PLACE + LANES, bi - ci)
                tr, ti = tr + (br + cr), ti + (bi + ci)
            store(z, a, tr)
            store(z, a + LANES, ti)
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
                store(z, b, er + fi)
                store(z, b + LANES, ei - fr)
                store(z, c, er - fi)
                store(z, c + LANES, ei + fr)


@jit
def run_stages(z: Any, begin: int, end: int, stages: Any, first: int, last: int, turns: Any, own: Any) -> None:
    """Stages ``first`` to ``last`` of the transforms in places ``begin`` to ``end``; of each: radix, s, and places."""
    for i in range(first, last):
        radix, s, at, roots = stages[i, 0], stages[i, 1], stages[i, 2], stages[i, 3]
        if radix == 4:
            radix4(z, begin, end, s, turns, at, 0, s)
        elif radix == 8:
            _radix8(z, begin, end, s, turns, at, roots)
        elif radix == 2:
            _radix2(z, begin, end, s, turns, at)
        elif radix == 3:
            _radix3(z, begin, end, s, turns, at, roots)
        else:
            _radix_odd(z, begin, end, radix, s, turns, at, roots, own)

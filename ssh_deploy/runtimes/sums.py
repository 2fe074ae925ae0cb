"""Sums of adapters, ``"spam+0.5*style"``: read the expression, and make one adapter's rows out of its terms' rows.

    sum  = term *("+" term) ["@head=" name]          term = [weight "*"] name

A sum is an adapter like any other: per kind and site the terms' coefficients one after another, those at one place
added, in the order that the graph wants, and one scale (so too values at places of a sparse change). Numbers are
computed in float64 and rounded once to the bank's dtype. A site's scale is its dominant term's, times a power of two
that puts the largest value high in float16's range: the dominant term's own values stay exact, nothing overflows, and
what is rounded away from the others is 2⁻¹¹ of a value (2⁻²⁴ of the site's largest for those near nothing). Products of
two thin matrices stand side by side, their ranks added, with the weight in b.

The head is that of the first term, or of ``@head=``; terms that bring a head of other labels are refused without it,
because their answers would go by the wrong names. *Not covered:* scales and reflections multiply, and a sum of two is
no map of their kind.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import finite
from ssh_deploy.errors import AdapterMismatchError, UnknownNameError
from ssh_deploy.graph.bank_file import PREFIXES
from ssh_deploy.graph.lowrank_rows import A
from ssh_deploy.graph.spectral_rows import AXES, MOST, pointers_of, rows_of, spare
from ssh_deploy.runtimes.bank import Rows
from ssh_deploy.runtimes.folder import check_name
from ssh_deploy.runtimes.loading import Loaded

_HEAD = "@head="
_WEIGHT = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_HINT = 'A sum is written "a+0.5*b", "a+-0.5*b" or "a+b@head=c": decimal weights, names of A-Z a-z 0-9 . _ -.'
_HIGHEST = 14  # values of a site are scaled to below 2**15, where float16 ends at 65,504


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum as written: (weight, name) of its terms in order, and whose head it takes when not the first's."""

    terms: tuple[tuple[float, str], ...]
    head: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All names in it, each once."""
        return tuple(dict.fromkeys([*(name for _, name in self.terms), *([self.head] if self.head else [])]))


def is_sum(name: object) -> bool:
    """Whether ``name`` is meant as a sum and not as one adapter's name."""
    return isinstance(name, str) and not {"+", "*", "@"}.isdisjoint(name)


@lru_cache(maxsize=4096)
def parse_sum(text: str) -> Sum:
    """Read an expression.

    Raises:
        UnknownNameError: an empty term, a weight that is zero or no decimal number, a name that cannot be one.
    """
    body, at, head = text.partition("@")
    if at and not f"@{head}".startswith(_HEAD):
        raise UnknownNameError(f"{text!r:.200}: @{head[:40]} means nothing.", hint=_HINT)
    terms = []
    for term in body.split("+"):
        weight, times, name = term.rpartition("*")
        if not name:
            raise UnknownNameError(f"{text!r:.200} has an empty term.", hint=_HINT)
        if times and (not _WEIGHT.fullmatch(weight) or not 0 < abs(float(weight)) < math.inf):
            raise UnknownNameError(
                f"{text!r:.200}: the weight {weight!r:.40} is not a decimal number other than 0.", hint=_HINT
            )
        terms.append((float(weight) if times else 1.0, check_name(name)))
    return Sum(tuple(terms), check_name(head.removeprefix(_HEAD[1:])) if at else None)


def sum_digest(expression: Sum, digests: Mapping[str, str]) -> str:
    """Identity of a sum of contents: weights, digests of the terms in order, digest of the head's adapter."""
    terms = ";".join(f"{weight.hex()}*{digests[name]}" for weight, name in expression.terms)
    head = "" if expression.head is None else digests[expression.head]
    return hashlib.sha256(f"sum of {terms} head {head}".encode()).hexdigest()


def combine(text: str, expression: Sum, loaded: Mapping[str, Loaded], digest: str, *, outs: Sequence[int]) -> Loaded:
    """The sum as one adapter.

    Args:
        text: as it was asked for, for messages.
        expression: of ``text``.
        loaded: the adapters of all its names, with their numbers.
        digest: `sum_digest` of it.
        outs: rows of every site's weight.

    Raises:
        AdapterMismatchError: labels that differ, no head where one is asked for, kinds that cannot be added, or a
            scale beyond float32.
    """
    terms = [(weight, loaded[name]) for weight, name in expression.terms]
    giver = _head_giver(text, expression, loaded)
    kinds: dict[str, Rows] = {"head": giver.kinds["head"]} if giver.headed else {}
    for kind in dict.fromkeys(kind for _, term in terms for kind in term.kinds if kind != "head"):
        own = [(weight, term.kinds[kind]) for weight, term in terms if kind in term.kinds]
        if kind == "lowrank":
            kinds[kind] = _side_by_side(text, own)
        elif kind in PREFIXES:
            kinds[kind] = _add(text, kind, own, outs)
        else:
            raise AdapterMismatchError(
                f"{text}: {kind} adapters multiply what passes through a layer, and a sum of them is none of them.",
                hint="Use one of them, or merge them: `ssh-deploy merge` adds up their changes of the weights.",
            )
    verified = [term.verified for _, term in terms]
    return Loaded(
        kinds=kinds,
        headed=giver.headed,
        labels=giver.labels,
        digest=digest,
        family="sum",
        task=giver.task,
        verified=False if False in verified else None if None in verified else True,
    )


def _head_giver(text: str, expression: Sum, loaded: Mapping[str, Loaded]) -> Loaded:
    """The adapter whose head the sum takes."""
    if expression.head is not None:
        giver = loaded[expression.head]
        if not giver.headed:
            raise AdapterMismatchError(
                f"{text}: {expression.head} brings no head.", hint="Name an adapter with a head after @head=."
            )
        return giver
    first = expression.terms[0][1]
    for _, name in expression.terms[1:]:
        if loaded[name].headed and loaded[name].labels != loaded[first].labels:
            raise AdapterMismatchError(
                f"{text}: {first} answers with {_shown(loaded[first])}, {name} with {_shown(loaded[name])}.",
                hint=f"Say whose head the sum takes: {text}@head={first if loaded[first].headed else name}.",
            )
    return loaded[first]


def _shown(loaded: Loaded) -> str:
    names = ", ".join(loaded.labels[:4]) + (", …" if len(loaded.labels) > 4 else "")
    return f"{len(loaded.labels)} labels ({names})" if loaded.labels else "no head"


def _add(text: str, kind: str, terms: Sequence[tuple[float, Rows]], outs: Sequence[int]) -> Rows:
    """Weighted sum of values at places of one kind, each [sites, ..] with its own width, as one."""
    first, prefix, spectra = terms[0][1], PREFIXES[kind], kind in AXES
    dtype, places = first[f"{prefix}values"].dtype, first[f"{prefix}cols"].dtype
    sites = len(first[f"{prefix}scales"])
    scales = np.stack([weight * rows[f"{prefix}scales"].astype(np.float64) for weight, rows in terms])  # [terms, sites]
    values = [rows[f"{prefix}values"].astype(np.float64) for _, rows in terms]
    added = np.concatenate([v * s[:, None] for v, s in zip(values, scales, strict=True)], axis=1)
    every = [rows_of(rows, kind, outs) if spectra else rows[f"{prefix}rows"] for _, rows in terms]
    rows = np.concatenate(every, axis=1).astype(np.int64)
    cols = np.concatenate([rows[f"{prefix}cols"] for _, rows in terms], axis=1).astype(np.int64)

    # one number a place, ascending where the graph wants (site, row, column); rows of a sparse change descend
    deep, wide = int(rows.max(initial=0)) + 1, int(cols.max(initial=0)) + 1
    rows = rows if spectra else deep - 1 - rows
    site = np.arange(sites)[:, None]
    keep = added != 0  # padding, and coefficients that are nothing
    key, inverse = np.unique(((site * deep + rows) * wide + cols)[keep], return_inverse=True)
    total: NDArray[np.float64] = np.bincount(inverse, weights=added[keep], minlength=len(key)).astype(np.float64)
    key, total = key[total != 0], total[total != 0]
    which, place = np.divmod(key, deep * wide)
    start = np.searchsorted(which, np.arange(sites + 1))
    slot = np.arange(len(key)) - start[which]
    width = int(np.diff(start).max(initial=0))

    scale = _scales(text, scales, values, total, which)
    shape = (sites, width + spare(kind))
    out = {f"{prefix}values": np.zeros(shape, dtype), f"{prefix}scales": scale.astype(np.float32)}
    out[f"{prefix}cols"] = np.zeros(shape, places)
    out[f"{prefix}values"][which, slot] = total / scale[which]
    out[f"{prefix}cols"][which, slot] = place % wide
    rows = np.zeros(shape, np.int64)
    rows[which, slot] = place // wide
    if spectra:
        if width > MOST:
            raise AdapterMismatchError(
                f"{text}: {width:,} coefficients in one matrix, a slot takes {MOST:,}.",
                hint="Sum fewer, or merge them.",
            )
        return out | pointers_of(rows, np.diff(start), kind, outs)
    out[f"{prefix}rows"] = np.zeros(shape, places)
    out[f"{prefix}rows"][which, slot] = deep - 1 - rows[which, slot]
    return out


def _side_by_side(text: str, terms: Sequence[tuple[float, Rows]]) -> Rows:
    """Weighted sum of low-rank products as one: ranks one after another, each term's b times its weight."""
    out = {}
    for name in terms[0][1]:
        if name.startswith(A):
            out[name] = np.concatenate([rows[name] for _, rows in terms], axis=-2)
        else:
            weighted = [weight * rows[name].astype(np.float64) for weight, rows in terms]
            with np.errstate(over="ignore"):  # what overflows is refused as infinite
                out[name] = np.concatenate(weighted, axis=-1).astype(np.float32)
    if not all(finite(array) for array in out.values()):
        raise AdapterMismatchError(f"{text}: b times its weight is beyond float32.", hint="Use weights nearer to 1.")
    return out


def _scales(
    text: str,
    scales: NDArray[np.float64],
    values: Sequence[NDArray[np.float64]],
    total: NDArray[np.float64],
    which: NDArray[np.int64],
) -> NDArray[np.float64]:
    """A scale for each site: the dominant term's times a power of two; 0 where nothing is."""
    sites = scales.shape[1]
    reach = np.stack([np.abs(v).max(axis=1, initial=0) for v in values]) * np.abs(scales)  # largest by term and site
    scale = scales[reach.argmax(axis=0), np.arange(sites)]
    largest = np.zeros(sites)
    np.maximum.at(largest, which, np.abs(total))
    used = largest > 0
    _, exponent = np.frexp(np.divide(largest, np.abs(scale), out=np.ones(sites), where=used))
    scale = np.where(used, np.ldexp(scale, exponent - _HIGHEST), 0.0)
    with np.errstate(over="ignore", under="ignore"):
        rounded = scale.astype(np.float32)
    tiny = float(np.finfo(np.float32).tiny)
    if not np.isfinite(rounded).all() or (np.abs(rounded[used]) < tiny).any():
        worst = float(np.abs(scale[used]).max())
        raise AdapterMismatchError(
            f"{text}: a site's scale of {worst:.3g} is beyond float32.", hint="Use weights nearer to 1."
        )
    return scale

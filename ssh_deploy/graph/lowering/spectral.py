"""Sparse spectra inside the graph: y += F_Mᵀ S F_N x for every row of the batch with its own S, and no ScatterND.

**What runs.** Per row of the batch and site, n coefficients (row u, column v, value s), compressed by rows (CSR). With
tokens as the last axis, z = F_N x is two MatMuls (`TwoStage`), shared by all sites that read x. Then

    w = s · z[v]            Gather of a batch row's tokens, Mul
    t[u] = Σ w over row u   the sparse sum
    y = F_Mᵀ t              two MatMuls

**The sparse sum.** ScatterND(add) is the obvious operator and loses additions: onnxruntime 1.31 splits its index
tuples over threads without a lock, and two threads adding to one row overwrite each other (measured: 200 of 200
runs wrong at 6,000 tuples on 50 rows with 2 threads). ScatterElements(add) is serial and right, and seven times slower.
So coefficients stand in ascending order of their row, and the sum over equal neighbours is a difference of prefix
sums, P[k] = Σ w over coefficients before k, at the ends of the row that the CSR row pointers r tell:

    t[u] = P[r[u+1]] − P[r[u]]

The difference is linear, so it lives inside the first factor of the way back (`stages`). The cost of the prefix sums is
their rounding: about 2⁻²⁴·√n of the largest |w|, with one token n and w of all sites of the group.

**One token or many** (`stages`, `RowPlaces`). With one token a place is one number, which GatherElements fetches from
its batch row six times faster than Gather, which copies runs (1.5 and 9.7 µs for 1,502 numbers; 10 and 38 for eight
rows). And what a node costs is then its start, with caches that the weights of a layer have just gone through: so the
sites of a group are summed in one go and share the way back. Graphs that read single tokens have both, and an If for
each question (`filling`): is an adapter there, is it a single token?

**Never a wrong answer.** Row pointers beyond the coefficients, or columns outside their weight, end in an error of
Gather (a one-element table asked for its second element); so do ids that are negative or beyond the bank.

**Cost.** `ssh-deploy bench bank` measures it. Half of what an active adapter adds at 8×64 on the BERT-base shape is the
transforms' MatMuls; the rest is one pass over [n, tokens] each for Gather, Mul, CumSum, Transpose and the addition. At
1×16 it is the number of nodes, some 40 a group of two sites and 2 µs each, and 0.3 ms a run for what all sites share.
With many tokens there is a backward transform per site, though sites of one width could share it: the copy that takes
the shared result apart costs more than the nodes saved; and the sites' arrays are cut apart once, not in every group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.lowering.spectral_bank import Places, RowPlaces, SpectralBank, leading
from ssh_deploy.graph.lowering.stages import backward, backward_token, forward, forward_token
from ssh_deploy.graph.sites import Call
from ssh_deploy.graph.spectral_rows import form
from ssh_deploy.transforms import get_transform

INT32, INT64 = np.int32, np.int64


def contribution(
    emitter: Emitter,
    bank: SpectralBank,
    calls: Sequence[Call],
    table: Mapping[str, int],
    *,
    read: ir.Value | None = None,
) -> list[ir.Value]:
    """Emit, into the branch that runs when an adapter is there, what it adds to each of ``calls``.

    Args:
        emitter: of the branch.
        bank: as `spectral_bank.prepare` made it.
        calls: of one group: they read the same activation and have consecutive rows in ``table``.
        table: row of each module in the ``sites`` dimension.
        read: their activation, where it is made in the branch.

    Returns:
        f32 of the shape of each call's result.
    """
    sites, places = {table[call.module]: call.outputs for call in calls}, bank.places
    one, read = not calls[0].tokens, calls[0].activation if read is None else read
    if isinstance(places, RowPlaces) and one:
        terms = _of_token(
            emitter, bank.axis, places, sites, {site: (out,) for site, out in sites.items()}, read, calls[0].inputs
        )
    else:
        apart = places if isinstance(places, Places) else _apart(emitter, bank.axis, places, sites, calls[0].inputs)
        terms = _of_tokens(emitter, bank.axis, apart, sites, read, calls[0].inputs, one=one)
    return [terms[table[call.module]] for call in calls]


def single_gate(bank: SpectralBank, calls: Sequence[Call]) -> ir.Value | None:
    """What is true when an adapter is there and these calls read one token a batch row, for `single_contribution`.

    None where the graph does not read single tokens, or the input's length does not tell that of the activation.
    """
    if isinstance(bank.places, Places) or not calls[0].tokens or leading(calls[0].activation) != bank.lead:
        return None
    return bank.places.single


def single_contribution(
    emitter: Emitter,
    bank: SpectralBank,
    calls: Sequence[Call],
    table: Mapping[str, int],
    sides: Sequence[tuple[int, ...]],
    *,
    read: ir.Value | None = None,
) -> list[ir.Value]:
    """As `contribution`, into the branch that runs for one token a batch row: f32 [batch, ``sides`` of the call]."""
    places = bank.places
    assert isinstance(places, RowPlaces)
    sites = {table[call.module]: call.outputs for call in calls}
    wanted = {table[call.module]: own for call, own in zip(calls, sides, strict=True)}
    read = calls[0].activation if read is None else read
    terms = _of_token(emitter, bank.axis, places, sites, wanted, read, calls[0].inputs)
    return [terms[table[call.module]] for call in calls]


def _of_token(
    emitter: Emitter,
    axis: str,
    places: RowPlaces,
    sites: Mapping[int, int],
    sides: Mapping[int, tuple[int, ...]],
    read: ir.Value,
    n_in: int,
) -> dict[int, ir.Value]:
    """For one token a batch row: f32 [batch, its ``sides``] of every site."""
    first, kernel = min(sites), get_transform(axis).axis
    z = forward_token(emitter, read, kernel.two_stage(n_in))
    w = emitter.op("Mul", emitter.op("GatherElements", z, places.cols[first], axis=1), places.values[first])
    sums = emitter.op("CumSum", w, emitter.const(1, INT64), exclusive=1)
    answers: dict[int, ir.Value] = {}
    for same, of_form in _by_form(axis, sites).items():
        prefix = emitter.op("GatherElements", sums, places.windows[first, same], axis=1)
        stages = [kernel.two_stage(sites[site]) for site in of_form]
        answers |= zip(of_form, backward_token(emitter, prefix, stages, [sides[site] for site in of_form]), strict=True)
    return answers


def _of_tokens(
    emitter: Emitter, axis: str, places: Places, sites: Mapping[int, int], read: ir.Value, n_in: int, *, one: bool
) -> dict[int, ir.Value]:
    """For any number of tokens: f32 [batch, tokens, out] of every site; [batch, out] where there is ``one``."""
    first, kernel = min(sites), get_transform(axis).axis
    z = emitter.op("Flatten", forward(emitter, read, kernel.two_stage(n_in), one=one), axis=3)
    w = emitter.op("Mul", emitter.op("Gather", z, places.cols[first], axis=0), places.values[first])
    sums = emitter.op("Flatten", emitter.op("CumSum", w, emitter.const(2, INT64), exclusive=1), axis=3)
    answers = {}
    for site, out in sites.items():
        y = backward(emitter, emitter.op("Gather", sums, places.pointers[site], axis=0), kernel.two_stage(out))
        answers[site] = emitter.op("Reshape", y, emitter.ints(-1, out)) if one else y
    return answers


def _apart(emitter: Emitter, axis: str, places: RowPlaces, sites: Mapping[int, int], n_in: int) -> Places:
    """``places`` of one group as many tokens want them."""
    first, count = min(sites), len(sites)
    values = emitter.op("Reshape", places.values[first], emitter.ints(0, count, -1, 1))
    cols = emitter.op("Reshape", places.cols[first], emitter.ints(0, count, -1))
    cols = emitter.op("Add", cols, emitter.op("Mul", places.number, emitter.const([n_in], INT32)))
    rows = emitter.op("Cast", emitter.op("Shape", places.cols[first], start=1, end=2), to=ir.DataType.INT32)
    start = emitter.op("Unsqueeze", emitter.op("Mul", places.number, rows), emitter.ints(3))
    pointers: dict[int, ir.Value] = {}
    for same, of_form in _by_form(axis, sites).items():
        width = same[1]
        blocks = [sites[site] // width for site in of_form]
        whole = emitter.op("Reshape", places.windows[first, same], emitter.ints(0, 1, -1, width + 1))
        whole = emitter.op("Add", whole, start)
        pointers |= zip(
            of_form, emitter.ops("Split", whole, emitter.ints(*blocks), outputs=len(blocks), axis=2), strict=True
        )
    return Places({first: values}, {first: cols}, pointers)


def _by_form(axis: str, sites: Mapping[int, int]) -> dict[tuple[int, int], list[int]]:
    """``sites``, out by site, with those of one form together."""
    found: dict[tuple[int, int], list[int]] = {}
    for site, out in sorted(sites.items()):
        found.setdefault(form(axis, out), []).append(site)
    return found

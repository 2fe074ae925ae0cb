"""Low-rank products inside the graph: y += B (A x) for every row of the batch with its own A and B.

**Layout.** Sites of equal width share an array: `adapter_lowrank_a.<in>` [adapters, sites of that in, rank, in] and
`adapter_lowrank_b.<out>` [adapters, sites of that out, out, rank], f32, scaling in b. A rank below the bank's is padded
with zeros, and so are sites that an adapter leaves alone: both add exactly zero.

**What runs.** Per site GatherND takes each batch row's own A [rank, in] and B [out, rank] out of the bank in one copy
(never the bank itself, nor sites that are not asked for), and two MatMuls with the transposes, which onnxruntime fuses
into them. Every row is a product of its own, so no row's bits depend on its neighbours.

**Never a wrong answer.** Ids beyond the bank are looked up in a table of as many zeros as the bank has rows, and so end
in an error of Gather, also where nothing is fed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.sites import Call

INT64 = np.int64


@dataclass(frozen=True, slots=True, eq=False)
class LowRankBank:
    """Optional inputs of the low-rank kind, and what the graph makes of the ids for a batch.

    ``a``, ``b``: the inputs by ``in`` and ``out``; ``gate`` is true when an adapter is there, and ``batch`` int64
    [batch, 1] then numbers the batch's rows (else [0, 1]); ``pairs`` by place among the sites of one width, int64
    [batch, 2]: row of the bank and that place.
    """

    a: Mapping[int, ir.Value]
    b: Mapping[int, ir.Value]
    gate: ir.Value
    batch: ir.Value
    pairs: Sequence[ir.Value]
    kind: str = "lowrank"


def prepare(
    emitter: Emitter, a: Mapping[int, ir.Value], b: Mapping[int, ir.Value], ids: ir.Value, *, most: int
) -> LowRankBank:
    """Emit what all sites share, once a run.

    Args:
        emitter: of the outermost graph.
        a: f32 [adapters, sites, rank, in] by ``in``.
        b: f32 [adapters, sites, out, rank] by ``out``.
        ids: rows of the bank, int64 [batch], none negative.
        most: sites of the width that most sites have.
    """
    any_a = next(iter(a.values()))
    gate = emitter.op("Greater", emitter.op("Size", any_a), emitter.const(0, INT64))
    # outside the branch: ids beyond the bank are an error even when nothing is fed
    rows = emitter.op("Shape", any_a, start=0, end=1)
    zeros = emitter.op("ConstantOfShape", rows, value=ir.tensor(np.zeros(1, INT64)))
    ids = emitter.op("Add", ids, emitter.op("Gather", zeros, ids, axis=0))
    then, other = emitter.branch("rows"), emitter.branch("none")
    size = then.op("Shape", ids)
    number = then.op("Range", then.const(0, INT64), then.op("Squeeze", size), then.const(1, INT64))
    number = then.op("Unsqueeze", number, then.ints(1))
    first = then.op("Pad", then.op("Unsqueeze", ids, then.ints(1)), then.ints(0, 0, 0, 1))  # (row, 0)
    results = [number, *(then.op("Add", first, then.const([[0, place]], INT64)) for place in range(most))]
    none = [other.op("Identity", other.const(np.zeros((0, width)), INT64)) for width in (1, *[2] * most)]
    batch, *pairs = emitter.when(gate, then, results, other, none, dtype=ir.DataType.INT64)
    return LowRankBank(a, b, gate, batch, pairs)


def contribution(
    emitter: Emitter, bank: LowRankBank, calls: Sequence[Call], places: Mapping[str, tuple[int, int]]
) -> list[ir.Value]:
    """Emit, into the branch that runs when an adapter is there, what it adds to each of ``calls``.

    Args:
        emitter: of the branch.
        bank: as `prepare` made it.
        calls: of one group: they read the same activation.
        places: of each module among the sites of its ``in`` and of its ``out``.

    Returns:
        f32 of the shape of each call's result.
    """
    first = calls[0]
    x = first.activation if first.tokens else emitter.op("Unsqueeze", first.activation, emitter.ints(1))
    if first.activation.shape is not None and len(first.activation.shape) == 4:
        x = emitter.op("Reshape", first.activation, emitter.ints(0, 0, first.inputs))
    answers: dict[str, ir.Value] = {}
    for call in calls:
        if call.module not in answers:
            of_in, of_out = places[call.module]
            y = _times(emitter, x, bank.a[call.inputs], bank.pairs[of_in])
            y = _times(emitter, y, bank.b[call.outputs], bank.pairs[of_out])
            answers[call.module] = y if first.tokens else emitter.op("Squeeze", y, emitter.ints(1))
    return [answers[call.module] for call in calls]


def _times(emitter: Emitter, x: ir.Value, array: ir.Value, pairs: ir.Value) -> ir.Value:
    """``x Mᵀ`` [batch, tokens, rows of M], M each batch row's own matrix at ``pairs``."""
    return emitter.op("MatMul", x, emitter.op("Transpose", emitter.op("GatherND", array, pairs), perm=[0, 2, 1]))

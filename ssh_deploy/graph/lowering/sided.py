"""Maps on either side of a layer, inside the graph: scales and thin maps, y = H₂ (W (H₁ x)) + b, each row with its own.

**Layout.** Sites of equal width share an array, f32, of what maps have beyond the identity: zeros are nothing.

    diagonal    `adapter_diagonal_in.<in>`     [adapters, sites of that in, diagonal_in, in]     l − 1, where it is 1
                `adapter_diagonal_out.<out>`   [adapters, sites of that out, diagonal_out, out]  z − 1 and β, where 2
    reflection  `adapter_reflection_in.<in>`   [adapters, sites of that in, 2, reflection_in, in]     P and Q: I + PᵀQ
                `adapter_reflection_out.<out>` [adapters, sites of that out, 2, reflection_out, out]

A side that no adapter uses is 0 wide and costs an `If` a site. A narrower adapter in a wider bank is padded with zeros.

**What runs.** On the side of the inputs the layer reads x + term (term: (l−1)·x, or Pᵀ(Q x)) where it read x; sites
that share an activation read copies of their own then. On the side of the answers a term is added to the product before
its bias, as every other kind does: (z−1)·(W x + b) + β, or Pᵀ(Q W x). Every row is a product of its own, so no row's
bits depend on its neighbours.

**Never a wrong answer.** Ids beyond the bank are an error of Gather, as for low-rank products. These maps multiply: two
of them are no sum, and `runtimes.sums` refuses one.

**Cost.** A pass or two over x or y a site and side. With slots on the side of the inputs an absent adapter costs the
copy of x that ScatterND makes where x has other readers too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.sites import Call

INT64 = np.int64
IN, OUT = "in", "out"


@dataclass(frozen=True, slots=True, eq=False)
class SidedBank:
    """Optional inputs of one kind, and what the graph makes of the ids for a batch.

    ``arrays`` by side and width; by side ``gates`` (true when an adapter is there) and ``batches`` int64 [batch, 1],
    which then number the batch's rows (else [0, 1]). ``indices`` by place among the sites of one width and part (P and
    Q of a thin map), int64 [batch, 2 or 3]: row of the bank, that place, and the part. ``places`` of each module among
    the sites of its in and of its out.
    """

    kind: str
    arrays: Mapping[str, Mapping[int, ir.Value]]
    gates: Mapping[str, ir.Value]
    batches: Mapping[str, ir.Value]
    indices: Sequence[Sequence[ir.Value]]
    places: Mapping[str, tuple[int, int]]

    @property
    def gate(self) -> ir.Value:
        """Of the side of the answers."""
        return self.gates[OUT]

    @property
    def batch(self) -> ir.Value:
        """Of the side of the answers."""
        return self.batches[OUT]


def prepare(
    emitter: Emitter,
    kind: str,
    arrays: Mapping[str, Mapping[int, ir.Value]],
    ids: ir.Value,
    places: Mapping[str, tuple[int, int]],
) -> SidedBank:
    """Emit what all sites share, once a run.

    Args:
        emitter: of the outermost graph.
        kind: ``diagonal`` or ``reflection``.
        arrays: the inputs by side and width.
        ids: rows of the bank, int64 [batch], none negative.
        places: of each module among the sites of its ``in`` and of its ``out``.
    """
    parts = 1 if kind == "diagonal" else 2
    most = max(max(pair) for pair in places.values()) + 1
    any_of = {side: next(iter(values.values())) for side, values in arrays.items()}
    gates = {s: emitter.op("Greater", emitter.op("Size", v), emitter.const(0, INT64)) for s, v in any_of.items()}
    for value in any_of.values():  # outside the branch: ids beyond the bank are an error even when nothing is fed
        rows = emitter.op("Shape", value, start=0, end=1)
        zeros = emitter.op("ConstantOfShape", rows, value=ir.tensor(np.zeros(1, INT64)))
        ids = emitter.op("Add", ids, emitter.op("Gather", zeros, ids, axis=0))
    then, other = emitter.branch("rows"), emitter.branch("none")
    size = then.op("Shape", ids)
    number = then.op("Range", then.const(0, INT64), then.op("Squeeze", size), then.const(1, INT64))
    number = then.op("Unsqueeze", number, then.ints(1))
    results = []
    for side in (IN, OUT):
        end = then.op("Mul", size, then.op("Cast", gates[side], to=ir.DataType.INT64))
        results.append(then.op("Slice", number, then.ints(0), end, then.ints(0)))
    width = 1 + (parts > 1)
    first = then.op("Pad", then.op("Unsqueeze", ids, then.ints(1)), then.ints(0, 0, 0, width))  # (row, 0[, 0])
    wanted = [[0, place, part][: width + 1] for place in range(most) for part in range(parts)]
    results += [then.op("Add", first, then.const([index], INT64)) for index in wanted]
    shapes = [(0, 1)] * 2 + [(0, width + 1)] * len(wanted)
    none = [other.op("Identity", other.const(np.zeros(shape), INT64)) for shape in shapes]
    there = emitter.op("Or", gates[IN], gates[OUT])
    inner, outer, *indices = emitter.when(there, then, results, other, none, dtype=ir.DataType.INT64)
    by_place = [indices[i : i + parts] for i in range(0, len(indices), parts)]
    return SidedBank(kind, arrays, gates, {IN: inner, OUT: outer}, by_place, places)


def answered(emitter: Emitter, bank: SidedBank, calls: Sequence[Call], products: Sequence[ir.Value]) -> list[ir.Value]:
    """Emit, into the branch that runs when an adapter is there, what it adds to the product of each of ``calls``.

    Args:
        emitter: of the branch.
        bank: as `prepare` made it.
        calls: whose products they are.
        products: W x of each call with what other kinds add; its bias too where that is no node of its own.

    Returns:
        f32 of the shape of each product.
    """
    terms = []
    for call, product in zip(calls, products, strict=True):
        inside, outside = _biases(call)
        if bank.kind == "diagonal":
            y = emitter.op("Add", product, outside) if outside is not None else product
        else:
            y = emitter.op("Sub", product, inside) if inside is not None else product
        terms.append(_term(emitter, bank, OUT, call.outputs, bank.places[call.module][1], y, tokens=call.tokens))
    return terms


def read(emitter: Emitter, bank: SidedBank, call: Call) -> ir.Value:
    """Emit, into the branch that runs when an adapter is there, what it adds to what ``call`` reads; f32, of its shape.

    Args:
        emitter: of the branch.
        bank: as `prepare` made it.
        call: whose activation it is.
    """
    x, rank = call.activation, 0 if call.activation.shape is None else len(call.activation.shape)
    flat = emitter.op("Reshape", x, emitter.ints(0, 0, call.inputs)) if rank == 4 else x
    term = _term(emitter, bank, IN, call.inputs, bank.places[call.module][0], flat, tokens=call.tokens)
    return emitter.op("Reshape", term, emitter.op("Shape", x)) if rank == 4 else term


def _term(
    emitter: Emitter, bank: SidedBank, side: str, width: int, place: int, x: ir.Value, *, tokens: bool
) -> ir.Value:
    """(H − I) x, and the shift, for x [batch, tokens, width] or without tokens."""
    array = bank.arrays[side][width]
    rows = [emitter.op("GatherND", array, index) for index in bank.indices[place]]
    if bank.kind == "diagonal":
        if side == OUT:
            scale, shift = emitter.ops("Split", rows[0], outputs=2, axis=1, num_outputs=2)
        else:
            scale, shift = rows[0], None
        if not tokens:
            scale = emitter.op("Squeeze", scale, emitter.ints(1))
            shift = emitter.op("Squeeze", shift, emitter.ints(1)) if shift is not None else None
        term = emitter.op("Mul", x, scale)
        return term if shift is None else emitter.op("Add", term, shift)
    p, q = rows
    x = x if tokens else emitter.op("Unsqueeze", x, emitter.ints(1))
    term = emitter.op("MatMul", emitter.op("MatMul", x, emitter.op("Transpose", q, perm=[0, 2, 1])), p)
    return term if tokens else emitter.op("Squeeze", term, emitter.ints(1))


def _biases(call: Call) -> tuple[ir.Value | None, ir.Value | None]:
    """The bias that is in ``call.product`` already, and the one that is added to it afterwards."""
    product = call.nodes[0]
    place = {"Gemm": 2, "MatMulNBits": 5}.get(product.op_type, len(product.inputs))
    inside = product.inputs[place] if place < len(product.inputs) else None
    if len(call.nodes) < 2:
        return inside, None
    # by its rank: what it is added to may be another kind's sum by now
    added = next(v for v in call.nodes[1].inputs if v is not None and v.shape is not None and len(v.shape) == 1)
    return (inside, added) if call.product is product.outputs[0] else (added, None)

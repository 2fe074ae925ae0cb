"""Modules trained whole: y = W x + b with every row's own W and b, or the base's own nodes, bit for bit.

One gate for all head modules of a graph: as soon as any of their inputs holds a number, all of them answer from the
bank, so that no adapter's inner layer is followed by the base's outer one. A base without a head gives no labels at
all: what transformers made up for it is taken out of the graph.
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
class HeadBank:
    """``gate`` is true when a head is there; ``ids`` int64 [batch], checked; ``biases`` f32 [batch, out] by module."""

    gate: ir.Value
    ids: ir.Value
    biases: Mapping[str, ir.Value]


def prepare(emitter: Emitter, inputs: Mapping[str, Mapping[str, ir.Value]], ids: ir.Value) -> HeadBank:
    """Emit the gate and the batch's biases.

    Args:
        emitter: of the outermost graph.
        inputs: ``weight`` and ``bias`` by module.
        ids: checked rows of the bank, int64 [batch].
    """
    sizes = [emitter.op("Size", parts["weight"]) for parts in inputs.values()]
    total = (
        sizes[0]
        if len(sizes) == 1
        else emitter.op("Sum", *(emitter.op("Cast", s, to=ir.DataType.FLOAT) for s in sizes))
    )
    kind = INT64 if len(sizes) == 1 else np.float32
    gate = emitter.op("Greater", total, emitter.const(0, kind))
    # outside the branch: ids beyond the bank are an error even when nothing is fed
    biases = {module: emitter.op("Gather", parts["bias"], ids, axis=0) for module, parts in inputs.items()}
    return HeadBank(gate, ids, biases)


def answer(
    emitter: Emitter, bank: HeadBank, call: Call, weight: ir.Value, *, base: bool, last: bool, batch: ir.Value
) -> ir.Value:
    """Emit ``call`` with the bank's weights, or its own nodes where no head is fed; f32 [batch, (tokens,) out].

    Args:
        emitter: of the outermost graph, at the place of the call.
        bank: as `prepare` made it.
        call: of the head module; its nodes are copied into the other branch, the caller takes them out.
        weight: f32 [head_adapters, out, in].
        base: the base has this module; if not, its branch answers `nothing`.
        last: it gives the labels.
        batch: int64 [1].
    """
    then, other = emitter.branch("own"), emitter.branch("base")
    rows = then.op("Transpose", then.op("Gather", weight, bank.ids, axis=0), perm=[0, 2, 1])
    bias = then.op("Unsqueeze", bank.biases[call.module], then.ints(1))
    x = call.activation if call.tokens else then.op("Unsqueeze", call.activation, then.ints(1))
    y = then.op("Add", then.op("MatMul", x, rows), bias)
    if not call.tokens:
        y = then.op("Squeeze", y, then.ints(1))
    own = _copy(other, call) if base else nothing(other, call, last=last, batch=batch)
    return emitter.when(bank.gate, then, [y], other, [own], dtype=ir.DataType.FLOAT)[0]


def nothing(emitter: Emitter, call: Call, *, last: bool, batch: ir.Value) -> ir.Value:
    """Zeros in the place of an answer that the base cannot give, f32 [batch, (tokens,) out]; no labels when ``last``.

    Args:
        emitter: of the place.
        call: whose answer it is.
        last: it gives the labels: there are none.
        batch: int64 [1].
    """
    sides = [batch]
    if call.tokens:
        sides.append(emitter.op("Shape", call.activation, start=1, end=2))
    sides.append(emitter.ints(0 if last else call.outputs))
    return emitter.op("ConstantOfShape", emitter.op("Concat", *sides, axis=0))


def _copy(emitter: Emitter, call: Call) -> ir.Value:
    """The call's own nodes again, reading the same values."""
    made: dict[int, ir.Value] = {}
    value: ir.Value | None = None
    for node in call.nodes:
        inputs: Sequence[ir.Value | None] = [made.get(id(i), i) for i in node.inputs]
        value = emitter.op(node.op_type, *inputs, **dict(node.attributes))
        made[id(node.outputs[0])] = value
    assert value is not None
    return value

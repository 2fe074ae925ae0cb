"""Logits only where they are asked for: the optional input `logits_at` of a decoder's graph.

A prompt needs the logits of its last token alone, and the vocabulary's MatMul is a quarter of a small model's work and
most of its output's memory. `logits_at`, int64 [batch, positions], names the tokens of each row; ORT refuses numbers
beyond them. Its default is empty and means all tokens, as everybody else's graphs answer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Constants, Emitter
from ssh_deploy.graph.sites import Call

LOGITS_AT = "logits_at"


def choose_positions(model: ir.Model, call: Call) -> None:
    """Give ``model`` the input `LOGITS_AT`, in place; with it empty every output keeps its bits.

    Args:
        model: a decoder's plain graph.
        call: of its output embedding, which reads [batch, tokens, in].
    """
    graph = model.graph
    wanted = ir.Value(name=LOGITS_AT, shape=ir.Shape(["rows", "positions"]), type=ir.TensorType(ir.DataType.INT64))
    wanted.const_value = ir.tensor(np.zeros((0, 0), np.int64), name=LOGITS_AT)
    graph.inputs.append(wanted)
    graph.register_initializer(wanted)
    emitter = Emitter(Constants(graph, LOGITS_AT), LOGITS_AT)
    asked = emitter.op("Greater", emitter.op("Size", wanted), emitter.const(0, np.int64))
    then, other = emitter.branch("some"), emitter.branch("all")
    some = then.op("GatherND", call.activation, then.op("Unsqueeze", wanted, then.ints(2)), batch_dims=1)
    every = other.op("Identity", call.activation)
    (read,) = emitter.when(asked, then, [some], other, [every], dtype=ir.DataType.FLOAT)
    read.shape = ir.Shape(["batch", "positions", call.inputs])
    call.reader.replace_input_with(0, read)
    graph.insert_before(call.reader, emitter.nodes)
    for value in graph.outputs:
        if value.name == "logits":
            value.shape = ir.Shape(["batch", "positions", call.outputs])

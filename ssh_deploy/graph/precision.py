"""Weights stored as float16 behind a Cast, computed in float32: half the file, the same kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_SMALLEST = 1024  # elements: norms and biases stay as they are


def store_half(model: ir.Model) -> int:
    """Store every float32 initializer of ``model`` of at least 1024 numbers as float16, in place; returns how many.

    ORT folds the Casts when it loads the graph, so a run costs what it cost before.
    """
    graph = model.graph
    count = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _SMALLEST or value.is_graph_input():
            continue
        half = ir.Value(name=f"{name}/float16", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        half.const_value = ir.tensor(tensor.numpy().astype(np.float16), name=half.name)
        cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT}, name=f"{name}/cast")
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.dtype = f"{name}/float32", value.shape, ir.DataType.FLOAT
        for node, i in list(value.uses()):
            node.replace_input_with(i, wide)
        del graph.initializers[name]
        graph.register_initializer(half)
        graph.insert_before(graph[0], [cast])
        count += 1
    return count

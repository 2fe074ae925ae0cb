"""Nodes for a pass: names, constants shared by their content, and If branches; nothing here knows adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class Constants:
    """Initializers of the outermost graph by content: every branch reads them, ORT prepacks and folds them."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix
        self._known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(self, array: NDArray[Any]) -> ir.Value:
        """The initializer that holds ``array``, made if there is none."""
        array = np.ascontiguousarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._known:
            value = ir.Value(name=f"{self._prefix}/constant_{len(self._known)}", const_value=ir.tensor(array))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
            self._graph.register_initializer(value)
            self._known[key] = value
        return self._known[key]


class Emitter:
    """Collects nodes in order; `nodes` is then put into a graph or is the body of a branch."""

    def __init__(self, constants: Constants, scope: str) -> None:
        self.nodes: list[ir.Node] = []
        self._constants = constants
        self._scope = scope
        self._count = 0

    def const(self, value: Any, dtype: Any) -> ir.Value:
        """A constant of the outermost graph."""
        return self._constants(np.asarray(value, dtype=dtype))

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return self.const(values, np.int64)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node with one output and return that."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: ir.Value | None, outputs: int, **attributes: Any) -> Sequence[ir.Value]:
        """Append a node with several outputs and return them."""
        name = f"{self._scope}/{op_type}_{self._count}"
        self._count += 1
        node = ir.node(op_type, inputs, attributes=attributes or None, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_out{i}" if outputs > 1 else f"{name}_out"
        self.nodes.append(node)
        return node.outputs

    def branch(self, name: str) -> Emitter:
        """An emitter for a branch of this one's `when`."""
        return Emitter(self._constants, f"{self._scope}/{name}")

    def when(
        self,
        condition: ir.Value,
        then: Emitter,
        then_outputs: Sequence[ir.Value],
        other: Emitter,
        outputs: Sequence[ir.Value],
        *,
        dtype: ir.DataType | None = None,
    ) -> Sequence[ir.Value]:
        """Append ``If(condition)``; both branches give as many outputs of equal dtypes.

        ORT takes as a branch's output only what a node of that branch made. ``dtype``: of all of them, where they do
        not know it themselves.
        """
        if dtype is not None:
            for value in (*then_outputs, *outputs):
                value.dtype = dtype
        branches = {}
        for key, body, results in (("then_branch", then, then_outputs), ("else_branch", other, outputs)):
            branches[key] = ir.Graph([], list(results), nodes=body.nodes, name=f"{self._scope}/{key}")
        made = self.ops("If", condition, outputs=len(outputs), **branches)
        for value, result in zip(made, then_outputs, strict=True):
            if result.dtype is not None:
                value.dtype = result.dtype
        return made

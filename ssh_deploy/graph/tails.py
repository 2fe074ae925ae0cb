"""What follows a product on its own (the bias, the heads taken apart), found, copied into a branch and replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter


@dataclass(frozen=True, slots=True)
class Tail:
    """A product, ``out`` wide, and the nodes that alone read it, one after another up to a Transpose; maybe none.

    That is what follows query, key and value: the bias, then the heads taken apart.
    """

    product: ir.Value
    nodes: Sequence[ir.Node]
    out: int

    def joined(self, emitter: Emitter, term: ir.Value) -> ir.Value:
        """The tail of product + ``term``, in a branch; ``term`` itself where there is no tail."""
        if not self.nodes:
            return term
        return copied(emitter, self.nodes, self.product, emitter.op("Add", self.product, term))

    @property
    def token_sides(self) -> tuple[int, ...]:
        """Sides after the batch's that a term of one token a batch row has for `joined_token`.

        They are (heads, 1, width) where the tail takes heads apart, and (1, out) elsewhere.
        """
        shape = self.nodes[-1].outputs[0].shape if self.nodes else None
        if shape is None or len(shape) != 4 or len(self.nodes) < 2 or self.nodes[-2].op_type != "Reshape":
            return 1, self.out
        swapped = self.nodes[-1].attributes["perm"].as_ints() if "perm" in self.nodes[-1].attributes else ()
        heads, each = shape[1], shape[3]
        if list(swapped) != [0, 2, 1, 3] or not isinstance(heads, int) or not isinstance(each, int):
            return 1, self.out
        return heads, 1, each

    def joined_token(self, emitter: Emitter, term: ir.Value) -> ir.Value:
        """As `joined`, for ``term`` [batch, token_sides]: with one token, turning the heads round moves nothing."""
        if len(self.token_sides) == 2:
            return self.joined(emitter, term)
        value = copied(emitter, self.nodes[:-2], self.product, self.product)
        value = emitter.op("Reshape", value, emitter.ints(-1, *self.token_sides))
        return emitter.op("Add", value, term)


def tail_of(product: ir.Value) -> list[ir.Node]:
    """The nodes of the `Tail` of ``product``."""
    tail: list[ir.Node] = []
    value = product
    while not value.is_graph_output() and len(users := list(value.uses())) == 1 and users[0].idx == 0:
        node = users[0].node
        if node.op_type == "Transpose":
            return [*tail, node]
        others = [other for other in node.inputs if other is not value]
        biased = node.op_type == "Add" and all(other is not None and other.is_initializer() for other in others)
        if not biased and node.op_type != "Reshape":
            break
        tail.append(node)
        value = node.outputs[0]
    return []


def copied(emitter: Emitter, nodes: Sequence[ir.Node], old: ir.Value, new: ir.Value) -> ir.Value:
    """The chain ``nodes`` once more, in a branch, reading ``new`` where the first of them reads ``old``."""
    for node in nodes:
        inputs = [new if value is old else value for value in node.inputs]
        old, new = node.outputs[0], emitter.op(node.op_type, *inputs, **node.attributes)
    return new


def replace_tail(graph: ir.Graph, tail: Sequence[ir.Node], value: ir.Value) -> None:
    """Let ``value`` stand for what ``tail`` made."""
    old = tail[-1].outputs[0]
    value.shape = old.shape
    for node, i in list(old.uses()):
        node.replace_input_with(i, value)
    rename_output(graph, old, value)
    graph.remove(list(reversed(tail)), safe=True)


def rename_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be the output of ``graph`` that ``old`` is, if any, under its name."""
    for i, value in enumerate(graph.outputs):
        if value is old:
            name = old.name
            old.name = f"{new.name}/before"
            new.name, new.shape = name, old.shape
            graph.outputs[i] = new

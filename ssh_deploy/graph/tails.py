"""What follows a product on its own (the bias, the heads taken apart), found, copied into a branch and replaced."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter


def tail_of(product: ir.Value) -> list[ir.Node]:
    """The nodes that alone read ``product`` one after another up to a Transpose; empty when there is none.

    That is what follows query, key and value: the bias, then the heads taken apart.
    """
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

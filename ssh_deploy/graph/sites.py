"""Sites of a traced graph: which node is which module's weight, what it reads, where its answer comes out.

torch writes the module path of every node into its metadata (`pkg.torch.onnx.name_scopes`, the last but one entry).
A site is a MatMul or Gemm whose second input is an initializer, or the Transpose of one that others read too (an output
embedding tied to the input's): attention scores carry their module's path too. The activation is taken where it still
has the batch first: GPT-2's Conv1D flattens tokens with a Reshape before its Gemm and unflattens after it, so its site
reads before the one and answers after the other. A pooler's Gemm sees one token.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from ssh_deploy.errors import SlotError

SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One use of a module's weight.

    Attributes:
        module: path in the traced model.
        inputs, outputs: sides of its weight.
        nodes: the product and, where there is one, the Add of its bias; in order.
        reader: the node whose first input is the activation: the product, or the Reshape that flattens before it.
        product: what a slot adds to, of the same rank: W x before its bias where that is a node of its own, because ORT
            fuses the bias with what follows it (SkipLayerNormalization, BiasGelu) and must find the same pattern.
        result: what it answers, bias included, of the same rank.
        tokens: whether it sees a sequence.
    """

    module: str
    inputs: int
    outputs: int
    nodes: tuple[ir.Node, ...]
    reader: ir.Node
    product: ir.Value
    result: ir.Value
    tokens: bool

    @property
    def activation(self) -> ir.Value:
        """What it reads now: [batch, tokens, in], or [batch, in] when ``tokens`` is False.

        Before a Reshape that flattens tokens it may still be [batch, tokens, heads, in/heads].
        """
        value = self.reader.inputs[0]
        assert value is not None
        return value


def find_calls(graph: ir.Graph, *, root: str = "model") -> list[Call]:
    """Every use of a linear module's weight, in the graph's order.

    Args:
        graph: as `torch.onnx.export` wrote it.
        root: attribute of the traced wrapper that holds the model; stripped from module paths.
    """
    calls = []
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm", "MatMulNBits") or len(node.inputs) < 2:
            continue
        weight, module = node.inputs[1], module_of(node, root=root)
        if weight is None or not is_stored(weight) or not module:
            continue
        if node.op_type == "MatMulNBits":  # a quantised base; its bias is inside
            calls.append(_call(node, module, *(node.attributes[side].as_int() for side in "KN")))
            continue
        if weight.shape is None or len(weight.shape) != 2:
            continue
        sides = [int(side) for side in weight.shape.numpy()]
        transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        inputs, outputs = sides[::-1] if transposed else sides
        calls.append(_call(node, module, inputs, outputs))
    return calls


def by_module(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """Calls of each module, modules in the order of their first call."""
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.module, []).append(call)
    return found


def groups_of(calls: Iterable[Call]) -> list[list[Call]]:
    """Calls that read the same activation, together: they share its forward transform. In the graph's order."""
    found: dict[int, list[Call]] = {}
    for call in calls:
        found.setdefault(id(call.activation), []).append(call)
    return list(found.values())


def require_slots(call: Call) -> None:
    """Refuse a call whose activation has not the batch first.

    Raises:
        SlotError: with the shape.
    """
    shape = call.activation.shape
    if shape is None or len(shape) not in ((3, 4) if call.tokens else (2,)) or isinstance(shape[0], int):
        raise SlotError(
            f"{call.module} reads an activation of shape {shape}, not [batch, tokens, in].",
            hint="This architecture's layer cannot take a slot; leave it out of --sites, or use --mode merged.",
        )


def module_of(node: ir.Node, *, root: str = "model") -> str:
    """Path of the module that ``node`` was traced from, ``""`` where it does not say; ``root`` as in `find_calls`."""
    text = node.metadata_props.get(SCOPES)
    scopes = ast.literal_eval(text) if text else []
    return str(scopes[-2]).removeprefix(root).removeprefix(".") if len(scopes) >= 2 else ""


def _call(node: ir.Node, module: str, inputs: int, outputs: int) -> Call:
    activation, nodes, result = node.inputs[0], [node], node.outputs[0]
    assert activation is not None
    users = list(result.consumers())
    if node.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add":
        bias = [v for v in users[0].inputs if v is not result]
        if len(bias) == 1 and bias[0] is not None and is_stored(bias[0]) and len(bias[0].shape or ()) == 1:
            nodes.append(users[0])
            result = users[0].outputs[0]
    rank = len(activation.shape) if activation.shape is not None else 3
    before, users = activation.producer(), list(result.consumers())
    if rank == 2 and before is not None and before.op_type == "Reshape" and [u.op_type for u in users] == ["Reshape"]:
        unflattened = before.inputs[0]
        answered = users[0].outputs[0].shape
        if unflattened is not None and answered is not None and len(answered) == 3 and _batched(unflattened):
            outcome = users[0].outputs[0]
            return Call(module, inputs, outputs, tuple(nodes), before, outcome, outcome, True)
    return Call(module, inputs, outputs, tuple(nodes), node, node.outputs[0], result, rank == 3)


def is_stored(value: ir.Value) -> bool:
    """Whether a value is an initializer, or the Transpose or Cast of one (`precision.store_half`)."""
    node = value.producer()
    if node is None or node.op_type not in ("Cast", "Transpose"):
        return value.is_initializer()
    return node.inputs[0] is not None and is_stored(node.inputs[0])


def _batched(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) in (3, 4) and not isinstance(value.shape[0], int)


def index_table(groups: Iterable[Iterable[Call]]) -> dict[str, int]:
    """Row of each module in the banks' ``sites`` dimension: groups one after the other.

    Raises:
        SlotError: a module is called together with different others.
    """
    table: dict[str, int] = {}
    seen: dict[str, tuple[str, ...]] = {}
    for group in groups:
        names = tuple(dict.fromkeys(call.module for call in group))
        for name in names:
            if seen.setdefault(name, names) != names:
                raise SlotError(
                    f"{name} reads its activation once with {seen[name]} and once with {names}.",
                    hint="This architecture shares layers in a way that slots do not cover; use --mode merged.",
                )
            table.setdefault(name, len(table))
    return table

"""What follows a group's products on its own (heads taken apart, a gate, the residual), found, copied and replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter

#: Operators between products and what they are added to: a gate, a residual. Each element on its own, no constants.
_JOINING = ("Add", "Mul", "Sigmoid")
#: ORT fuses these with the sum before them, in the plain graph: the sum must stay where it is.
_FUSED = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True)
class Tail:
    """Products of one group with what alone reads them, up to the one value that others read; maybe no nodes.

    A chain up to a Transpose, after query, key and value: the bias, then the heads taken apart. Or what joins products
    with each other and with what was there before: a gate (SwiGLU), a residual.
    """

    products: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...] = ()

    @property
    def result(self) -> ir.Value:
        """What others read."""
        return self.nodes[-1].outputs[0] if self.nodes else self.products[0]

    def copied(self, emitter: Emitter, instead: Mapping[ir.Value, ir.Value] | None = None) -> ir.Value:
        """Its nodes once more, in a branch, for what ``instead`` has of the products; `result` of that."""
        found = {product: product for product in self.products} | dict(instead or {})
        value = found[self.products[0]]
        for node in self.nodes:
            inputs = [found.get(each, each) if each is not None else None for each in node.inputs]
            value = found[node.outputs[0]] = emitter.op(node.op_type, *inputs, **node.attributes)
        return value

    def joined(self, emitter: Emitter, terms: Mapping[ir.Value, ir.Value]) -> ir.Value:
        """The tail of products + their ``terms``, in a branch; the term itself where there is no tail."""
        if not self.nodes:
            return terms[self.products[0]]
        return self.copied(emitter, {each: emitter.op("Add", each, terms[each]) for each in self.products})

    @property
    def heads(self) -> tuple[int, int] | None:
        """(heads, width of each) where it takes heads apart."""
        if [node.op_type for node in self.nodes[-2:]] != ["Reshape", "Transpose"]:
            return None
        last = self.nodes[-1]
        swapped = last.attributes["perm"].as_ints() if "perm" in last.attributes else ()
        shape = last.outputs[0].shape
        if shape is None or len(shape) != 4 or list(swapped) != [0, 2, 1, 3]:
            return None
        heads, each = shape[1], shape[3]
        return (heads, each) if isinstance(heads, int) and isinstance(each, int) else None

    def token_sides(self, out: int) -> tuple[int, ...]:
        """Sides after the batch's that a term of one token a batch row, ``out`` wide, has for `joined_token`."""
        return (self.heads[0], 1, self.heads[1]) if self.heads else (1, out)

    def joined_token(self, emitter: Emitter, terms: Mapping[ir.Value, ir.Value]) -> ir.Value:
        """As `joined`, for terms [batch, token_sides]: with one token, turning the heads round moves nothing."""
        if self.heads is None:
            return self.joined(emitter, terms)
        value = Tail(self.products, self.nodes[:-2]).copied(emitter)
        value = emitter.op("Reshape", value, emitter.ints(-1, self.heads[0], 1, self.heads[1]))
        return emitter.op("Add", value, terms[self.products[0]])


def tails_of(products: Sequence[ir.Value], known: Callable[[ir.Value], bool]) -> list[Tail]:
    """Tails of the products of one group, each product in one.

    Args:
        products: of one group.
        known: whether a value is there before any of them.
    """
    chains = [Tail((product,), _chain(product)) for product in products]
    loose = tuple(chain.products[0] for chain in chains if not chain.nodes)
    joint = _joint(loose, known)
    return [chain for chain in chains if chain.nodes or not joint] + ([Tail(loose, joint)] if joint else [])


def replace_tail(graph: ir.Graph, tail: Tail, value: ir.Value) -> None:
    """Let ``value`` stand for what ``tail`` made."""
    old = tail.result
    value.shape = old.shape
    for node, i in list(old.uses()):
        node.replace_input_with(i, value)
    rename_output(graph, old, value)
    graph.remove(list(reversed(tail.nodes)), safe=True)


def rename_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be the output of ``graph`` that ``old`` is, if any, under its name."""
    for i, value in enumerate(graph.outputs):
        if value is old:
            name = old.name
            old.name = f"{new.name}/before"
            new.name, new.shape = name, old.shape
            graph.outputs[i] = new


def _chain(product: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes that alone read ``product``, one after another, up to a Transpose."""
    tail: list[ir.Node] = []
    value = product
    while not value.is_graph_output() and len(users := list(value.uses())) == 1 and users[0].idx == 0:
        node = users[0].node
        if node.op_type == "Transpose":
            return (*tail, node)
        others = [other for other in node.inputs if other is not value]
        biased = node.op_type == "Add" and all(other is not None and other.is_initializer() for other in others)
        if not biased and node.op_type != "Reshape":
            break
        tail.append(node)
        value = node.outputs[0]
    return ()


def _joint(products: Sequence[ir.Value], known: Callable[[ir.Value], bool]) -> tuple[ir.Node, ...]:
    """The nodes that join ``products`` with each other and with what is known, in order; none if two values leave."""
    made, nodes = list(products), list[ir.Node]()
    graphs = {product.graph for product in products}
    for value in made:  # grows
        for node in dict.fromkeys(value.consumers()):
            ready = all(other is not None and (other in made or known(other)) for other in node.inputs)
            if node.op_type in _JOINING and ready and node.graph in graphs and node not in nodes:
                nodes.append(node)
                made.append(node.outputs[0])
    leaving = [value for value in made if value.is_graph_output() or not set(value.consumers()) <= set(nodes)]
    if len(leaving) != 1 or not nodes or leaving[0] is not made[-1]:
        return ()
    return () if any(node.op_type in _FUSED for node in leaving[0].consumers()) else tuple(nodes)

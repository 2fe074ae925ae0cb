"""The pass that stores the base's weights as 8 or 4 bit integers, before slots go into the graph.

Every linear layer of the base (`sites.find_calls`) becomes one `com.microsoft.MatMulNBits`, which dequantises block by
block inside its kernel and adds the bias there: onnxruntime would move the bias in only where no slot stands between,
and a slot without an adapter would not have the plain graph's bits. Heads are left as they are; what belongs to
adapters goes in afterwards and is exact. An output embedding tied to the input's shares its codes with it through
GatherBlockQuantized: one copy of the largest weight of a small decoder, and the same numbers.

`int4` stores a few weights in 8 bits, which costs a tenth of the file and saves most of the damage. SmolLM2-135M, 2,300
tokens, perplexity 41.6 and 545 MB in float32: all in 4 bits 59.4 (90 MB); the embedding in 8 bits 54.3 (104 MB); values
and the way down of the MLP too 46.9 (118 MB); all in 8 bits 42.0 (159 MB). Sharing the embedding costs nothing (54.9
and 55.0) and saves 113 MB. An adapter suffers more than its base does: of what the adapter `chatterbot` gains (nats a
token) that last choice keeps 84 %; rounded by GPTQ with what `calibration` tells of the layers 93 %, and with the way
out of the attention in 8 bits too (121 MB) 99 %.

Why this and not onnxruntime's own quantisers: both take whatever MatMul has a constant, heads too, delete inputs that
nothing reads, and hold the model three times. Why MatMulNBits for 8 bits too:
`quantize_dynamic` scales activations by the largest of the whole batch, so that a row's answer depends on who shares
its batch (perplexity 72.6); here every block of every row has its own. On two cores a token takes 23 ms in float32, 15
in int8, 11 in int4; eight rows of one token 33, 25, 22. `quantize_dynamic` took 0.75 and 0.72 of float32's time.

Pre-condition: a plain graph as `trace` or `genai_builder` wrote it. Post-condition: the same
inputs, outputs and names of results; a second pass is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.errors import GraphError, UnknownNameError
from ssh_deploy.graph.blockwise import Blocks, quantize_blocks
from ssh_deploy.graph.sites import Call, find_calls, is_stored

#: Bits by the name of the quantisation.
BITS = {"int8": 8, "int4": 4}
BLOCK = 32
DOMAIN = "com.microsoft"
#: MatMulNBits: activations in int8, block by block; level 0 (float32) takes eleven times as long at one token.
_ACCURACY = 4
#: Layers that `int4` stores in 8 bits.
_TENDER = ("v_proj", "o_proj", "down_proj")
#: Most that codes may be off the weight they stand for, of its own size: 4 bits are at 0.07 to 0.15.
_FAR = 0.4


@dataclass(frozen=True, slots=True)
class Quantized:
    """What the pass did.

    Attributes:
        scheme: of `BITS`.
        block: numbers that share a scale.
        modules: bits of each quantised module.
        shared: whether the input embedding reads the codes of the output's.
        error: root of the mean squared error of all quantised numbers, as a share of their own.
        rounding: ``nearest``, or ``gptq`` where 4-bit weights were rounded by what their layers read.
        before, after: bytes of the quantised weights as stored.
    """

    scheme: str
    block: int
    modules: Mapping[str, int]
    shared: bool
    error: float
    rounding: str
    before: int
    after: int

    def as_dict(self) -> dict[str, Any]:
        """For deployment.json."""
        return {
            "scheme": self.scheme,
            "operator": f"{DOMAIN}.MatMulNBits",
            "block": self.block,
            "accuracy_level": _ACCURACY,
            "modules": dict(self.modules),
            "shared_embedding": self.shared,
            "weight_error": self.error,
            "rounding": self.rounding,
            "bytes_before": self.before,
            "bytes_after": self.after,
        }


def check_quantization(scheme: str, block: int = BLOCK) -> None:
    """Refuse what no kernel computes.

    Raises:
        UnknownNameError: no such scheme.
        GraphError: a block that is no power of two from 16 to 256.
    """
    if scheme not in BITS:
        raise UnknownNameError(f"No quantisation {scheme!r}.", hint=f"There is {', '.join(BITS)}.")
    if block not in (16, 32, 64, 128, 256):
        raise GraphError(f"Blocks of {block} numbers.", hint="Use 16, 32, 64, 128 or 256; 32 is tested most.")


def bits_of(module: str, *, scheme: str, embedding: str) -> int:
    """How many bits a number of ``module`` gets; ``embedding``: as in `quantize_weights`."""
    return 8 if module == embedding or module.endswith(_TENDER) else BITS[scheme]


def quantize_weights(
    model: ir.Model,
    *,
    scheme: str,
    block: int = BLOCK,
    keep: Collection[str] = (),
    embedding: str = "",
    moments: Callable[[str], NDArray[np.floating[Any]] | None] | None = None,
) -> Quantized:
    """Quantise the linear layers of ``model``, in place.

    Args:
        model: with its weights at hand.
        scheme: ``int8`` or ``int4``.
        block: numbers that share a scale.
        keep: modules left as they are (heads).
        embedding: module path of a decoder's output embedding; always 8 bits.
        moments: second moments of what a module reads (`calibration.Moments`), asked in the graph's order for modules
            that get 4 bits; None, of it or of a module: round to the nearest.

    Raises:
        UnknownNameError, GraphError: of `check_quantization`, a graph that is quantised already, or one with nothing
            to quantise.
    """
    check_quantization(scheme, block)
    graph = model.graph
    if any(node.domain == DOMAIN and node.op_type == "MatMulNBits" for node in graph):
        raise GraphError("The graph is quantised already.", hint="Quantise an export of the float32 checkpoint, once.")
    calls = [call for call in find_calls(graph) if call.module not in keep]
    if not calls:
        raise GraphError("No linear layer to quantise.", hint="Leave --quantize out.")
    inputs = [value.name for value in graph.inputs]
    made: dict[int, tuple[Blocks, dict[str, ir.Value]]] = {}
    modules: dict[str, int] = {}
    shared, compensated, wrong, norm, before = False, False, 0.0, 0.0, 0
    for call in calls:
        source, transposed = _source(call)
        bits = bits_of(call.module, scheme=scheme, embedding=embedding)
        if id(source) not in made:
            weight = _rows(source, transposed=transposed)
            known = moments(call.module) if moments is not None and bits == 4 else None
            compensated = compensated or known is not None
            blocks = quantize_blocks(weight, bits=bits, block=block, moments=known)
            made[id(source)] = blocks, _store(graph, source, blocks)
            dense = blocks.dense()
            wrong, norm = wrong + _square(dense - weight), norm + _square(weight)
            before += source.const_value.nbytes if source.const_value is not None else 0
        blocks, stored = made[id(source)]
        modules[call.module] = blocks.bits
        _replace(call, blocks, stored)
        shared = _share(graph, source, blocks, stored) or shared
    _forget_unread(graph)
    model.opset_imports[DOMAIN] = 1
    assert inputs == [value.name for value in graph.inputs]
    after = sum(blocks.nbytes for blocks, _ in made.values())
    error = float(np.sqrt(wrong / norm)) if norm else 0.0
    rounding = "gptq" if compensated else "nearest"
    return Quantized(scheme, block, modules, shared, error, rounding, before, after)


def hold_quantized(model: Any, stated: Mapping[str, Any], path: Path) -> None:
    """Set a torch model's weights to what their codes stand for, in place: the reference of a quantised graph.

    Args:
        model: the torch model that the graph was traced from; for a merged graph with its adapters in it.
        stated: as `Quantized.as_dict` gave it.
        path: of the graph.

    Raises:
        GraphError: codes that are missing, or that stand for other weights than the model's.
    """
    import torch

    modules, embedding = dict(model.named_modules()), model.get_input_embeddings()
    stored = _stored(ir.load(path).graph)
    with torch.no_grad():
        for name in stated["modules"]:
            module = modules[name]
            transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores [in, out]
            own = (module.weight.detach().T if transposed else module.weight.detach()).numpy()
            if name not in stored or stored[name].shape != own.shape:
                raise GraphError(f"{path}: no codes for {name}.", hint="deployment.json is not this graph's.")
            right = stored[name].dense()
            if _square(right - own) > _FAR**2 * _square(own):
                raise GraphError(f"{path}: the codes of {name} are of another weight.", hint="Is this its base?")
            dense = torch.from_numpy(right)
            if embedding is not None and module.weight is embedding.weight and not stated["shared_embedding"]:
                module.weight = torch.nn.Parameter(dense, requires_grad=False)
            else:
                module.weight.copy_(dense.T if transposed else dense)


def _stored(graph: ir.Graph) -> dict[str, Blocks]:
    """The codes of every quantised module of ``graph``."""
    found = {}
    for call in find_calls(graph):
        node = call.nodes[0]
        if node.op_type == "MatMulNBits":
            parts = [value.const_value.numpy() for value in node.inputs[1:4] if value is not None and value.const_value]
            bits, block = (node.attributes[key].as_int() for key in ("bits", "block_size"))
            found[call.module] = Blocks((call.outputs, call.inputs), bits, block, *parts)
    return found


def _source(call: Call) -> tuple[ir.Value, bool]:
    """The initializer of a call's weight, and whether it is stored [out, in]."""
    node = call.nodes[0]
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    value = node.inputs[1]
    assert value is not None
    while not value.is_initializer():
        before = value.producer()
        assert before is not None
        transposed ^= before.op_type == "Transpose"
        value = before.inputs[0]
        assert value is not None
    return value, transposed


def _rows(source: ir.Value, *, transposed: bool) -> NDArray[np.float32]:
    """The weight as f32 [out, in]."""
    assert source.const_value is not None
    array = np.asarray(source.const_value.numpy(), dtype=np.float32)
    return array if transposed else array.T


def _square(array: NDArray[np.float32]) -> float:
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))


def _store(graph: ir.Graph, source: ir.Value, blocks: Blocks) -> dict[str, ir.Value]:
    stored = {}
    for part in ("codes", "scales", "zeros"):
        array = getattr(blocks, part)
        value = ir.Value(name=f"{source.name}/{part}", const_value=ir.tensor(array))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        graph.register_initializer(value)
        stored[part] = value
    return stored


def _replace(call: Call, blocks: Blocks, stored: Mapping[str, ir.Value]) -> None:
    """Put a MatMulNBits under the name of the product's result in the place of a MatMul or Gemm."""
    node = call.nodes[0]
    rows, cols = blocks.shape
    attributes = {"K": cols, "N": rows, "bits": blocks.bits, "block_size": blocks.block, "accuracy_level": _ACCURACY}
    inputs = [node.inputs[0], stored["codes"], stored["scales"], stored["zeros"]]
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else _without_bias(node.outputs[0])
    if bias is not None:
        inputs += [None, bias]
    new = ir.node("MatMulNBits", inputs, attributes=attributes, domain=DOMAIN, name=f"{node.name}_Q{blocks.bits}")
    new.metadata_props.update(node.metadata_props)
    _swap(node, new)


def _without_bias(product: ir.Value) -> ir.Value | None:
    """Take the Add of a bias behind ``product`` out of the graph; its bias."""
    users = list(product.consumers())
    if len(users) != 1 or users[0].op_type != "Add":
        return None
    add = users[0]
    bias = next((v for v in add.inputs if v is not None and v is not product), None)
    if bias is None or not is_stored(bias) or bias.shape is None or len(bias.shape) != 1:
        return None
    graph, total = add.graph, add.outputs[0]
    assert graph is not None
    if total.is_graph_output():
        name = total.name
        total.name, product.name = product.name, name
    ir.convenience.replace_all_uses_with(total, product, replace_graph_outputs=True)
    graph.remove(add, safe=True)
    return bias


def _share(graph: ir.Graph, source: ir.Value, blocks: Blocks, stored: Mapping[str, ir.Value]) -> bool:
    """Let a Gather of whole rows of the weight read the codes too, where no row ends inside a block."""
    rows, cols = blocks.shape
    gathers = [
        node for table in _tables(source, rows) for node, i in table.uses() if (node.op_type, i) == ("Gather", 0)
    ]
    if not gathers or cols % blocks.block:
        return False
    flat = ir.Value(name=f"{source.name}/rows", const_value=ir.tensor(np.array([rows, -1])))
    flat.shape, flat.dtype = ir.Shape([2]), ir.DataType.INT64
    graph.register_initializer(flat)
    table = ir.node("Reshape", [stored["codes"], flat], name=f"{source.name}/table")
    table.outputs[0].name, table.outputs[0].dtype = f"{source.name}/table_out", ir.DataType.UINT8
    graph.insert_before(graph[0], [table])
    attributes = {"bits": blocks.bits, "block_size": blocks.block, "gather_axis": 0, "quantize_axis": 1}
    for node in gathers:
        inputs = [table.outputs[0], node.inputs[1], stored["scales"], stored["zeros"]]
        _swap(
            node, ir.node("GatherBlockQuantized", inputs, attributes=attributes, domain=DOMAIN, name=f"{node.name}_Q")
        )
    return True


def _tables(source: ir.Value, rows: int) -> list[ir.Value]:
    """Values that hold the weight [out, in]: the initializer, or a Transpose of it; either may be behind a Cast."""
    found, left = [], [(source, source.shape is not None and source.shape[0] == rows)]
    while left:
        value, upright = left.pop()
        found += [value] if upright else []
        for node, _ in value.uses():
            if node.op_type in ("Cast", "Transpose"):
                left.append((node.outputs[0], upright ^ (node.op_type == "Transpose")))
    return found


def _swap(old: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of ``old``, its result under the old one's name."""
    graph, before, result = old.graph, old.outputs[0], new.outputs[0]
    assert isinstance(graph, ir.Graph)
    result.shape, result.type = before.shape, before.type
    graph.insert_before(old, [new])
    ir.convenience.replace_all_uses_with(before, result, replace_graph_outputs=True)
    result.name, before.name = before.name, f"{before.name}/float"
    graph.remove(old, safe=True)


def _forget_unread(graph: ir.Graph) -> None:
    """Take out the weights that were replaced, and the Transposes and Casts that led to them."""
    for node in reversed(list(graph)):
        if node.op_type in ("Cast", "Transpose") and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[name]

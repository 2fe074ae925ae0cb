"""The quantising pass on graphs of a few layers: kinds of slots, biases, ties; no torch."""

import numpy as np
import onnx_ir as ir
import pytest
from layer_graphs import Case, graph_of, layer, session_of, tensor, tokens

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.graph.blockwise import quantize_blocks
from ssh_deploy.graph.quantizing import quantize_weights
from ssh_deploy.graph.slots import Plan, add_slots

WEIGHTS = {"a": layer(24, 64), "b": layer(40, 64, 1)}


def slotted(kinds, scheme, *, bias=True, weights=WEIGHTS):
    model = graph_of(weights, bias=bias)
    quantize_weights(model, scheme=scheme)
    add_slots(model, Plan(tuple(weights), kinds, (), frozenset(), "float16"))
    return model


def near(got, want, *, share=0.02):
    for one, other in zip(got, want, strict=True):
        assert np.sqrt(np.square(one - other).mean()) < share * np.std(other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", [("hartley",), ("lowrank",), ("diagonal",), ("hartley", "cosine", "diagonal")])
def test_without_an_adapter_every_bit_is_the_quantised_plain_graphs(kinds, bias):
    plain, slots = graph_of(WEIGHTS, bias=bias), slotted(kinds, "int8", bias=bias)
    quantize_weights(plain, scheme="int8")
    x = np.random.default_rng(2).normal(size=(3, 5, 64)).astype(np.float32)
    for one, other in zip(session_of(plain).run(None, {"x": x}), session_of(slots).run(None, {"x": x}), strict=True):
        assert one.tobytes() == other.tobytes()


def test_an_adapters_part_is_exact():
    """Answers with the adapter minus answers without are its own, to float32's rounding."""
    case = Case(WEIGHTS, bias=True)
    adapter = case.adapter(3)
    model = slotted(("hartley",), "int4")
    session, x = session_of(model), tokens(case, 2, 4)
    with_it, without = session.run(None, {"x": x, **case.feeds(adapter)}), session.run(None, {"x": x})
    exact, plain = case.run(x, **case.feeds(adapter)), case.run(x)
    for on, off, right_on, right_off in zip(with_it, without, exact, plain, strict=True):
        np.testing.assert_allclose(on - off, right_on - right_off, atol=2e-5 * np.abs(right_on).max())
        assert not np.allclose(off, right_off, rtol=1e-4)  # the base itself is another


def test_maps_of_the_answers_know_of_the_bias_that_is_inside_now():
    case = Case(WEIGHTS, kinds=("diagonal",), bias=True)
    rng, deltas = np.random.default_rng(4), {}
    for module, weight in WEIGHTS.items():
        outer, shift = (rng.uniform(1.5, 3, size=weight.shape[0]).astype(np.float32) for _ in range(2))
        deltas[module] = DiagonalDelta(weight.shape, {}, outer=outer, shift=shift)
    adapter = Adapter("scales", deltas, {}, "scales", None)
    model = slotted(("diagonal",), "int8")
    x = tokens(case, 2, 4)
    got = session_of(model).run(None, {"x": x, **case.feeds(adapter)})
    want = []
    for module, weight in WEIGHTS.items():
        dense = quantize_blocks(weight, bits=8, block=32).dense()
        delta = deltas[module]
        want.append(delta.outer * (x @ dense.T + np.arange(weight.shape[0])) + delta.shift)
    near(got, want)


def test_bits_blocks_and_names_are_told():
    model = graph_of({"layers.0.v_proj": layer(8, 64), "layers.0.q_proj": layer(8, 64, 1), "head": layer(4, 64, 2)})
    made = quantize_weights(model, scheme="int4", keep=["head"])
    assert made.modules == {"layers.0.v_proj": 8, "layers.0.q_proj": 4}
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["MatMulNBits", "MatMulNBits", "MatMul"]
    assert model.opset_imports["com.microsoft"] == 1
    assert [value.name for value in model.graph.outputs] == ["layers.0.v_proj.y", "layers.0.q_proj.y", "head.y"]
    stored = {name: value.const_value.nbytes for name, value in model.graph.initializers.items()}
    assert "layers.0.q_proj.w" not in stored
    assert sum(size for name, size in stored.items() if "_proj" in name) == made.after
    assert (made.before, made.after) == (2 * 8 * 64 * 4, 8 * (64 + 2 * 4 + 2) + 8 * (32 + 2 * 4 + 1))


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("width", [64, 48])
def test_a_tied_table_is_read_from_the_same_codes_where_its_rows_end_with_a_block(upright, width):
    """A table [rows, width] that a Gather reads and a MatMul through a Transpose, or the other way around."""
    table = layer(30, width)
    stored = tensor("table", table if upright else np.ascontiguousarray(table.T))
    ids = ir.Value(name="ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    turned = ir.node("Transpose", [stored], attributes={"perm": [1, 0]}, name="turn")
    rows, cols = (stored, turned.outputs[0]) if upright else (turned.outputs[0], stored)
    turned.outputs[0].name, turned.outputs[0].dtype = "turned", ir.DataType.FLOAT
    turned.outputs[0].shape = ir.Shape([width, 30] if upright else [30, width])
    gather = ir.node("Gather", [rows, ids], name="embed")
    scopes = {"pkg.torch.onnx.name_scopes": str(["", "model", "model.lm_head", "linear"])}
    product = ir.node("MatMul", [gather.outputs[0], cols], metadata_props=scopes, name="lm_head")
    for node, name, side in ((gather, "hidden", width), (product, "logits", 30)):
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(["batch", "sequence", side])
    outputs = [gather.outputs[0], product.outputs[0]]
    graph = ir.Graph([ids], outputs, nodes=[turned, gather, product], initializers=[stored], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    made = quantize_weights(model, scheme="int4", embedding="lm_head")
    assert made.modules == {"lm_head": 8}
    assert made.shared == (width == 64)
    assert ("table" in graph.initializers) == (width != 64)
    dense = quantize_blocks(table, bits=8, block=32).dense()
    given = np.array([[0, 29, 7]])
    hidden, logits = session_of(model).run(None, {"ids": given})
    np.testing.assert_allclose(hidden, (dense if made.shared else table)[given], atol=1e-6)
    near([logits], [hidden @ dense.T])

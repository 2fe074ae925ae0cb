"""What follows products on its own: a gate and a residual move into the branches, and only where no bit can change."""

import numpy as np
import onnx_ir as ir
import pytest
from layer_graphs import GUARD, PAST, dense, layer, session_of
from onnx import TensorProto, helper, numpy_helper

from ssh_deploy.graph.bank_file import Layout, adapter_rows, stack_rows
from ssh_deploy.graph.slots import Plan, add_slots
from ssh_deploy.testing import random_adapter

WEIGHTS = {"gate": layer(24, 16), "up": layer(24, 16, 1), "down": layer(16, 24, 2)}
KINDS = ("Pow", "LayerNormalization", "gate is an output", "residual comes later")


def block(after):
    """silu(gate x) · up x → down → + x, as SwiGLU layers are traced, and ``after`` behind it."""
    nodes, constants, outputs = [], [numpy_helper.from_array(np.float32(2), "two")], ["sum", "y"]

    def op(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))

    def linear(module, read, output):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(WEIGHTS[module].T), f"{module}.w"))
        op("MatMul", [read, f"{module}.w"], output)
        nodes[-1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", f"model.{module}", "linear"]))

    linear("gate", "x", "gated")
    linear("up", "x", "risen")
    op("Sigmoid", ["gated"], "sigmoid")
    op("Mul", ["gated", "sigmoid"], "silu")
    op("Mul", ["silu", "risen"], "inner")
    linear("down", "inner", "fallen")
    later = after == "residual comes later"
    if later:
        op("Neg", ["x"], "residual")
    op("Add", ["residual" if later else "x", "fallen"], "sum")
    if after == "LayerNormalization":
        constants.append(numpy_helper.from_array(np.ones(16, np.float32), "ones"))
        op("LayerNormalization", ["sum", "ones"], "y")
    else:
        op("Pow", ["sum", "two"], "y")
    if after == "gate is an output":
        outputs.append("gated")
    widths = {"gated": 24, "risen": 24, "fallen": 16, "inner": 24, "sum": 16, "y": 16}
    typed = {
        n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "sequence", w]) for n, w in widths.items()
    }
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 16])]
    inputs.append(helper.make_tensor_value_info(PAST[0], TensorProto.FLOAT, [1]))
    inside = [value for name, value in typed.items() if name not in outputs]
    graph = helper.make_graph(nodes, "block", inputs, [typed[n] for n in outputs], constants, value_info=inside)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def answer(after, x, deltas):
    """What `block` gives, in float64, with ``deltas`` [out, in] by module."""
    gate, up, down = (WEIGHTS[name].astype(np.float64) + deltas.get(name, 0.0) for name in ("gate", "up", "down"))
    x = x.astype(np.float64)
    gated = x @ gate.T
    total = (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T + (-x if after == "residual comes later" else x)
    if after == "LayerNormalization":
        y = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + 1e-5)
    else:
        y = total**2
    return [total, y, gated] if after == "gate is an output" else [total, y]


@pytest.mark.parametrize("kinds", [("hartley",), ("hartley", "lowrank"), ("hartley", "cosine")])
@pytest.mark.parametrize("sites", [("gate", "up", "down"), ("gate", "down"), ("down",)])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("after", KINDS)
def test_a_gate_and_a_residual_answer_right_in_every_branch(after, length, sites, kinds):
    model = block(after)
    plain = session_of(model)
    slotted = add_slots(model, Plan(sites, kinds, (), frozenset()))
    slots, layout = session_of(model), Layout(slotted.table, kinds, (), "float16", GUARD, {})
    shapes = {site: WEIGHTS[site].shape for site in sites}
    forms = [("hartley", 8.0), ("cosine", 1.0) if "cosine" in kinds else ("hartley", 8.0)]
    adapters = [random_adapter(shapes, n=12, transform=t, alpha=a, seed=i) for i, (t, a) in enumerate(forms)]
    rows = [adapter_rows(adapter, layout, {m: m for m in sites}) for adapter in adapters]
    x = np.random.default_rng(3).normal(size=(3, length, 16)).astype(np.float32)
    x[0, 0] = -0.0
    feeds = {"x": x, PAST[0]: PAST[1]}
    for got, want in zip(slots.run(None, feeds), plain.run(None, feeds), strict=True):
        assert got.tobytes() == want.tobytes()
    banks, ids = stack_rows(rows, layout)
    got = slots.run(None, {**feeds, **banks, **{name: np.array([own[1], 0, own[0]]) for name, own in ids.items()}})
    for row, deltas in enumerate((adapters[1].deltas, {}, adapters[0].deltas)):
        changes = {module: dense(delta) for module, delta in deltas.items()}
        for mine, want in zip(got, answer(after, x[row], changes), strict=True):
            np.testing.assert_allclose(mine[row], want, rtol=0, atol=3e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize(
    ("sites", "after", "outside"),
    [
        (("gate", "up", "down"), "Pow", ["Add"]),  # what down contributes is in the residual
        (("gate", "up", "down"), "LayerNormalization", ["Add"]),
        (("gate", "up", "down"), "gate is an output", ["Mul", "Mul", "ScatterND", "ScatterND", "Sigmoid"]),
        (("gate", "up", "down"), "residual comes later", ["Add", "ScatterND"]),
        (("down",), "Pow", ["Mul", "Mul", "Sigmoid"]),
        # ORT makes one node of that Add and what follows
        (("down",), "LayerNormalization", ["Add", "Mul", "Mul", "ScatterND", "Sigmoid"]),
    ],
)
def test_only_what_reads_nothing_else_moves_into_the_branches(sites, after, outside):
    model = block(after)
    add_slots(model, Plan(sites, ("hartley",), (), frozenset()))
    moved = ("Add", "Mul", "ScatterND", "Sigmoid")
    mine = [node for node in model.graph if not (node.name or "").startswith("adapter/") or node.op_type == "ScatterND"]
    assert sorted(node.op_type for node in mine if node.op_type in moved) == outside


@pytest.mark.parametrize(
    ("kinds", "after", "there"),
    [
        (("hartley",), "Pow", ["hartley/gate"]),
        (("hartley",), "residual comes later", ["hartley/down", "hartley/gate"]),
        # an If a kind for what does not move; the last kind's serves both
        (("hartley", "cosine"), "Pow", ["cosine/gate", "hartley/down", "hartley/gate"]),
        (("hartley", "lowrank"), "Pow", ["hartley/down", "hartley/gate", "lowrank/down", "lowrank/gate"]),
    ],
)
def test_one_if_serves_a_gate_and_what_reads_it(kinds, after, there):
    model = block(after)
    add_slots(model, Plan(tuple(WEIGHTS), kinds, (), frozenset()))
    names = [node.name.split("/")[1:3] for node in model.graph if node.op_type == "If" and node.name.count("/") == 3]
    assert sorted("/".join(name) for name in names) == there


@pytest.mark.parametrize(("sites", "asked"), [(("gate", "up"), "Greater"), (("gate", "up", "down"), "And")])
def test_with_a_group_a_layer_the_adapter_is_asked_for_before_the_length(sites, asked):
    """One layer with a cache: one group passes one If without an adapter; of more, a token with its adapter does."""
    model = block("residual comes later")
    add_slots(model, Plan(sites, ("hartley",), (), frozenset()))
    outer = {
        node.inputs[0].producer().op_type
        for node in model.graph
        if (node.name or "").startswith("adapter/hartley/") and node.op_type == "If"
    }
    assert outer == {asked}

"""Slices of one value: a Split where they share it among themselves, and themselves wherever they do not."""

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_graphs import session_of

from ssh_deploy.graph.slices import split_where_sliced

END = np.iinfo(np.int64).max


def graph_of(slices, *, side=8, known=True, outputs=()):
    """x → Neg → Slices (start, end, axis, step), each followed by a Neg; ``outputs``: which Slices are, themselves."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", side]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, constants, found = [ir.node("Neg", [x], name="cut")], [], []
    nodes[0].outputs[0].name, nodes[0].outputs[0].dtype = "cut", ir.DataType.FLOAT
    nodes[0].outputs[0].shape = ir.Shape(["batch", side]) if known else None
    for i, part in enumerate(slices):
        inputs = []
        for name, number in zip(("start", "end", "axis", "step"), part, strict=True):
            value = ir.Value(name=f"{name}{i}", const_value=ir.tensor(np.array([number])))
            value.shape, value.dtype = ir.Shape([1]), ir.DataType.INT64
            constants.append(value)
            inputs.append(value)
        nodes.append(ir.node("Slice", [nodes[0].outputs[0], *inputs], name=f"slice{i}"))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].dtype = f"part{i}", ir.DataType.FLOAT
        if i not in outputs:
            nodes.append(ir.node("Neg", nodes[-1].outputs, name=f"neg{i}"))
            nodes[-1].outputs[0].name, nodes[-1].outputs[0].dtype = f"y{i}", ir.DataType.FLOAT
        found.append(nodes[-1].outputs[0])
    graph = ir.Graph([x], found, nodes=nodes, initializers=constants, opset_imports={"": 20}, name="test")
    return ir.Model(graph, ir_version=10)


def kinds(model):
    return [node.op_type for node in model.graph if node.op_type != "Neg"]


@given(cuts=st.sets(st.integers(1, 7), min_size=1, max_size=4), order=st.randoms(use_true_random=False), data=st.data())
def test_slices_that_share_a_value_become_one_split_of_the_same_bits(cuts, order, data):
    ends = [0, *sorted(cuts), 8]
    parts = [
        (
            data.draw(st.sampled_from([start, start - 8])),
            data.draw(st.sampled_from([8, END] if end == 8 else [end, end - 8])),
            data.draw(st.sampled_from([1, -1])),
            1,
        )
        for start, end in pairwise(ends)
    ]
    order.shuffle(parts)
    model, plain = graph_of(parts), session_of(graph_of(parts))
    split_where_sliced(model.graph)
    model.graph.sort()
    assert kinds(model) == ["Split"]
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    for got, want in zip(session_of(model).run(None, {"x": x}), plain.run(None, {"x": x}), strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("slices", "about"),
    [
        ([(0, 4, 1, 1)], {}),  # alone
        ([(0, 3, 1, 1), (4, 8, 1, 1)], {}),  # a gap
        ([(0, 5, 1, 1), (4, 8, 1, 1)], {}),  # twice
        ([(0, 4, 1, 1), (4, 7, 1, 1)], {}),  # the end is missing
        ([(0, 4, 1, 1), (4, 8, 1, 1), (4, 8, 1, 1)], {}),
        ([(0, 8, 1, 2), (1, 8, 1, 2)], {}),  # steps
        ([(0, 1, 0, 1), (1, END, 0, 1)], {}),  # rows
        ([(0, 4, 1, 1), (4, 8, 1, 1)], {"known": False}),
        ([(0, 4, 1, 1), (4, 8, 1, 1)], {"outputs": (1,)}),
        ([(4, 4, 1, 1), (0, 4, 1, 1), (4, 8, 1, 1)], {}),  # nothing
    ],
)
def test_other_slices_stay(slices, about):
    model = graph_of(slices, **about)
    split_where_sliced(model.graph)
    assert kinds(model) == ["Slice"] * len(slices)

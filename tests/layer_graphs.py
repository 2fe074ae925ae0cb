"""Graphs of a few linear layers, with and without slots, for tests without torch."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ssh_deploy.graph.bank_file import Layout, adapter_rows
from ssh_deploy.graph.slots import Plan, add_slots
from ssh_deploy.testing import random_adapter
from ssh_deploy.transforms import reference

GUARD = (3, 0, 5)


def tensor(name, array):
    value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    return value


PAST = ("past_key_values.0.key", np.zeros(1, np.float32))


def graph_of(weights, *, bias=False, past=False, heads=None):
    """Linear layers {module: W [out, in]} that read one input x [batch, sequence, in]; outputs in order.

    ``past``: with an input as decoders have them, which nothing reads. ``heads``: so wide, taken apart and turned
    round, as behind query, key and value: outputs are [batch, out/heads, sequence, heads].
    """
    n_in = next(iter(weights.values())).shape[1]
    x = ir.Value(name="x", shape=ir.Shape(["batch", "sequence", n_in]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, outputs, constants = [], [], []
    for module, weight in weights.items():
        scopes = {"pkg.torch.onnx.name_scopes": str(["", "model", f"model.{module}", "linear"])}
        constants.append(tensor(f"{module}.w", np.ascontiguousarray(weight.T)))
        node = ir.node("MatMul", [x, constants[-1]], metadata_props=scopes, name=module)
        nodes.append(node)
        if bias:
            constants.append(tensor(f"{module}.b", np.arange(weight.shape[0], dtype=np.float32)))
            nodes.append(ir.node("Add", [node.outputs[0], constants[-1]], name=f"{module}.add"))
        out = nodes[-1].outputs[0]
        node.outputs[0].name = f"{module}.product"
        node.outputs[0].shape = ir.Shape(["batch", "sequence", weight.shape[0]])
        out.name, out.shape = f"{module}.y", ir.Shape(["batch", "sequence", weight.shape[0]])
        node.outputs[0].dtype = out.dtype = ir.DataType.FLOAT
        if heads is not None:
            constants.append(tensor(f"{module}.apart", np.array([0, 0, weight.shape[0] // heads, heads])))
            nodes.append(ir.node("Reshape", [out, constants[-1]], name=f"{module}.reshape"))
            nodes.append(ir.node("Transpose", nodes[-1].outputs, attributes={"perm": [0, 2, 1, 3]}, name=f"{module}.t"))
            nodes[-2].outputs[0].name = f"{module}.parts"
            out = nodes[-1].outputs[0]
            out.name, out.dtype = f"{module}.heads", ir.DataType.FLOAT
            out.shape = ir.Shape(["batch", weight.shape[0] // heads, "sequence", heads])
        outputs.append(out)
    inputs = [x]
    if past:
        inputs.append(ir.Value(name=PAST[0], shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)))
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 20}, name="test")
    return ir.Model(graph, ir_version=10)


def session_of(model, *, threads=2, saved=None):
    """A session of ``model``, which is written to ``saved`` as onnxruntime runs it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


class Case:
    """A graph with slots on all its layers, beside the same graph without."""

    def __init__(self, weights, *, kinds=("hartley",), dtype="float16", bias=False, threads=2, past=False, heads=None):
        self.weights, self.heads = weights, heads
        self.plain = session_of(graph_of(weights, bias=bias, heads=heads), threads=threads)
        model, self.past = graph_of(weights, bias=bias, past=past, heads=heads), dict([PAST] if past else [])
        slotted = add_slots(model, Plan(tuple(weights), kinds, (), frozenset(), dtype))
        self.layout = Layout(slotted.table, kinds, (), dtype, GUARD, {})
        self.slots = session_of(model, threads=threads)

    def adapter(self, seed, n=12, transform="hartley", alpha=None):
        shapes = {m: w.shape for m, w in self.weights.items()}
        size = 1.0 if transform == "cosine" else 10.0
        return random_adapter(shapes, n=n, transform=transform, alpha=alpha or size, seed=seed)

    def rows(self, adapter):
        return adapter_rows(adapter, self.layout, {m: m for m in self.weights})

    def feeds(self, adapter):
        return {key: array[None] for key, array in self.rows(adapter).items()}

    def run(self, x, **feeds):
        return self.slots.run(None, {"x": x, **self.past, **feeds})

    def want(self, adapter, x, *, dtype=np.float16):
        """Plain answers plus x ΔWᵀ, ΔW from the definition in float64."""
        answers = []
        for (module, delta), plain in zip(adapter.deltas.items(), self.plain.run(None, {"x": x}), strict=True):
            change = dense(delta, dtype)
            assert change.shape == self.weights[module].shape
            term = x @ change.T
            if self.heads is not None:
                term = term.reshape(*term.shape[:2], -1, self.heads).transpose(0, 2, 1, 3)
            answers.append(plain + term)
        return answers


def dense(delta, dtype=np.float16):
    """ΔW of a spectrum whose values are kept in ``dtype``, from the definition, float64."""
    values = delta.values.astype(dtype).astype(np.float64)
    return reference.delta(
        delta.transform, delta.rows, delta.cols, values, delta.shape, alpha=delta.alpha, norm=delta.norm
    )


def layer(n_out, n_in, seed=0):
    return np.random.default_rng(seed).normal(size=(n_out, n_in)).astype(np.float32)


def tokens(case, batch, length, seed=1):
    n_in = next(iter(case.weights.values())).shape[1]
    return np.random.default_rng(seed).normal(size=(batch, length, n_in)).astype(np.float32)

"""A small exported folder made by hand after the contract, independent of the exporter: dense matrices, two sites.

x = E[input_ids] (+ token types);  h = tanh(x W_qᵀ + Δ_q x);  y = h W_vᵀ + Δ_v h;  logits = head(mean of y)
"""

import hashlib
import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from ssh_deploy.testing import _save_tokenizer
from ssh_deploy.transforms import get_transform

SITES = {"layer.query": (10, 12), "layer.value": (8, 10)}  # (out, in)
VOCABULARY, GUARD = 64, (1234567, 0, 7654321)
KINDS = {"hartley": "adapter_", "cosine": "adapter_cosine_"}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"E": (VOCABULARY, 12), "layer.query": (10, 12), "layer.value": (8, 10), "head": (3, 8), "head_bias": (3,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_folder(folder, *, base_labels=0, dtype=np.float16, required=False, task="text-classification", kinds=KINDS):
    """Write the folder; returns it. ``kinds`` empty: no slots at all, as a plain or merged export."""
    folder.mkdir(parents=True)
    model = _model(base_labels, dtype, required, kinds)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    orders = {}
    for name in kinds:
        axis = get_transform(name).axis
        stages = {n: axis.two_stage(n) for shape in SITES.values() for n in shape}
        orders[name] = {str(n): [s.p, s.q] for n, s in stages.items()}
    fields = {
        "contract": 4,
        "base": "tiny",
        "fingerprint": "0" * 64,
        "architecture": "bert",
        "guard": list(GUARD) if kinds else None,
        "task": task,
        "opset": 20,
        "adapter_dtype": np.dtype(dtype).name,
        "adapter_inputs": "required" if required else "optional",
        "outputs": [{"name": "logits"}, {"name": "last_hidden_state"}],
        "inputs": ["input_ids", "attention_mask"],
        "hidden": 8,
        "padding": {},
        "sites": [{"module": m, "in": s[1], "out": s[0], "index": i} for i, (m, s) in enumerate(SITES.items())],
        "orders": orders,
        "kinds": [*kinds, "head"] if kinds else [],
        "head": {
            "module": "classifier",
            "in": 8,
            "labels": base_labels,
            "base_labels": ["no", "maybe", "yes"][:base_labels],
        },
        "dtype": "float32",
        "mode": "sidecar",
        "adapters": {},
    }
    (folder / "deployment.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 16}))
    _save_tokenizer(folder, roberta=False)
    (folder / "adapters").mkdir()
    return folder


def edit(folder, change):
    """Apply ``change(fields)`` to deployment.json."""
    path = folder / "deployment.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def add_stored(folder, name, arrays, *, labels=(), family="ssh"):
    """Write ``arrays`` (rows by input name, no leading side) as an adapter of the folder."""
    path = write_onnx_adapter(folder / "adapters" / f"{name}.onnx_adapter", arrays)
    entry = {
        "file": f"adapters/{name}.onnx_adapter",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "family": family,
        "labels": list(labels),
        "n": 1,
        "task": "text-classification",
    }
    edit(folder, lambda fields: fields["adapters"].update({name: entry}))
    return path


def write_onnx_adapter(path, arrays, *, guard=GUARD):
    tensors = {name: np.ascontiguousarray(a[None]) for name, a in arrays.items()}
    if guard is not None:
        tensors["adapter_guard"] = np.zeros(guard, np.uint8)
    file = ort.AdapterFormat()
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in tensors.items()})
    file.export_adapter(str(path))
    return path


def expected(texts_ids, delta, head, *, base=None):
    """Logits and hidden rows by the formula, float64: ``delta`` {site: ΔW}, ``head`` (weight, bias) or None."""
    w = {k: v.astype(np.float64) for k, v in (base or weights()).items()}
    logits, hidden = [], []
    for ids in texts_ids:
        x = w["E"][np.asarray(ids)]
        h = np.tanh(x @ (w["layer.query"] + delta.get("layer.query", 0)).T)
        y = h @ (w["layer.value"] + delta.get("layer.value", 0)).T
        hidden.append(y)
        if head is not None:
            logits.append(y.mean(axis=0) @ head[0].astype(np.float64).T + head[1])
    return logits, hidden


def _model(base_labels, dtype, required, kinds):
    w = weights()
    inits = [numpy_helper.from_array(w[k], k) for k in ("E", "layer.query", "layer.value")]
    inputs = [helper.make_tensor_value_info(n, T.INT64, ["batch", "tokens"]) for n in ("input_ids", "attention_mask")]
    nodes = []

    def lent(name, array, dims):
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), dims))
        if not required:
            inits.append(numpy_helper.from_array(array, name))

    def const(name, array):
        inits.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(kind, ins, out, **attributes):
        nodes.append(helper.make_node(kind, ins, [out], **attributes))
        return out

    const("axis0", np.array([0])), const("axis1", np.array([1])), const("zero", np.array(0)), const("one", np.array(1))
    const("minus", np.array([-1]))
    op("Shape", ["input_ids"], "batch_and_tokens")
    op("Slice", ["batch_and_tokens", "axis0", "axis1"], "batch_shape")
    op("Gather", ["E", "input_ids"], "x")

    def ids_of(name):
        lent(name, np.zeros(1, np.int64), [f"{name}_requests"])
        # any length but 1 and the batch is an error, and so is a negative id
        wide = op("Expand", [name, "batch_shape"], f"{name}_wide")
        flat = op("Reshape", [wide, "batch_shape"], f"{name}_flat")
        low = op("Less", [flat, "zero"], f"{name}_low")
        return op("Where", [low, const(f"{name}_far", np.array(1 << 40)), flat], f"{name}_ids")

    for kind, prefix in kinds.items():
        dims = [f"{prefix}adapters", len(SITES), f"{prefix}coefficients"]
        lent(f"{prefix}values", np.zeros((1, len(SITES), 0), dtype), dims)
        lent(f"{prefix}scales", np.ones((1, len(SITES)), np.float32), dims[:2])
        lent(f"{prefix}cols", np.zeros((1, len(SITES), 0), np.uint16), dims)
        for out, count in Counter(out for out, _ in SITES.values()).items():
            zeros = np.zeros((1, count, out + 1), np.uint16)
            lent(f"{prefix}row_pointers.{out}", zeros, [dims[0], *zeros.shape[1:]])
        ids_of(f"{prefix}ids")
        axis = get_transform(kind).axis
        for n in {side for shape in SITES.values() for side in shape}:
            matrix = np.empty((n, n))
            matrix[axis.two_stage(n).order] = axis.matrix(n)
            const(f"{prefix}F{n}", matrix.astype(np.float32))

    source = "x"
    for index, (site, (out, inn)) in enumerate(SITES.items()):
        op("Transpose", [site], f"{site}_t", perm=[1, 0])
        total = op("MatMul", [source, f"{site}_t"], f"{site}_plain")
        for prefix in kinds.values():
            total = _slot(nodes, const, op, prefix, index, source, total, out, inn)
        source = op("Tanh", [total], "h") if index == 0 else op("Identity", [total], "last_hidden_state")
    op("Cast", ["attention_mask"], "mask", to=T.FLOAT)
    op("Unsqueeze", ["mask", "minus"], "mask3")
    op("Mul", ["last_hidden_state", "mask3"], "kept")
    op("ReduceSum", ["kept", "axis1"], "sum", keepdims=0)
    op("ReduceSum", ["mask", "axis1"], "count", keepdims=1)
    op("Div", ["sum", "count"], "pooled")
    const("head", w["head"][:base_labels].T.copy().reshape(8, base_labels))
    const("head_bias", w["head_bias"][:base_labels])
    if kinds:
        lent("adapter_head.classifier.weight", np.zeros((1, 0, 8), np.float32), ["head_adapters", "labels", 8])
        lent("adapter_head.classifier.bias", np.zeros((1, 0), np.float32), ["head_adapters", "labels"])
        ids_of("adapter_head_ids")
        _head(op)
        lent("adapter_guard", np.zeros(GUARD, np.uint8), list(GUARD))
    else:
        op("MatMul", ["pooled", "head"], "own")
        op("Add", ["own", "head_bias"], "logits")
    outputs = [
        helper.make_tensor_value_info("logits", T.FLOAT, ["batch", "label_count"]),
        helper.make_tensor_value_info("last_hidden_state", T.FLOAT, ["batch", "tokens", 8]),
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, inits)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])


def _size_is_positive(op, source, out):
    shape = op("Shape", [source], f"{out}_shape")
    size = op("ReduceProd", [shape], f"{out}_size", keepdims=0)
    return op("Greater", [size, "zero"], out)


def _slot(nodes, const, op, prefix, index, source, plain, out, inn):
    """If(values) plain + x (F_outᵀ D F_in)ᵀ, D scattered per row of the batch."""
    p = f"{prefix}{index}/"
    gate = _size_is_positive(op, f"{prefix}cols", f"{p}gate")
    body = []

    def inner(kind, ins, name, **attributes):
        body.append(helper.make_node(kind, ins, [p + name], **attributes))
        return p + name

    at = const(f"{p}index", np.array(index))
    taken = {}
    widths = [width for width, _ in SITES.values()]
    within = const(f"{p}within", np.array(widths[:index].count(out)))
    parts = {part: (part, at) for part in ("values", "scales", "cols")} | {"pointers": (f"row_pointers.{out}", within)}
    for part, (name, place) in parts.items():
        mine = inner("Gather", [f"{prefix}{name}", f"{prefix}ids_ids"], f"{part}_rows", axis=0)
        taken[part] = inner("Gather", [mine, place], part, axis=1)
    values = inner("Cast", [taken["values"]], "values32", to=T.FLOAT)
    scale = inner("Unsqueeze", [taken["scales"], "minus"], "scale")
    scaled = inner("Mul", [values, scale], "scaled")
    cols = inner("Cast", [taken["cols"]], "cols64", to=T.INT64)
    shape = inner("Shape", [cols], "shape")
    # the row of coefficient k: how many rows have ended by then; padding has no row, and no value
    ends = inner("Unsqueeze", [inner("Cast", [taken["pointers"]], "ends64", to=T.INT64), "minus"], "ends")
    length = inner("Gather", [shape, "one"], "length", axis=0)
    ended = inner("LessOrEqual", [ends, inner("Range", ["zero", length, "one"], "k")], "ended")
    rows = inner("ReduceSum", [inner("Cast", [ended], "ended64", to=T.INT64), "axis1"], "after", keepdims=0)
    rows = inner("Sub", [rows, "one"], "begun")
    rows = inner("Min", [rows, const(f"{p}lowest", np.array(out - 1))], "rows")
    count = inner("Gather", ["batch_shape", "zero"], "count", axis=0)
    numbers = inner("Range", ["zero", count, "one"], "numbers")
    column = inner("Unsqueeze", [numbers, "minus"], "column")
    batch = inner("Expand", [column, shape], "batch")
    places = []
    for name, value in (("b", batch), ("r", rows), ("c", cols)):
        places.append(inner("Unsqueeze", [value, "minus"], f"{name}1"))
    place = inner("Concat", places, "place", axis=2)
    sides = const(f"{p}sides", np.array([out, inn]))
    full = inner("Concat", ["batch_shape", sides], "full", axis=0)
    zeros = inner("ConstantOfShape", [full], "zeros")
    d = inner("ScatterND", [zeros, place, scaled], "D", reduction="add")
    back = inner("Transpose", [f"{prefix}F{out}"], "back", perm=[1, 0])
    left = inner("MatMul", [back, d], "left")
    delta = inner("MatMul", [left, f"{prefix}F{inn}"], "delta")
    turned = inner("Transpose", [delta], "turned", perm=[0, 2, 1])
    added = inner("MatMul", [source, turned], "added")
    inner("Add", [plain, added], "then")
    then = helper.make_graph(body, f"{p}then", [], [helper.make_tensor_value_info(f"{p}then", T.FLOAT, None)])
    other = helper.make_graph(
        [helper.make_node("Identity", [plain], [f"{p}else"])],
        f"{p}other", [], [helper.make_tensor_value_info(f"{p}else", T.FLOAT, None)],
    )  # fmt: skip
    nodes.append(helper.make_node("If", [gate], [f"{p}out"], then_branch=then, else_branch=other))
    return f"{p}out"


def _head(op):
    gate = _size_is_positive(op, "adapter_head.classifier.weight", "head_gate")
    mine = [
        helper.make_node("Gather", ["adapter_head.classifier.weight", "adapter_head_ids_ids"], ["hw"], axis=0),
        helper.make_node("Gather", ["adapter_head.classifier.bias", "adapter_head_ids_ids"], ["hb"], axis=0),
        helper.make_node("Unsqueeze", ["pooled", "minus"], ["pooled_column"]),
        helper.make_node("MatMul", ["hw", "pooled_column"], ["column"]),
        helper.make_node("Squeeze", ["column", "minus"], ["row"]),
        helper.make_node("Add", ["row", "hb"], ["then_logits"]),
    ]
    own = [
        helper.make_node("MatMul", ["pooled", "head"], ["own"]),
        helper.make_node("Add", ["own", "head_bias"], ["else_logits"]),
    ]
    graphs = {
        key: helper.make_graph(body, key, [], [helper.make_tensor_value_info(f"{key}_logits", T.FLOAT, None)])
        for key, body in (("then", mine), ("else", own))
    }
    op("If", [gate], "logits", then_branch=graphs["then"], else_branch=graphs["else"])

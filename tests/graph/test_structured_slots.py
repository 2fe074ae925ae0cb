"""Slots for scales, thin maps and values at places against float64, on graphs of few layers: alone, mixed, wrong."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_graphs import Case, layer, session_of, tensor, tokens

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.deltas.reflection import ReflectionDelta, ThinMap
from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.graph.bank_file import Layout, adapter_rows, stack_rows
from ssh_deploy.graph.slots import Plan, add_slots
from ssh_deploy.testing import sparse_spectrum

MANY = {"q": layer(24, 36), "k": layer(12, 36, 1), "v": layer(12, 36, 2)}
KINDS = ("sparse", "diagonal", "reflection")


def of(case, name, deltas):
    return Adapter(name, deltas, {}, "", Path(name))


def scales(case, seed, *, sides="both", modules=None):
    """A random adapter of scales: of ``in``, ``out`` (with a shift), or ``both``."""
    rng, deltas = np.random.default_rng(seed), {}
    for module in modules or case.weights:
        n_out, n_in = case.weights[module].shape
        outer, shift, inner = (rng.uniform(-1.5, 1.5, size=n).astype("f") for n in (n_out, n_out, n_in))
        only = {"in": {"inner": inner}, "out": {"outer": outer, "shift": shift}}
        parts = only.get(sides) or only["in"] | only["out"]
        deltas[module] = DiagonalDelta((n_out, n_in), {}, **parts)
    return of(case, "scales", deltas)


def maps(case, seed, *, ranks=(2, 3), modules=None):
    """A random adapter of thin maps of two ranks, inner and outer; 0 is none."""
    rng, deltas = np.random.default_rng(seed), {}
    for module in modules or case.weights:
        n_out, n_in = case.weights[module].shape
        inner, outer = (
            ThinMap(*(rng.normal(size=(2, rank, n)) / np.sqrt(n))) if rank else None
            for rank, n in zip(ranks, (n_in, n_out), strict=True)
        )
        deltas[module] = ReflectionDelta((n_out, n_in), {}, inner=inner, outer=outer)
    return of(case, "maps", deltas)


def places(case, seed, *, n=20, modules=None):
    rng = np.random.default_rng(seed)
    shapes = {m: case.weights[m].shape for m in modules or case.weights}
    return of(case, "places", {m: SparseDelta(s, *sparse_spectrum(rng, s, n)) for m, s in shapes.items()})


MAKE = {"sparse": places, "diagonal": scales, "reflection": maps}


def changed(case, adapter, *, dtype=np.float16):
    """(W′, b′) in float64 by module, as the definitions say."""
    found = {}
    for module, weight in case.weights.items():
        w, delta = weight.astype(float), adapter.deltas.get(module)
        bias = np.arange(w.shape[0], dtype=float) * case.bias
        if isinstance(delta, DiagonalDelta):
            if delta.inner is not None:
                w = w * delta.inner
            if delta.outer is not None:
                w, bias = delta.outer[:, None] * w, delta.outer * bias + delta.shift
        elif isinstance(delta, ReflectionDelta):
            for side, m in ((1, delta.inner), (0, delta.outer)):
                if m is not None:
                    h = np.eye(m.side) + m.p.T @ m.q
                    w = w @ h if side else h @ w
        elif isinstance(delta, SparseDelta):
            w = w.copy()
            np.add.at(w, (delta.rows.astype(int), delta.cols.astype(int)), delta.values.astype(dtype).astype(float))
        found[module] = w, bias
    return found


class Layers(Case):
    def __init__(self, weights, *, kinds, bias=False, **more):
        super().__init__(weights, kinds=kinds, bias=bias, **more)
        self.bias = bias

    def answers(self, adapter, x):
        return [x @ w.T + b for w, b in changed(self, adapter).values()]


def close(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=4e-6 * max(1.0, float(np.abs(other).max())))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n_out=st.sampled_from([1, 2, 13, 24]),
    n_in=st.sampled_from([1, 5, 17, 36]),
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    bias=st.booleans(),
)
def test_any_shape_is_the_definition(kind, n_out, n_in, batch, length, bias):
    case = Layers({"a": layer(n_out, n_in)}, kinds=(kind,), bias=bias)
    adapter = MAKE[kind](case, 1)
    x = tokens(case, batch, length)
    close(case.run(x, **case.feeds(adapter)), case.answers(adapter, x))


@pytest.mark.parametrize("n", [27, 28, 300, 864])
def test_few_values_are_summed_and_many_multiplied(n):
    """Either side of a 32nd of 24×36; the same answers, also for an adapter padded into the wider bank."""
    case = Layers({"a": layer(24, 36), "b": layer(20, 36, 1)}, kinds=("sparse",))
    adapters = [places(case, 1, n=n), places(case, 2, n=5)]
    first = adapters[1].deltas["a"]
    first.rows[0] = first.cols[0] = 0  # the place that padding names, too
    banks, _ = stack_rows([case.rows(adapter) for adapter in adapters], case.layout)
    x = tokens(case, 3, 4)
    mixed = case.run(x, **banks, adapter_sparse_ids=np.array([2, 1, 0]))
    for i, adapter in ((0, adapters[1]), (1, adapters[0])):
        close([out[i : i + 1] for out in mixed], case.answers(adapter, x[i : i + 1]))
        alone = case.run(x[i : i + 1], **banks, adapter_sparse_ids=np.array([2 - i]))
        for one, other in zip(alone, mixed, strict=True):
            np.testing.assert_array_equal(one, other[i : i + 1])
    close([out[2:] for out in mixed], case.plain.run(None, {"x": x[2:]}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", [*[(kind,) for kind in KINDS], ("hartley", "lowrank", *KINDS)])
def test_without_an_adapter_every_bit_is_the_plain_graphs(bias, kinds):
    case = Layers(MANY, kinds=kinds, bias=bias)
    for batch, length in ((1, 1), (2, 5), (4, 3)):
        x = tokens(case, batch, length)
        x[0, 0] = -0.0
        for got, wanted in zip(case.run(x), case.plain.run(None, {"x": x}), strict=True):
            assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("make", "options"),
    [(scales, {"sides": "in"}), (scales, {"sides": "out"}), (maps, {"ranks": (1, 0)}), (maps, {"ranks": (0, 4)})],
)
def test_one_side_alone_leaves_the_other_closed(make, options):
    kind = {scales: "diagonal", maps: "reflection"}[make]
    case = Layers(MANY, kinds=(kind,), bias=True)
    adapter = make(case, 2, **options)
    feeds = case.feeds(adapter)
    empty = {name.split("_")[2].split(".")[0] for name, array in feeds.items() if not array.size}
    assert len(empty) == 1
    x = tokens(case, 3, 4)
    close(case.run(x, **feeds), case.answers(adapter, x))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_several_widths_and_one_left_alone(kind):
    case = Layers({**MANY, "g": layer(24, 36, 3)}, kinds=(kind,), bias=True)
    adapter = MAKE[kind](case, 3, modules=("q", "v", "g"))
    x = tokens(case, 3, 4)
    got = case.run(x, **case.feeds(adapter))
    close(got, case.answers(adapter, x))
    np.testing.assert_array_equal(got[1], case.plain.run(None, {"x": x})[1])


def test_every_row_of_a_mixed_batch_is_itself_alone():
    """All kinds and widths in one batch, spectra and the base beside them: each row's bits are those of its own run."""
    kinds = ("hartley", *KINDS)
    case = Layers(MANY, kinds=kinds, bias=True)
    adapters = [
        places(case, 1, n=5),
        case.adapter(5),
        scales(case, 2, sides="out"),
        maps(case, 3, ranks=(2, 0), modules=("k", "v")),
        scales(case, 4),
        maps(case, 5),
        places(case, 6, n=40, modules=("q",)),
    ]
    banks, ids = stack_rows([case.rows(adapter) for adapter in adapters], case.layout)
    assert ids == {
        "adapter_ids": [0, 1, 0, 0, 0, 0, 0],
        "adapter_sparse_ids": [1, 0, 0, 0, 0, 0, 2],
        "adapter_diagonal_ids": [0, 0, 1, 0, 2, 0, 0],
        "adapter_reflection_ids": [0, 0, 0, 1, 0, 2, 0],
    }
    rows = [6, None, 0, 1, 2, 3, 4, 5, 2]
    x = tokens(case, len(rows), 3)
    numbers = {name: np.array([0 if r is None else own[r] for r in rows]) for name, own in ids.items()}
    mixed = case.run(x, **banks, **numbers)
    for i, r in enumerate(rows):
        own = {name: number[i : i + 1] for name, number in numbers.items()}
        alone = case.run(x[i : i + 1], **banks, **own)
        for together, single in zip(mixed, alone, strict=True):
            np.testing.assert_array_equal(together[i : i + 1], single)
        plain = case.plain.run(None, {"x": x[i : i + 1]})
        if r is None:
            close(alone, plain)
        elif r == 1:
            for got, wanted in zip(alone, case.want(adapters[1], x[i : i + 1]), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * float(np.abs(wanted).max()))
        else:
            close(alone, case.answers(adapters[r], x[i : i + 1]))
            assert max(np.abs(a - b).max() for a, b in zip(alone, plain, strict=True)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_whatever_the_batch(kind, threads):
    case = Layers(MANY, kinds=(kind,), threads=threads)
    feeds = case.feeds(MAKE[kind](case, 1))
    x = tokens(case, 6, 40)
    whole = case.run(x, **feeds)
    for i in range(6):
        for together, alone in zip(whole, case.run(x[i : i + 1], **feeds), strict=True):
            np.testing.assert_array_equal(together[i : i + 1], alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fed", [True, False])
@pytest.mark.parametrize("ids", [[3], [-1], [0, 7], [1, -2], [0, 1, 1]])
def test_ids_that_mean_nothing_are_errors(kind, fed, ids):
    case = Layers({"a": layer(24, 36)}, kinds=(kind,))
    banks, _ = stack_rows([case.rows(MAKE[kind](case, seed)) for seed in (1, 2)], case.layout)
    with pytest.raises(Exception, match=r"(?i)error|invalid"):
        case.run(tokens(case, 2, 3), **(banks if fed else {}), **{f"adapter_{kind}_ids": np.array(ids)})


@pytest.mark.parametrize(
    ("part", "value"), [("rows", 24), ("cols", 36), ("rows", "ascending"), ("rows", 65535), ("cols", 65535)]
)
def test_places_that_mean_nothing_are_errors(part, value):
    """Also where what they mean instead lies in another row of the batch, which then is the base."""
    case = Layers({"a": layer(24, 36)}, kinds=("sparse",))
    banks, _ = stack_rows([case.rows(places(case, 1))], case.layout)
    array, ids = banks[f"adapter_sparse_{part}"], np.array([1, 0, 0])
    case.run(tokens(case, 3, 3), **banks, adapter_sparse_ids=ids)
    if value == "ascending":
        array[...] = np.sort(array, axis=-1)
    else:
        array[1, 0, 0] = value
    with pytest.raises(Exception, match=r"(?i)error|invalid"):
        case.run(tokens(case, 3, 3), **banks, adapter_sparse_ids=ids)


def test_float32_values_keep_every_bit():
    case = Layers({"a": layer(24, 36)}, kinds=("sparse",), dtype="float32")
    adapter = places(case, 1)
    assert case.rows(adapter)["adapter_sparse_values"].dtype == np.float32
    x = tokens(case, 2, 3)
    ((w, b),) = changed(case, adapter, dtype=np.float32).values()
    close(case.run(x, **case.feeds(adapter)), [x @ w.T + b])


def gemm_graph(weights, biases):
    """Layers as GPT-2's: one Reshape that flattens tokens, a Gemm each, a Reshape back; and a pooler's bare Gemm."""
    n_in = next(iter(weights.values())).shape[1]
    x = ir.Value(name="x", shape=ir.Shape(["batch", "sequence", n_in]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [tensor("flat", np.array([-1, n_in])), tensor("zero", np.array(0))]
    flatten = ir.node("Reshape", [x, constants[0]])
    flatten.outputs[0].shape, flatten.outputs[0].dtype = ir.Shape(["tokens", n_in]), ir.DataType.FLOAT
    nodes, outputs = [flatten], []
    for module, weight in weights.items():
        n_out = weight.shape[0]
        scopes = {"pkg.torch.onnx.name_scopes": str(["", "model", f"model.{module}", "addmm"])}
        w, b = tensor(f"{module}.w", np.ascontiguousarray(weight.T)), tensor(f"{module}.b", biases[module])
        back = tensor(f"{module}.shape", np.array([0, 0, n_out]))
        constants += [w, b, back]
        pooled = module == "pooler"
        read = flatten.outputs[0]
        if pooled:
            nodes.append(ir.node("Gather", [x, constants[1]], attributes={"axis": 1}))
            read = nodes[-1].outputs[0]
            read.shape, read.dtype = ir.Shape(["batch", n_in]), ir.DataType.FLOAT
        gemm = ir.node("Gemm", [read, w, b], metadata_props=scopes, name=module)
        nodes.append(gemm)
        y = gemm.outputs[0]
        y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape(["batch" if pooled else "tokens", n_out])
        if not pooled:
            batch = ir.node("Shape", [x], attributes={"start": 0, "end": 2})
            end = ir.node("Concat", [batch.outputs[0], tensor_of(constants, n_out)], attributes={"axis": 0})
            shape = ir.node("Reshape", [y, end.outputs[0]])
            nodes += [batch, end, shape]
            y = shape.outputs[0]
            y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape(["batch", "sequence", n_out])
        y.name = f"{module}.y"
        outputs.append(y)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports={"": 20}, name="gemms")
    return ir.Model(graph, ir_version=10)


def tensor_of(constants, n):
    constants.append(tensor(f"constant_{len(constants)}", np.array([n])))
    return constants[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_biases_inside_a_gemm_and_a_shared_reshape(kind):
    weights = {"q": layer(24, 36), "v": layer(24, 36, 1), "pooler": layer(12, 36, 2)}
    biases = {m: np.arange(w.shape[0], dtype=np.float32) - 3 for m, w in weights.items()}
    model = gemm_graph(weights, biases)
    plain = session_of(gemm_graph(weights, biases))
    slotted = add_slots(model, Plan(tuple(weights), (kind,), (), frozenset()))
    layout, session = Layout(slotted.table, (kind,), (), "float16", (3, 0, 5), {}), session_of(model)
    case = type("Layers", (), {"weights": weights, "bias": 0})
    adapter = MAKE[kind](case, 4, modules=("q", "pooler"))
    rows = adapter_rows(adapter, layout, {m: m for m in weights})
    x = np.random.default_rng(0).normal(size=(3, 5, 36)).astype(np.float32)
    got = session.run(None, {"x": x, **{key: array[None] for key, array in rows.items()}})
    untouched = plain.run(None, {"x": x})
    for i, (module, (w, _)) in enumerate(changed(case, adapter).items()):
        bias, delta = biases[module].astype(float), adapter.deltas.get(module)
        if isinstance(delta, DiagonalDelta):
            bias = delta.outer * bias + delta.shift
        close(got[i : i + 1], [(x[:, 0] if module == "pooler" else x) @ w.T + bias])
    np.testing.assert_array_equal(got[1], untouched[1])
    for one, other in zip(session.run(None, {"x": x}), untouched, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_without_these_slots_says_which_kinds_to_ask_for(kind):
    case = Layers({"a": layer(24, 36)}, kinds=("hartley",))
    with pytest.raises(AdapterMismatchError, match=rf"(?s)needs a {kind} slot; the graph has hartley.*hartley,{kind}"):
        case.rows(MAKE[kind](case, 1))


def test_numbers_beyond_their_dtype_are_refused():
    case = Layers({"a": layer(24, 36)}, kinds=KINDS)
    huge = {"a": DiagonalDelta((24, 36), {}, outer=np.full(24, 1e39))}
    with pytest.raises(AdapterMismatchError, match="numbers beyond float32"):
        case.rows(of(case, "x", huge))
    values = {"a": SparseDelta((24, 36), np.zeros(1, int), np.zeros(1, int), np.full(1, 7e4, "f"))}
    with pytest.raises(
        AdapterMismatchError, match=r"(?s)values up to 7e\+04 overflow float16.*--adapter-dtype float32"
    ):
        case.rows(of(case, "x", values))

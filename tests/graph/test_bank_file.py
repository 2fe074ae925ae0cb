"""Rows, banks and `.onnx_adapter` files: layout, padding, guard, refusals."""

import sys
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.deltas.spectral import SpectralDelta, stacked
from ssh_deploy.errors import AdapterMismatchError, DependencyError, GraphError, OutputError
from ssh_deploy.graph.bank_file import Layout, adapter_rows, stack_rows, write_onnx_adapter
from ssh_deploy.graph.guard import add_guard, guard_shape
from ssh_deploy.graph.precision import store_half
from ssh_deploy.testing import random_adapter, sparse_spectrum
from ssh_deploy.transforms import get_transform

SITES = (("a.q", 36, 24), ("a.v", 36, 24), ("b.q", 24, 13))
#: and of such outs that their rows come in blocks: 48 in two of 24, like those of 24; 36 in two of 18
BLOCKS = (("c.up", 24, 48), ("a.q", 36, 24), ("c.down", 24, 36), ("a.v", 36, 24), ("b.q", 24, 13), ("d.up", 9, 48))
PLACES = {"m.a.q": "a.q", "m.b.q": "b.q"}
SHAPES = {"m.a.q": (24, 36), "m.b.q": (13, 24)}
GUARD = (11, 0, 13)


def layout(**changes):
    fields = {
        "sites": SITES,
        "kinds": ("hartley", "cosine", "head"),
        "heads": (("dense", 6, 6), ("out", 6, 2)),
        "adapter_dtype": "float16",
        "guard": GUARD,
        "base_head": {},
    }
    return Layout(**(fields | changes))


def head(labels, *, seed=0, dense=True):
    rng = np.random.default_rng(seed)
    made = {"out": {"weight": rng.normal(size=(labels, 6)), "bias": rng.normal(size=labels)}}
    return ({"dense": {"weight": rng.normal(size=(6, 6)), "bias": np.ones(6)}} if dense else {}) | made


def site_definition(delta):
    """Values, rows, columns and scale of one site, as plainly as can be: renumbered, by row, then column."""
    spectrum = delta.separable()
    order = [get_transform(delta.transform).axis.two_stage(n).order for n in delta.shape]
    rows, cols = order[0][spectrum.rows], order[1][spectrum.cols]
    sort = sorted(range(rows.size), key=lambda k: (rows[k], cols[k], k))
    return spectrum.values[sort], rows[sort], cols[sort], delta.gain * spectrum.factor


def adapter_definition(adapter, layout, places):
    """`adapter_rows` of a spectral adapter, site by site and number by number."""
    made = {}
    for kind, prefix in (("hartley", "adapter_"), ("cosine", "adapter_cosine_")):
        sites = {places[m]: site_definition(d) for m, d in adapter.deltas.items() if d.axis.name == kind}
        if not sites:
            continue
        n = max(values.size for values, *_ in sites.values())
        dtypes = {
            "values": layout.adapter_dtype,
            "cols": layout.place_dtype,
            "scales": "float32",
        }
        blocks = {}  # (rows of a site's way back are taken in blocks of 2q of p·q) by width, of one q after another
        for row, (module, _, out) in enumerate(layout.sites):
            (p, q), _ = get_transform(kind).axis.output_order(out)
            width = q if p == 1 else 2 * q
            rows = sites[module][1] if module in sites else np.zeros(0)
            for first in range(0, out, width):
                pointers = [(rows < u).sum() for u in range(first, first + width + 1)]
                blocks.setdefault(width, []).append((q, row, pointers))
        for width, own in blocks.items():
            ordered = [pointers for *_, pointers in sorted(own, key=lambda block: block[:2])]
            made[f"{prefix}row_pointers.{width}"] = np.array(ordered, np.uint16)
        for part, dtype in dtypes.items():
            made[prefix + part] = np.zeros((len(layout.sites), n + 1)[: 1 if part == "scales" else 2], dtype)
        for row, (module, *_) in enumerate(layout.sites):
            if module in sites:
                values, _, cols, scale = sites[module]
                for part, numbers in (("values", values), ("cols", cols)):
                    for k, number in enumerate(numbers):
                        made[prefix + part][row, k] = number
                made[f"{prefix}scales"][row] = scale
    return made


@st.composite
def spectral_adapters(draw):
    """Adapters whose sites differ in n, transform, α, norm and dtypes, or agree, in any order of modules."""
    modules = draw(st.permutations([f"m.{module}" for module, *_ in BLOCKS]))[: draw(st.integers(1, 4))]
    shapes = {f"m.{module}": (out, inn) for module, inn, out in BLOCKS}
    common = draw(st.booleans())
    kinds, lengths = st.sampled_from(["hartley", "hartley-joint", "cosine"]), st.integers(0, 60)
    kind, n = draw(kinds), draw(lengths)
    deltas = {}
    for module in modules:
        kind, n = (kind, n) if common else (draw(kinds), draw(lengths))
        rows, cols, values = sparse_spectrum(np.random.default_rng(draw(st.integers(0, 99))), shapes[module], n)
        if draw(st.booleans()):  # many coefficients of joint spectra then fall on one place
            keep = np.unique(np.stack([rows % 2 * (shapes[module][0] // 2), cols % 3]), axis=1, return_index=True)[1]
            rows, cols, values = (rows % 2 * (shapes[module][0] // 2))[keep], (cols % 3)[keep], values[keep]
        if not common and draw(st.booleans()):
            rows, cols = rows.astype(np.int32), cols.astype(np.int32)
        values = values.astype(draw(st.sampled_from([np.float16, np.float32])))
        norm = draw(st.sampled_from(["ortho", "backward"]))
        deltas[module] = SpectralDelta(shapes[module], kind, rows, cols, values, draw(st.floats(-9, 9)), norm)
    return replace(random_adapter({}), deltas=deltas)


@settings(max_examples=150, deadline=None)
@given(adapter=spectral_adapters(), dtype=st.sampled_from(["float16", "float32"]))
def test_all_sites_at_once_are_bit_for_bit_what_each_is_alone(adapter, dtype):
    own, places = layout(sites=BLOCKS, adapter_dtype=dtype), {f"m.{module}": module for module, *_ in BLOCKS}
    got, want = adapter_rows(adapter, own, places), adapter_definition(adapter, own, places)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def test_sites_of_one_shape_and_length_are_one_stack():
    adapter = random_adapter({"a": (24, 36), "b": (24, 36), "c": (36, 24)}, n=9)
    assert [stack.keys for stack in stacked(adapter.deltas)[0]] == [("a", "b"), ("c",)]


def test_joint_spectra_take_four_coefficients_each():
    adapter = random_adapter({"m.a.q": (24, 36)}, n=7, transform="hartley-joint")
    rows = adapter_rows(adapter, layout(), PLACES)
    assert np.count_nonzero(rows["adapter_values"][0]) == 28
    assert rows["adapter_scales"][0] == np.float32(adapter.deltas["m.a.q"].gain * 0.5)


def test_more_places_than_can_be_numbered_are_refused_before_anything_is_made():
    delta = SpectralDelta(
        (1 << 24, 1 << 24), "hartley", *np.zeros((2, 1 << 16), np.uint32), np.ones(1 << 16, np.float16), 1.0, "ortho"
    )
    adapter = replace(random_adapter({}), deltas={"m.a.q": delta})
    with pytest.raises(AdapterMismatchError, match=r"65536 coefficients in a weight of 16777216×16777216.*63 bits"):
        adapter_rows(adapter, layout(sites=(("a.q", 1 << 24, 1 << 24),)), PLACES)


def test_more_coefficients_than_pointers_count_are_refused():
    n = 1 << 16
    delta = SpectralDelta(
        (1 << 9, 1 << 9), "hartley", *np.divmod(np.arange(n), 1 << 9), np.ones(n, np.float16), 1.0, "ortho"
    )
    adapter, own = replace(random_adapter({}), deltas={"m.a.q": delta}), layout(sites=(("a.q", 1 << 9, 1 << 9),))
    with pytest.raises(AdapterMismatchError, match=r"(?s)65,536 coefficients.*a slot takes 65,535.*--to lora"):
        adapter_rows(adapter, own, PLACES)


def test_rows_of_an_adapter():
    rows = adapter_rows(random_adapter(SHAPES, n=9), layout(), PLACES)
    assert {k: (a.dtype.name, a.shape) for k, a in rows.items()} == {
        "adapter_values": ("float16", (3, 10)),
        "adapter_row_pointers.13": ("uint16", (1, 14)),
        "adapter_row_pointers.24": ("uint16", (2, 25)),
        "adapter_cols": ("uint16", (3, 10)),
        "adapter_scales": ("float32", (3,)),
    }
    assert rows["adapter_scales"][1] == 0  # a site it leaves alone
    assert not rows["adapter_values"][1].any()


def test_a_long_side_takes_int32_places():
    assert layout(sites=(("q", 1 << 16, 4),)).place_dtype == np.uint16
    assert layout(sites=(("q", (1 << 16) + 1, 4),)).place_dtype == np.int32


def test_banks_have_an_empty_row_and_pad_narrow_adapters_with_zeros_at_the_end():
    narrow, wide = random_adapter(SHAPES, n=5, seed=1), random_adapter(SHAPES, n=9, seed=2)
    cosine = random_adapter(SHAPES, n=4, seed=3, transform="cosine")
    made = [adapter_rows(a, layout(), PLACES) for a in (narrow, cosine, wide)]
    banks, ids = stack_rows(made, layout())
    assert ids == {"adapter_ids": [1, 0, 2], "adapter_cosine_ids": [0, 1, 0], "adapter_head_ids": [0, 0, 0]}
    assert banks["adapter_values"].shape == (3, 3, 10)
    assert banks["adapter_cosine_values"].shape == (2, 3, 5)  # a row only in the banks it uses
    assert not banks["adapter_values"][0].any()
    assert not banks["adapter_scales"][0].any()
    np.testing.assert_array_equal(banks["adapter_values"][1, :, :6], made[0]["adapter_values"])
    assert not banks["adapter_values"][1, :, 5:].any()
    for name in ("adapter_row_pointers.13", "adapter_row_pointers.24"):
        np.testing.assert_array_equal(banks[name][1:], [made[0][name], made[2][name]])
        assert not banks[name][0].any()


def test_short_heads_are_padded_with_minus_infinity():
    two = random_adapter(SHAPES, heads=head(2))
    four = random_adapter(SHAPES, heads=head(4, seed=1), seed=1)
    banks, ids = stack_rows([adapter_rows(a, layout(), PLACES) for a in (two, four)], layout())
    assert ids["adapter_head_ids"] == [1, 2]
    assert banks["adapter_head.out.weight"].shape == (3, 4, 6)
    assert np.isneginf(banks["adapter_head.out.bias"][1, 2:]).all()
    assert not banks["adapter_head.out.weight"][1, 2:].any()
    assert np.isfinite(banks["adapter_head.out.bias"][2]).all()
    assert banks["adapter_head.dense.weight"].shape == (3, 6, 6)


def test_row_zero_of_the_head_bank_is_the_bases_own():
    base = {"out.weight": np.ones((2, 6), np.float32), "out.bias": np.full(2, 3, np.float32)}
    base |= {"dense.weight": np.full((6, 6), 2, np.float32), "dense.bias": np.zeros(6, np.float32)}
    own = layout(base_head=base)
    partly = random_adapter(SHAPES, heads=head(3, dense=False))
    rows = adapter_rows(partly, own, PLACES)
    np.testing.assert_array_equal(rows["adapter_head.dense.weight"], base["dense.weight"])  # what it did not train
    banks, _ = stack_rows([rows], own)
    np.testing.assert_array_equal(banks["adapter_head.out.weight"][0, :2], base["out.weight"])
    assert banks["adapter_head.out.bias"][0].tolist() == [3, 3, -np.inf]


@pytest.mark.parametrize(
    ("adapter", "changes", "message"),
    [
        (
            random_adapter(SHAPES, transform="cosine"),
            {"kinds": ("hartley",)},
            r"needs a cosine slot.*--kinds hartley,cosine",
        ),
        (random_adapter({"m.a.z": (24, 36)}), {}, r"m\.a\.z has no slot.*--sites"),
        (random_adapter({"m.a.q": (24, 24)}), {}, r"weight of \[24, 24\], the graph's is \[24, 36\]"),
        (random_adapter(SHAPES, heads=head(2)), {"kinds": ("hartley",)}, "trained 'dense' whole.*--kinds head"),
        (random_adapter(SHAPES, heads=head(2, dense=False)), {}, "lacks dense, and the base has none"),
        (random_adapter(SHAPES, heads={"odd": {"weight": np.ones((2, 6))}}), {}, "trained 'odd' whole"),
        (
            random_adapter(SHAPES, heads=head(2) | {"out": {"weight": np.ones((2, 5)), "bias": np.ones(2)}}),
            {},
            r"head out is \[2, 5\], the graph takes \[labels, 6\]",
        ),
        (
            random_adapter(SHAPES, heads=head(2) | {"out": {"weight": np.ones((2, 6)), "bias": np.ones(3)}}),
            {},
            r"bias \[3\]",
        ),
    ],
)
def test_what_has_no_slot_is_refused_with_the_flag(adapter, changes, message):
    with pytest.raises(AdapterMismatchError, match=f"(?s){message}"):
        adapter_rows(adapter, layout(**changes), PLACES)


def test_values_that_overflow_float16_are_refused():
    delta = SpectralDelta(
        (24, 36), "hartley", *np.ones((2, 1), np.uint16), np.array([1e6], np.float32), 1.0, "backward"
    )
    adapter = random_adapter({"m.a.q": (24, 36)})
    object.__setattr__(adapter, "deltas", {"m.a.q": delta})
    with pytest.raises(AdapterMismatchError, match=r"(?s)1e\+06 overflow float16.*--adapter-dtype float32"):
        adapter_rows(adapter, layout(), PLACES)
    assert adapter_rows(adapter, layout(adapter_dtype="float32"), PLACES)["adapter_values"].max() == 1e6


def identity_graph(guard=None):
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [x])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([2])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="t"), ir_version=10)
    if guard is not None:
        add_guard(model, guard)
    return model


def run_with(path, guard):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(identity_graph(guard)).SerializeToString(), options)
    adapter, run = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(path))
    run.add_active_adapter(adapter)
    return session.run(None, {"x": np.ones(2, np.float32)}, run)


def test_a_strangers_file_is_refused_by_onnxruntime_itself(tmp_path):
    path = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(path, {}, layout())
    assert run_with(path, GUARD)[0].tolist() == [1, 1]
    for stranger in ((12, 0, 13), (11, 0, 14)):
        with pytest.raises(Exception, match=r"(?s)adapter_guard|invalid dimensions"):
            run_with(path, stranger)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.onnx_adapter"
    write_onnx_adapter(path, {"adapter_values": np.ones((1, 3, 2), np.float16)}, layout())
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        write_onnx_adapter(path, {"adapter_values": np.zeros((1, 3, 2), np.float16)}, layout())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.onnx_adapter"]


def test_without_onnxruntime_the_message_names_both_extras(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"(?s)ssh-deploy\[cpu\].*ssh-deploy\[gpu\]"):
        write_onnx_adapter(tmp_path / "a", {}, layout())


MEANING = {
    "fingerprint": "f" * 64,
    "sites": [("q", 4, 6)],
    "orders": {"hartley": {4: (1, 4), 6: (2, 3)}},
    "kinds": ("hartley", "head"),
    "heads": ("classifier",),
}


def test_guard_is_stable_and_in_range():
    g1, zero, g2 = guard_shape(**MEANING)
    assert zero == 0
    assert 1 <= g1 < 1 << 31
    assert 1 <= g2 < 1 << 31
    assert guard_shape(**MEANING) == (g1, 0, g2)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "e" * 64},
        {"sites": [("q", 6, 4)]},
        {"sites": [("k", 4, 6)]},
        {"orders": {"hartley": {4: (2, 2), 6: (2, 3)}}},
        {"kinds": ("hartley",)},
        {"heads": ()},
    ],
)
def test_guard_changes_with_whatever_gives_places_their_meaning(change):
    assert guard_shape(**(MEANING | change)) != guard_shape(**MEANING)


def test_guard_goes_in_once():
    with pytest.raises(GraphError, match="adapter_guard already"):
        add_guard(identity_graph(GUARD), GUARD)


def test_half_weights_are_stored_once_and_computed_in_float32():
    rng = np.random.default_rng(0)
    weight = ir.Value(
        name="w",
        shape=ir.Shape([40, 40]),
        const_value=ir.tensor(rng.normal(size=(40, 40)).astype(np.float32), name="w"),
    )
    x = ir.Value(name="x", shape=ir.Shape(["b", 40]), type=ir.TensorType(ir.DataType.FLOAT))
    weight.dtype = ir.DataType.FLOAT
    node = ir.node("MatMul", [x, weight])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(["b", 40])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="t")
    model = ir.Model(graph, ir_version=10)
    original = weight.const_value.numpy()
    assert store_half(model) == 1
    data = ir.to_proto(model).SerializeToString()
    assert len(data) < original.nbytes * 0.6
    feed = rng.normal(size=(3, 40)).astype(np.float32)
    got = ort.InferenceSession(data).run(None, {"x": feed})[0]
    np.testing.assert_allclose(got, feed @ original.astype(np.float16).astype(np.float32), atol=1e-5)

"""The transform sub-graph against the plain sums of `reference.py`, on graphs of one or few MatMuls, without torch."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_graphs import Case, graph_of, layer, session_of, tokens

from ssh_deploy.errors import GraphError, SlotError
from ssh_deploy.graph.bank_file import stack_rows
from ssh_deploy.graph.lowering.stages import differenced
from ssh_deploy.graph.sites import by_module, find_calls
from ssh_deploy.graph.slots import Plan, add_slots
from ssh_deploy.transforms import get_transform


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_out=st.sampled_from([1, 2, 7, 13, 24, 31, 36, 64]),
    n_in=st.sampled_from([1, 2, 5, 12, 17, 24, 49, 96]),
    transform=st.sampled_from(["hartley", "hartley-joint", "cosine"]),
    dtype=st.sampled_from(["float16", "float32"]),
    n=st.integers(1, 40),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 1, 2, 6]),
    past=st.booleans(),
)
def test_any_shape_is_the_definition(n_out, n_in, transform, dtype, n, batch, length, past):
    kind = "cosine" if transform == "cosine" else "hartley"
    case = Case({"a": layer(n_out, n_in)}, kinds=(kind,), dtype=dtype, past=past)
    adapter = case.adapter(n, n=n, transform=transform)
    x = tokens(case, batch, length)
    for got, want in zip(case.run(x, **case.feeds(adapter)), case.want(adapter, x, dtype=dtype), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    outs=st.lists(st.sampled_from([1, 7, 12, 24, 36, 48, 64, 96]), min_size=1, max_size=4),
    n_in=st.sampled_from([5, 24, 36, 96]),
    transform=st.sampled_from(["hartley", "hartley-joint", "cosine"]),
    n=st.integers(1, 40),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2]),
)
def test_sites_of_any_widths_that_read_one_activation_of_a_decoder(outs, n_in, transform, n, batch, length):
    layers = {f"site{i}": layer(out, n_in, i) for i, out in enumerate(outs)}
    case = Case(layers, kinds=("cosine" if transform == "cosine" else "hartley",), past=True)
    adapter = case.adapter(n, n=n, transform=transform)
    x = tokens(case, batch, length)
    for got, want in zip(case.run(x, **case.feeds(adapter)), case.want(adapter, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kinds", [("hartley",), ("hartley", "cosine"), ("hartley", "lowrank")])
def test_heads_taken_apart_behind_a_site(bias, past, length, kinds):
    layers = {"q": layer(24, 36), "k": layer(12, 36, 1), "v": layer(12, 36, 2)}
    case = Case(layers, kinds=kinds, bias=bias, past=past, heads=4)
    adapters = [case.adapter(3), case.adapter(4)]
    banks, _ = stack_rows([case.rows(adapter) for adapter in adapters], case.layout)
    x = tokens(case, 3, length)
    plain = case.plain.run(None, {"x": x})
    assert all(a.tobytes() == b.tobytes() for a, b in zip(case.run(x), plain, strict=True))
    wants = [plain, *(case.want(adapter, x) for adapter in adapters)]
    for i, got in enumerate(case.run(x, **banks, adapter_ids=np.array([2, 0, 1]))):
        want = np.stack([wants[row][i][place] for place, row in enumerate((2, 0, 1))])
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize(("kind", "out"), [("hartley", 24), ("hartley", 13), ("cosine", 36), ("cosine", 7)])
def test_the_first_factor_of_the_way_back_takes_prefix_sums(kind, out):
    stages = get_transform(kind).axis.two_stage(out)
    blocks, width, _ = stages.second.shape
    rows = np.random.default_rng(0).normal(size=(blocks, width))
    below = np.append(0.0, np.cumsum(rows.reshape(-1)))  # P[u] = Σ of rows before u
    windows = np.stack([below[k * width : (k + 1) * width + 1] for k in range(blocks)])
    want = np.einsum("kij,ki->kj", stages.second, rows)
    np.testing.assert_allclose(np.einsum("kij,ki->kj", differenced(stages), windows), want, atol=1e-12)


def test_on_the_way_back_whole_blocks_are_turned_round(tmp_path):
    module, model = "q", graph_of({"q": layer(64, 64)})
    assert get_transform("hartley").axis.two_stage(64).p > 1
    add_slots(model, Plan((module,), ("hartley",), (), frozenset()))
    session_of(model, saved=tmp_path / "as-run.onnx")
    gates = [node for node in ir.load(tmp_path / "as-run.onnx").graph if node.op_type == "If"]
    there = next(gate.attributes["then_branch"].as_graph() for gate in gates if module in (gate.name or ""))
    turned = [node.attributes["perm"].as_ints() for node in there if node.op_type == "Transpose"]
    # the activation on its way in, and the blocks; the other Transpose is one with its product
    assert turned == [(0, 2, 1), (0, 1, 3, 2, 4)]
    assert [node.attributes["transA"].as_int() for node in there if node.op_type == "FusedMatMul"] == [1]


@pytest.mark.parametrize("bias", [False, True])
def test_without_an_adapter_every_bit_is_the_plain_graphs(bias):
    case = Case({"q": layer(24, 36), "k": layer(12, 36, 1)}, kinds=("hartley", "cosine"), bias=bias)
    for batch, length in ((1, 1), (2, 5), (4, 3)):
        x = tokens(case, batch, length)
        x[0, 0] = -0.0
        for got, want in zip(case.run(x), case.plain.run(None, {"x": x}), strict=True):
            assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("past", [False, True])
def test_layers_of_different_widths_share_one_activation(past, length):
    layers = {"q": layer(24, 36), "k": layer(12, 36, 1), "v": layer(12, 36, 2), "g": layer(24, 36, 3)}
    case = Case(layers, bias=True, past=past)
    adapter = case.adapter(3)
    x = tokens(case, 3, length)
    for got, want in zip(case.run(x, **case.feeds(adapter)), case.want(adapter, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(np.abs(want).max()))


def test_both_transforms_in_one_graph_add_up():
    case = Case({"q": layer(24, 36)}, kinds=("hartley", "cosine"))
    one, two = case.adapter(1), case.adapter(2, transform="cosine")
    x = tokens(case, 2, 3)
    got = case.run(x, **case.feeds(one), **case.feeds(two))[0]
    plain = case.plain.run(None, {"x": x})[0]
    want = case.want(one, x)[0] + case.want(two, x)[0] - plain
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("past", [False, True])
def test_rows_of_a_mixed_batch_are_single_runs(past, length):
    case = Case({"q": layer(24, 36), "v": layer(24, 36, 1)}, past=past)
    adapters = [case.adapter(1), case.adapter(2, n=30), case.adapter(3, n=5, transform="hartley-joint")]
    banks, ids = stack_rows([case.rows(a) for a in adapters], case.layout)
    assert ids == {"adapter_ids": [1, 2, 3]}
    x = tokens(case, 5, length)
    picked = np.array([2, 0, 3, 1, 2])
    mixed = case.run(x, **banks, adapter_ids=picked)
    for row, number in enumerate(picked):
        alone = case.run(x[row : row + 1], **(case.feeds(adapters[number - 1]) if number else {}))
        for got, want in zip(mixed, alone, strict=True):
            np.testing.assert_allclose(got[row : row + 1], want, rtol=0, atol=1e-5)
        if not number:
            assert all(np.array_equal(a[row : row + 1], b) for a, b in zip(mixed, alone, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_one_id_serves_the_whole_batch(batch):
    case = Case({"q": layer(24, 36)})
    adapters = [case.adapter(1), case.adapter(2)]
    banks, _ = stack_rows([case.rows(a) for a in adapters], case.layout)
    x = tokens(case, batch, 3)
    got = case.run(x, **banks, adapter_ids=np.array([2]))
    np.testing.assert_allclose(got[0], case.want(adapters[1], x)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("ids", [[-1], [3], [0, 1, 2], [0, -1], [1, 3], [0, 1, 2, 0]])
@pytest.mark.parametrize("fed", [True, False])
def test_wrong_ids_end_in_an_error_and_never_in_an_answer(ids, fed):
    case = Case({"q": layer(24, 36)})
    banks, _ = stack_rows([case.rows(case.adapter(1)), case.rows(case.adapter(2))], case.layout)
    with pytest.raises(Exception, match=r"out of (data )?bounds|invalid expand shape|Reshape"):
        case.run(tokens(case, 2, 3), **(banks if fed else {}), adapter_ids=np.array(ids))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("row_pointers.24", lambda a: np.where(np.arange(a.shape[-1]) == 9, 13, a).astype(a.dtype)),  # beyond the sums
        ("row_pointers.24", lambda a: np.where(np.arange(a.shape[-1]) == 9, 65535, a).astype(a.dtype)),
        ("cols", lambda a: np.where(np.arange(a.shape[-1]) == 0, 36, a).astype(a.dtype)),
    ],
)
@pytest.mark.parametrize(("past", "length"), [(False, 3), (True, 3), (True, 1)])
def test_misplaced_coefficients_end_in_an_error(part, change, past, length):
    case = Case({"q": layer(24, 36)}, past=past)
    feeds = case.feeds(case.adapter(1))
    case.run(tokens(case, 2, length), **feeds)
    with pytest.raises(Exception, match="out of data bounds"):
        case.run(tokens(case, 2, length), **{**feeds, f"adapter_{part}": change(feeds[f"adapter_{part}"])})


def test_many_coefficients_on_few_rows_lose_nothing_on_many_threads():
    """What ScatterND(add) gets wrong in every run: threads that add to one row."""
    case = Case({"q": layer(64, 64)}, threads=4)
    adapter = case.adapter(1, n=3 * 64)
    delta = adapter.deltas["q"]
    crowded = np.divmod(np.arange(3 * 64), 64)  # three full rows
    object.__setattr__(delta, "rows", crowded[0].astype(np.uint16))
    object.__setattr__(delta, "cols", crowded[1].astype(np.uint16))
    x = tokens(case, 16, 64)
    want = case.want(adapter, x)[0]
    first = case.run(x, **case.feeds(adapter))[0]
    np.testing.assert_allclose(first, want, rtol=0, atol=2e-5 * float(np.abs(want).max()))
    for _ in range(20):
        assert case.run(x, **case.feeds(adapter))[0].tobytes() == first.tobytes()


@pytest.mark.parametrize("past", [False, True])
def test_other_rows_change_no_bit_of_a_row(past):
    case = Case({"q": layer(24, 36), "v": layer(24, 36, 1)}, past=past)
    banks, _ = stack_rows([case.rows(case.adapter(s, n=20)) for s in (1, 2)], case.layout)
    x = tokens(case, 3, 5)
    before = case.run(x, **banks, adapter_ids=np.array([1, 2, 0]))
    other = np.concatenate([x[:1], tokens(case, 2, 5, seed=9)])
    after = case.run(other, **banks, adapter_ids=np.array([1, 0, 2]))
    assert all(a[0].tobytes() == b[0].tobytes() for a, b in zip(before, after, strict=True))


def test_scales_are_multiplied_in_float32():
    case = Case({"q": np.zeros((24, 36), np.float32)})
    adapter = case.adapter(1, alpha=1e-7)  # α folded into float16 values would vanish
    feeds = case.feeds(adapter)
    assert feeds["adapter_scales"].dtype == np.float32
    x = tokens(case, 1, 2)
    want = case.want(adapter, x)[0]
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(case.run(x, **feeds)[0], want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_unknown_module_lists_the_near_misses():
    with pytest.raises(SlotError, match=r"(?s)'layer.qury'.*Did you mean layer.query"):
        add_slots(graph_of({"layer.query": layer(4, 4)}), Plan(("layer.qury",), ("hartley",), (), frozenset()))


def test_slots_go_in_once():
    model = graph_of({"q": layer(4, 4)})
    plan = Plan(("q",), ("hartley",), (), frozenset())
    add_slots(model, plan)
    with pytest.raises(GraphError, match="has adapter inputs already"):
        add_slots(model, plan)


def test_fixed_batch_is_refused():
    model = graph_of({"q": layer(4, 4)})
    model.graph.inputs[0].shape = ir.Shape([2, "sequence", 4])
    with pytest.raises(SlotError, match=r"shape \[2,sequence,4\]"):
        add_slots(model, Plan(("q",), ("hartley",), (), frozenset()))


def test_scores_between_activations_are_no_sites():
    model = graph_of({"q": layer(4, 4)})
    x = model.graph.inputs[0]
    scopes = {"pkg.torch.onnx.name_scopes": str(["", "model", "model.q", "matmul"])}
    model.graph.append(ir.node("MatMul", [x, model.graph.outputs[0]], metadata_props=scopes))
    assert {m: len(c) for m, c in by_module(find_calls(model.graph)).items()} == {"q": 1}

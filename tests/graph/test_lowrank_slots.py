"""Low-rank slots against float64 products, on graphs of few MatMuls: alone, mixed, beside spectra, and wrong."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_graphs import Case, layer, tokens

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.graph.bank_file import stack_rows

MANY = {"q": layer(24, 36), "k": layer(12, 36, 1), "v": layer(12, 36, 2)}


def lora(case, seed, *, ranks=3, modules=None, dtype=np.float32):
    """A random adapter; ``ranks``: of all modules, or of each."""
    rng, deltas = np.random.default_rng(seed), {}
    for i, module in enumerate(modules or case.weights):
        n_out, n_in = case.weights[module].shape
        r = ranks if isinstance(ranks, int) else ranks[i]
        a, b = rng.normal(size=(r, n_in)).astype(dtype), rng.normal(size=(n_out, r)).astype(dtype)
        deltas[module] = LowRankDelta(a, b, 0.7 + seed)
    return Adapter("lora", deltas, {}, "", Path(f"lora-{seed}"))


def want(case, adapter, x):
    """The plain answers plus s·B A x in float64."""
    answers = []
    for module, plain in zip(case.weights, case.plain.run(None, {"x": x}), strict=True):
        delta = adapter.deltas.get(module)
        dense = 0 if delta is None else delta.scaling * delta.b.astype(float) @ delta.a.astype(float)
        answers.append(plain + (x @ dense.T if delta is not None else 0))
    return answers


def close(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * max(1.0, float(np.abs(other).max())))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n_out=st.sampled_from([1, 2, 13, 24, 64]),
    n_in=st.sampled_from([1, 5, 17, 96]),
    rank=st.integers(1, 9),
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_any_shape_and_rank_is_the_product(n_out, n_in, rank, batch, length, dtype):
    case = Case({"a": layer(n_out, n_in)}, kinds=("lowrank",))
    adapter = lora(case, 1, ranks=rank, dtype=dtype)
    x = tokens(case, batch, length)
    close(case.run(x, **case.feeds(adapter)), want(case, adapter, x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", [("lowrank",), ("hartley", "cosine", "lowrank")])
def test_without_an_adapter_every_bit_is_the_plain_graphs(bias, kinds):
    case = Case(MANY, kinds=kinds, bias=bias)
    for batch, length in ((1, 1), (2, 5), (4, 3)):
        x = tokens(case, batch, length)
        x[0, 0] = -0.0
        for got, wanted in zip(case.run(x), case.plain.run(None, {"x": x}), strict=True):
            assert got.tobytes() == wanted.tobytes()


def test_layers_of_several_widths_and_ranks_and_one_left_alone():
    case = Case({**MANY, "g": layer(24, 36, 3)}, kinds=("lowrank",), bias=True)
    adapter = lora(case, 3, ranks=(2, 5, 1), modules=("q", "v", "g"))
    x = tokens(case, 3, 4)
    got = case.run(x, **case.feeds(adapter))
    close(got, want(case, adapter, x))
    np.testing.assert_array_equal(got[1], case.plain.run(None, {"x": x})[1])


def test_every_row_of_a_mixed_batch_is_itself_alone():
    """Different ranks in one bank, a spectrum beside them, the base: each row's bits are those of its own run."""
    case = Case(MANY, kinds=("hartley", "lowrank"), bias=True)
    adapters = [lora(case, 1, ranks=2), case.adapter(5), lora(case, 2, ranks=4, modules=("k",))]
    banks, ids = stack_rows([case.rows(adapter) for adapter in adapters], case.layout)
    assert ids == {"adapter_ids": [0, 1, 0], "adapter_lowrank_ids": [1, 0, 2]}
    x = tokens(case, 5, 3)
    rows = [2, None, 0, 1, 0]
    numbers = {name: np.array([0 if r is None else own[r] for r in rows]) for name, own in ids.items()}
    mixed = case.run(x, **banks, **numbers)
    for i, r in enumerate(rows):
        own = {name: number[i : i + 1] for name, number in numbers.items()}
        for together, alone in zip(mixed, case.run(x[i : i + 1], **banks, **own), strict=True):
            np.testing.assert_array_equal(together[i : i + 1], alone)
        plain = case.plain.run(None, {"x": x[i : i + 1]})
        if r == 1:
            wanted = case.want(adapters[1], x[i : i + 1])
        else:
            wanted = plain if r is None else want(case, adapters[r], x[i : i + 1])
        for got, right in zip((out[i : i + 1] for out in mixed), wanted, strict=True):
            np.testing.assert_allclose(got, right, rtol=0, atol=2e-5 * float(np.abs(right).max()))


def test_a_rank_below_the_banks_changes_no_bit():
    case = Case({"a": layer(24, 36)}, kinds=("lowrank",))
    narrow, wide = (case.rows(lora(case, seed, ranks=r)) for seed, r in ((1, 2), (2, 7)))
    banks, _ = stack_rows([narrow, wide], case.layout)
    assert banks["adapter_lowrank_a.36"].shape == (3, 1, 7, 36)
    assert banks["adapter_lowrank_b.24"].shape == (3, 1, 24, 7)
    assert not banks["adapter_lowrank_a.36"][0].any()
    x = tokens(case, 2, 3)
    (padded,) = case.run(x, **banks, adapter_lowrank_ids=np.array([1]))
    (own,) = case.run(x, **{key: array[None] for key, array in narrow.items()})
    np.testing.assert_allclose(padded, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_adds_the_same_whatever_the_batch(threads):
    case = Case(MANY, kinds=("lowrank",), threads=threads)
    feeds = case.feeds(lora(case, 1, ranks=8))
    x = tokens(case, 6, 40)
    whole = case.run(x, **feeds)
    for i in range(6):
        for together, alone in zip(whole, case.run(x[i : i + 1], **feeds), strict=True):
            np.testing.assert_array_equal(together[i : i + 1], alone)


@pytest.mark.parametrize("fed", [True, False])
@pytest.mark.parametrize("ids", [[3], [-1], [0, 7], [1, -2], [0, 1, 1]])
def test_ids_that_mean_nothing_are_errors(fed, ids):
    case = Case({"a": layer(24, 36)}, kinds=("lowrank",))
    banks, _ = stack_rows([case.rows(lora(case, seed)) for seed in (1, 2)], case.layout)
    with pytest.raises(Exception, match=r"(?i)error|invalid"):
        case.run(tokens(case, 2, 3), **(banks if fed else {}), adapter_lowrank_ids=np.array(ids))


@pytest.mark.parametrize("change", ["rank", "adapters", "width", "one missing"])
def test_arrays_that_do_not_belong_together_are_errors(change):
    case = Case({"a": layer(24, 36)}, kinds=("lowrank",))
    feeds = case.feeds(lora(case, 1))
    a, b = feeds["adapter_lowrank_a.36"], feeds["adapter_lowrank_b.24"]
    broken = {
        "rank": {**feeds, "adapter_lowrank_b.24": b[..., :2]},
        "adapters": {"adapter_lowrank_a.36": np.concatenate([a, a]), "adapter_lowrank_b.24": b},
        "width": {**feeds, "adapter_lowrank_a.36": a[..., :35]},
        "one missing": {"adapter_lowrank_a.36": a},
    }[change]
    numbers = {"adapter_lowrank_ids": np.array([1])} if change == "adapters" else {}
    with pytest.raises(Exception, match=r"(?i)error|invalid"):
        case.run(tokens(case, 2, 3), **broken, **numbers)


def test_a_graph_without_these_slots_says_which_kinds_to_ask_for():
    case = Case({"a": layer(24, 36)})
    with pytest.raises(AdapterMismatchError, match=r"(?s)needs a lowrank slot; the graph has hartley.*hartley,lowrank"):
        case.rows(lora(case, 1))


def test_numbers_beyond_float32_are_refused():
    case = Case({"a": layer(24, 36)}, kinds=("lowrank",))
    delta = LowRankDelta(np.ones((1, 36), np.float32), np.full((24, 1), 1e30, np.float32), 1e10)
    with pytest.raises(AdapterMismatchError, match="b times its scaling overflows float32"):
        case.rows(Adapter("lora", {"a": delta}, {}, "", Path("x")))

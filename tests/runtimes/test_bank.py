"""Banks: rows stay with the runs they were lent to, memory follows use, padding is what the graph expects."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.runtimes.bank import Bank, banks_of, kind_of
from ssh_deploy.runtimes.session import Input

SPECTRAL = [
    Input("adapter_values", np.float16, ("adapters", 2, "coefficients")),
    Input("adapter_scales", np.float32, ("adapters", 2)),
    Input("adapter_rows", np.uint16, ("adapters", 2, "coefficients")),
    Input("adapter_cols", np.uint16, ("adapters", 2, "coefficients")),
]
HEAD = [
    Input("adapter_head.classifier.weight", np.float32, ("head_adapters", "labels", 3)),
    Input("adapter_head.classifier.bias", np.float32, ("head_adapters", "labels")),
]


def spectrum(value, n=4):
    return {
        "adapter_values": np.full((2, n), value, np.float16),
        "adapter_scales": np.full(2, value, np.float32),
        "adapter_rows": np.full((2, n), value, np.uint16),
        "adapter_cols": np.full((2, n), value, np.uint16),
    }


def bank():
    return Bank("hartley", SPECTRAL, max_width=100)


def test_kinds_follow_from_names():
    names = ["adapter_values", "adapter_cosine_rows", "adapter_lowrank_a.8", "adapter_head.classifier.weight"]
    assert [kind_of(name) for name in names] == ["hartley", "cosine", "lowrank", "head"]
    made = banks_of([*SPECTRAL, *HEAD, Input("adapter_ids", np.int64, ("r",))], max_width=9)
    assert set(made) == {"hartley", "head"}


def test_one_adapter_for_all_rows_is_lent_as_its_row_without_ids():
    b = bank()
    b.put("a", spectrum(1))
    b.put("b", spectrum(2))
    lease = b.lease(["b", "b", "b"])
    assert "adapter_ids" not in lease.feeds
    assert lease.feeds["adapter_values"].shape == (1, 2, 4)
    assert (lease.feeds["adapter_values"] == 2).all()
    assert lease.feeds["adapter_values"].base is not None  # a view: nothing was copied
    assert b.lease([None, "c"]) is None


def test_mixed_rows_are_ids_into_the_whole_bank_and_0_is_empty():
    b = bank()
    b.put("a", spectrum(1, n=2))
    b.put("b", spectrum(2, n=5))
    feeds = b.lease([None, "b", "a", "elsewhere"]).feeds
    taken = feeds["adapter_values"][feeds["adapter_ids"]]
    assert taken.shape == (4, 2, 5)
    np.testing.assert_array_equal(taken[0], 0)
    np.testing.assert_array_equal(taken[3], 0)
    np.testing.assert_array_equal(taken[1], 2)
    np.testing.assert_array_equal(taken[2], [[1, 1, 0, 0, 0]] * 2)
    assert feeds["adapter_scales"][feeds["adapter_ids"]].tolist() == [[0, 0], [2, 2], [1, 1], [0, 0]]


def test_shorter_heads_are_padded_with_minus_infinity():
    b = Bank("head", HEAD, max_width=100)
    name = "adapter_head.classifier"
    b.put("small", {f"{name}.weight": np.ones((2, 3), np.float32), f"{name}.bias": np.ones(2, np.float32)})
    b.put("large", {f"{name}.weight": np.ones((4, 3), np.float32), f"{name}.bias": np.ones(4, np.float32)})
    feeds = b.lease(["small", "large"]).feeds
    small = feeds["adapter_head_ids"][0]
    assert feeds[f"{name}.bias"][small].tolist() == [1, 1, -np.inf, -np.inf]
    assert feeds[f"{name}.weight"][small, 2:].tolist() == [[0] * 3] * 2
    b.drop("large")  # narrower again
    assert b.lease(["small"]).feeds[f"{name}.bias"].tolist() == [[1, 1]]


def test_unloading_frees_memory():
    b = bank()
    empty = b.nbytes
    for i in range(40):
        b.put(f"a{i}", spectrum(i, n=8))
    full = b.nbytes
    b.put("wide", spectrum(1, n=100))
    assert b.nbytes > 10 * full
    b.drop("wide")
    assert b.nbytes <= full
    for i in range(39):
        b.drop(f"a{i}")
    assert b.nbytes < full / 8
    b.drop("a39")
    assert b.nbytes == empty


def test_a_dropped_row_is_not_written_while_it_is_lent():
    b = bank()
    for i in range(1, 6):
        b.put(f"a{i}", spectrum(i))
    lease = b.lease(["a1", "a5"])
    b.drop("a1")
    for i in range(6, 9):
        b.put(f"a{i}", spectrum(i))
    feeds = lease.feeds
    assert feeds["adapter_values"][feeds["adapter_ids"]][0, 0, 0] == 1
    lease.release()
    capacity = len(b._table.users)
    b.drop("a2")
    b.put("a9", spectrum(9))
    assert len(b._table.users) == capacity  # the free row was taken, nothing grew


def test_a_reused_row_keeps_nothing_of_its_last_owner():
    b = bank()
    for i, n in enumerate([9, 9, 9, 9], start=1):
        b.put(f"a{i}", spectrum(i, n=n))
    b.drop("a2")
    b.put("narrow", spectrum(7, n=3))
    feeds = b.lease(["a1", "narrow"]).feeds
    assert feeds["adapter_values"][feeds["adapter_ids"][1], 0].tolist() == [7] * 3 + [0] * 6


def test_rows_of_another_graph_are_refused():
    b = bank()
    for change, pattern in (
        ({"adapter_values": np.zeros((2, 4), np.float32)}, r"adapter_values is float32 \[2, 4\].*float16 \[2, 'coeff"),
        ({"adapter_values": np.zeros((3, 4), np.float16)}, r"\[3, 4\]"),
        ({"adapter_rows": np.zeros((2, 5), np.uint16)}, r"adapter_rows is uint16 \[2, 5\]"),
        ({"adapter_scales": np.zeros((2, 1), np.float32)}, r"adapter_scales"),
        ({"adapter_more": np.zeros(1)}, "adapter_more"),
    ):
        with pytest.raises(AdapterMismatchError, match=f"(?s){pattern}"):
            b.put("a", spectrum(1) | change)
    with pytest.raises(AdapterMismatchError, match=r"101 coefficients.*grow to 100"):
        b.put("a", spectrum(1, n=101))
    assert "a" not in b


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(["put", "drop", "lease", "release"]), st.integers(0, 7)), max_size=60))
def test_any_history_lends_what_was_put(steps):
    """Model-based: whatever is put, dropped, lent and given back, every lease shows what it was lent."""
    b, known, leases, version = bank(), {}, [], 0
    for what, i in steps:
        name = f"a{i}"
        if what == "put" and name not in known:
            version += 1
            b.put(name, spectrum(version, n=1 + 5 * i))
            known[name] = [version] * (1 + 5 * i)
        elif what == "drop" and name in known:
            b.drop(name)
            del known[name]
        elif what == "lease" and known:
            names = [*known, None]
            leases.append((b.lease(names), [known.get(n, []) for n in names]))
        elif what == "release" and leases:
            leases.pop(i % len(leases))[0].release()
        for lease, values in leases:
            rows = lease.feeds["adapter_values"][lease.feeds["adapter_ids"]]
            width = rows.shape[2]
            assert rows[:, 1].tolist() == [v + [0] * (width - len(v)) for v in values]
    assert all(name in b for name in known)

"""Banks: rows are copies in place, padding is exact, memory follows use, nothing is ever moved."""

import gc
import mmap
import resource
from pathlib import Path

import numpy as np
import pytest

from ssh_deploy.errors import AdapterMismatchError, DeploymentError
from ssh_deploy.runtimes.bank import Bank, inputs_by_kind, kind_of
from ssh_deploy.runtimes.session import Input

SPECTRAL = [
    Input("adapter_values", np.float16, ("adapters", 2, "coefficients")),
    Input("adapter_scales", np.float32, ("adapters", 2)),
    Input("adapter_rows", np.uint16, ("adapters", 2, "coefficients")),
    Input("adapter_cols", np.uint16, ("adapters", 2, "coefficients")),
]
HEAD = [
    Input("adapter_head.dense.weight", np.float32, ("head_adapters", "dense.out", 3)),
    Input("adapter_head.dense.bias", np.float32, ("head_adapters", "dense.out")),
    Input("adapter_head.classifier.weight", np.float32, ("head_adapters", "labels", 5)),
    Input("adapter_head.classifier.bias", np.float32, ("head_adapters", "labels")),
]
WIDTHS = {"coefficients": 9, "dense.out": 5, "labels": 4}


def spectrum(value, n=4):
    return {
        "adapter_values": np.full((2, n), value, np.float16),
        "adapter_scales": np.full(2, value, np.float32),
        "adapter_rows": np.full((2, n), value, np.uint16),
        "adapter_cols": np.full((2, n), value, np.uint16),
    }


def head(labels, value=1):
    return {
        "adapter_head.dense.weight": np.full((5, 3), value, np.float32),
        "adapter_head.dense.bias": np.full(5, value, np.float32),
        "adapter_head.classifier.weight": np.full((labels, 5), value, np.float32),
        "adapter_head.classifier.bias": np.full(labels, value, np.float32),
    }


def bank(capacity=10, n=9):
    return Bank("hartley", SPECTRAL, widths=WIDTHS | {"coefficients": n}, capacity=capacity)


def resident_kib():
    """Memory of this process that is really there."""
    fields = Path("/proc/self/smaps_rollup").read_text().split()
    return int(fields[fields.index("Rss:") + 1])


def test_kinds_follow_from_names():
    names = ["adapter_values", "adapter_cosine_rows", "adapter_lowrank_a.8", "adapter_head.classifier.weight"]
    assert [kind_of(name) for name in names] == ["hartley", "cosine", "lowrank", "head"]
    guard, ids = Input("adapter_guard", np.uint8, (1, 0, 2)), Input("adapter_ids", np.int64, ("r",))
    assert inputs_by_kind([*SPECTRAL, *HEAD, guard, ids]) == {"hartley": SPECTRAL, "head": HEAD}


def test_one_row_alone_is_a_view_without_ids():
    b = bank()
    b.put(spectrum(1))
    row = b.put(spectrum(2))
    feeds = b.alone(row)
    assert "adapter_ids" not in feeds
    assert feeds["adapter_values"].shape == (1, 2, 9)
    assert feeds["adapter_values"][0].tolist() == [[2] * 4 + [0] * 5] * 2
    assert np.shares_memory(feeds["adapter_values"], b.mixed([0])["adapter_values"])


def test_mixed_rows_are_ids_into_the_whole_bank_and_0_is_empty():
    b = bank()
    rows = [b.put(spectrum(1, n=2)), b.put(spectrum(2, n=5))]
    feeds = b.mixed([0, rows[1], rows[0], 0])
    taken = feeds["adapter_values"][feeds["adapter_ids"]]
    assert feeds["adapter_ids"].dtype == np.int64
    assert feeds["adapter_values"].shape == (11, 2, 9)
    assert feeds["adapter_values"].flags.c_contiguous
    assert taken[:, 0].tolist() == [[0] * 9, [2] * 5 + [0] * 4, [1] * 2 + [0] * 7, [0] * 9]
    assert feeds["adapter_scales"][feeds["adapter_ids"]].tolist() == [[0, 0], [2, 2], [1, 1], [0, 0]]


def test_shorter_heads_are_padded_with_minus_infinity():
    b = Bank("head", HEAD, widths=WIDTHS, capacity=3)
    small, large = b.put(head(2)), b.put(head(4))
    feeds, name = b.mixed([small, large]), "adapter_head.classifier"
    assert feeds[f"{name}.bias"][small].tolist() == [1, 1, -np.inf, -np.inf]
    assert feeds[f"{name}.bias"][0].tolist() == [-np.inf] * 4
    assert feeds[f"{name}.weight"][small, 2:].tolist() == [[0] * 5] * 2
    assert feeds["adapter_head.dense.bias"][0].tolist() == [0] * 5  # an inner layer has no labels to rule out
    alone = b.alone(small)
    assert alone[f"{name}.bias"].tolist() == [[1, 1, -np.inf, -np.inf]]
    assert alone[f"{name}.weight"].flags.c_contiguous


def test_loading_moves_nothing_and_the_lowest_free_row_is_reused():
    b = bank()
    rows = [b.put(spectrum(i)) for i in range(1, 6)]
    assert rows == [1, 2, 3, 4, 5]
    arrays = b.mixed([0])
    for row in (4, 2):
        b.free(row)
    assert b.used == 3
    b.give_back()
    assert [b.put(spectrum(7)), b.put(spectrum(8)), b.put(spectrum(9))] == [2, 4, 6]
    assert arrays["adapter_scales"][:7, 0].tolist() == [0, 1, 7, 3, 8, 5, 9]  # the same memory as before


@pytest.mark.parametrize("give_back", [False, True])
def test_a_reused_row_keeps_nothing_of_its_last_owner(give_back):
    b, h = bank(), Bank("head", HEAD, widths=WIDTHS, capacity=3)
    for made, wide, narrow in ((b, spectrum(5, n=9), spectrum(7, n=3)), (h, head(4, 9), head(1, 2))):
        made.free(made.put(wide))
        if give_back:
            made.give_back()
        row = made.put(narrow)
        for name, array in made.mixed([0]).items():
            if not name.endswith("_ids"):
                fill = -np.inf if name.endswith("classifier.bias") else 0
                want = np.full(array.shape[1:], fill)
                want[tuple(slice(0, n) for n in narrow[name].shape)] = narrow[name]
                np.testing.assert_array_equal(array[row], want)


def test_copying_out_gives_what_was_put():
    b = bank()
    rows = spectrum(3, n=6)
    taken = b.copy(b.put(rows), {"coefficients": 6})
    assert {name: array.tolist() for name, array in taken.items()} == {n: a.tolist() for n, a in rows.items()}
    assert not np.shares_memory(taken["adapter_values"], b.mixed([0])["adapter_values"])


def test_bytes_of_a_row_and_of_the_bank_that_is_fed():
    b = bank(capacity=7)
    assert b.row_bytes == 2 * 9 * (2 + 2 + 2) + 2 * 4
    assert sum(array.nbytes for name, array in b.mixed([]).items() if name != "adapter_ids") == 8 * b.row_bytes


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux to see resident memory")
def test_pages_are_taken_when_filled_and_given_back_when_freed():
    """64 rows of 1.2 MB each in a reservation of 1,000 of them."""
    gc.collect()
    before = resident_kib()
    b = bank(capacity=1000, n=100_000)
    assert resident_kib() - before < 2_000  # 1.2 GB reserved, none of it there
    rows = [b.put(spectrum(1, n=100_000)) for _ in range(64)]
    full = resident_kib() - before
    assert full == pytest.approx(64 * b.row_bytes / 1024, rel=0.05)
    for row in rows[::2]:  # every second one: only the pages shared with a neighbour stay
        b.free(row)
    b.give_back()
    assert resident_kib() - before == pytest.approx(full / 2, rel=0.06)
    for row in rows[1::2]:
        b.free(row)
    b.give_back()
    assert resident_kib() - before < 2_000


def test_giving_back_never_touches_a_row_in_use():
    """Rows much smaller than a page: a page goes only when all rows in it are free."""
    b = Bank("hartley", SPECTRAL, widths={"coefficients": 9}, capacity=40 * mmap.PAGESIZE // 36)
    rows = [b.put(spectrum(i % 1000 + 1, n=9)) for i in range(b.capacity)]
    rng = np.random.default_rng(0)
    kept = set(rows)
    for row in rng.permutation(rows)[: b.capacity - 20].tolist():
        b.free(row)
        kept.discard(row)
        b.give_back()
    for row in kept:
        assert b.copy(row, {"coefficients": 9})["adapter_values"].tolist() == [[row % 1000 or 1000] * 9] * 2
    gone = b.mixed([0])["adapter_values"]
    freed = np.setdiff1d(rows, list(kept))
    assert (gone[freed] == 0).mean() > 0.3  # and pages did go


def test_rows_of_another_graph_are_refused():
    b = bank()
    for change, pattern in (
        ({"adapter_values": np.zeros((2, 4), np.float32)}, r"adapter_values is float32 \[2, 4\].*float16 \[2, 'coeff"),
        ({"adapter_values": np.zeros((3, 4), np.float16)}, r"\[3, 4\]"),
        ({"adapter_rows": np.zeros((2, 5), np.uint16)}, r"adapter_rows is uint16 \[2, 5\]"),
        ({"adapter_scales": np.zeros((2, 1), np.float32)}, r"adapter_scales"),
        ({"adapter_more": np.zeros(1)}, "adapter_more"),
    ):
        with pytest.raises(AdapterMismatchError, match=f"(?s)mine.*{pattern}"):
            b.check("mine", spectrum(1) | change)
    with pytest.raises(AdapterMismatchError, match=r"(?s)9 coefficients.*holds 8.*max_coefficients=9"):
        b.check("mine", spectrum(1, n=10))
    h = Bank("head", HEAD, widths=WIDTHS, capacity=3)
    with pytest.raises(AdapterMismatchError, match=r"(?s)5 labels.*holds 4.*max_labels=5"):
        h.check("mine", head(5))


def test_more_than_the_system_has():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, hard))
    try:
        with pytest.raises(DeploymentError, match=r"(?s)reserves no .* bytes.*memory="):
            bank(capacity=1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

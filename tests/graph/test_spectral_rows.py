"""Row pointers in blocks: what one function lays out another reads back, and pointers that lead nowhere are found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.deltas.spectral import SpectralDelta, stacked
from ssh_deploy.graph.spectral_rows import (
    broken_pointers,
    no_pointers,
    output_order,
    pointers_by_site,
    pointers_of,
    rows_of,
    spare,
    spectrum_rows,
)

#: outs whose rows are one block (5, 24), two of 24 (48), two of 18 (36)
OUTS = st.lists(st.sampled_from([5, 24, 36, 48]), min_size=1, max_size=6)


def pointers(counts, outs, *, kind="hartley"):
    """Pointers of sites with ``counts`` [out] of coefficients a row, by input name."""
    most = max(int(own.sum()) for own in counts)
    rows = np.zeros((len(outs), most), np.int64)
    for site, own in enumerate(counts):
        rows[site, : own.sum()] = np.repeat(np.arange(outs[site]), own)
    return pointers_of(rows, np.array([own.sum() for own in counts]), kind, outs), rows


@settings(max_examples=100, deadline=None)
@given(outs=OUTS, seed=st.integers(0, 999), kind=st.sampled_from(["hartley", "cosine"]))
def test_rows_come_back_out_of_their_pointers(outs, seed, kind):
    rng = np.random.default_rng(seed)
    counts = [rng.poisson(rng.choice([0, 0.5, 3]), out) for out in outs]
    arrays, rows = pointers(counts, outs, kind=kind)
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: (a.shape, a.dtype) for name, a in no_pointers(kind, outs).items()
    }
    prefix = "adapter_" if kind == "hartley" else "adapter_cosine_"
    cols = np.zeros((len(outs), rows.shape[1] + spare(kind)), np.uint16)
    np.testing.assert_array_equal(rows_of({**arrays, f"{prefix}cols": cols}, kind, outs)[:, :-1], rows)
    assert broken_pointers(arrays, kind, outs, rows.shape[1]) is None
    if rows.shape[1]:
        assert broken_pointers(arrays, kind, outs, rows.shape[1] - 1)
    for site, own in enumerate(pointers_by_site(arrays, kind, outs)):
        flat = np.append(own[:, :-1].reshape(-1), own[-1, -1])
        np.testing.assert_array_equal(flat, np.append(0, np.cumsum(counts[site])))
        np.testing.assert_array_equal(own[1:, 0], own[:-1, -1])  # where a block ends the next begins


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((0, 0), 1),  # does not begin at 0
        ((1, 0), 40),  # begins where the block before did not end
        ((2, 0), 49),  # the second site begins where the first ended
        ((1, 5), 0),  # descends
        ((3, 24), 65535),  # leads beyond the coefficients
    ],
)
def test_pointers_that_lead_nowhere_are_found(place, value):
    outs = (48, 48, 36)
    arrays, rows = pointers([np.ones(out, np.int64) for out in outs], outs)
    assert broken_pointers(arrays, "hartley", outs, rows.shape[1]) is None
    assert arrays["adapter_row_pointers.24"][place] != value
    arrays["adapter_row_pointers.24"][place] = value
    assert broken_pointers(arrays, "hartley", outs, rows.shape[1]) == "adapter_row_pointers.24"


@pytest.mark.parametrize(("shape", "n"), [((48, 64), 300), ((64, 8192), 20_000)])
def test_coefficients_lie_in_the_order_of_the_graphs_transforms(shape, n):
    """By row, column and place in the file; numbers of 32 bits hold all three (6+6+9), or do not (6+13+15)."""
    rng = np.random.default_rng(0)
    deltas = {}
    for site in (0, 2):
        rows, cols = np.divmod(rng.choice(shape[0] * shape[1], n, replace=False), shape[1])
        values = rng.normal(size=n).astype(np.float16)
        deltas[site] = SpectralDelta(shape, "hartley", rows, cols, values, 3.0, "ortho")
    sites, places = [("m", shape[1], shape[0])] * 3, np.dtype(np.uint16)
    stacks, _ = stacked(deltas)
    found = spectrum_rows("a", "hartley", stacks, sites, values=np.dtype(np.float16), places=places)
    own = rows_of(found, "hartley", [shape[0]] * 3)
    for site, delta in deltas.items():
        down, across = (output_order("hartley", size)[1] for size in shape)
        order = np.lexsort([np.arange(n), across[delta.cols], down[delta.rows]])
        np.testing.assert_array_equal(own[site, :n], down[delta.rows][order])
        np.testing.assert_array_equal(found["adapter_cols"][site, :n], across[delta.cols][order])
        np.testing.assert_array_equal(found["adapter_values"][site, :n], delta.values[order])
    assert not any(found[name][1].any() for name in ("adapter_values", "adapter_cols", "adapter_scales"))

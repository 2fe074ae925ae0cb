"""Sums: what is written, what it means, and that the row is the float64 sum of the dense deltas."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from contract_folder import SITES, make_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.errors import AdapterMismatchError, UnknownNameError
from ssh_deploy.runtimes.loading import Loaded
from ssh_deploy.runtimes.sums import Sum, combine, is_sum, parse_sum, sum_digest
from ssh_deploy.testing import random_adapter

SHAPE = (3, 40, 50)  # sites, out, in
POINTERS = "row_pointers.20"  # 40 rows are two blocks of 20


def test_expressions():
    assert parse_sum("spam+0.5*style") == Sum(((1.0, "spam"), (0.5, "style")), None)
    assert parse_sum("spam+-0.5*style") == Sum(((1.0, "spam"), (-0.5, "style")), None)
    assert parse_sum("a@head=b") == Sum(((1.0, "a"),), "b")
    assert parse_sum("2*a+a+.25*b-c@head=a.b") == Sum(((2.0, "a"), (1.0, "a"), (0.25, "b-c")), "a.b")
    assert parse_sum("a+b@head=a").names == ("a", "b")
    assert parse_sum("-b+-1*-b") == Sum(((1.0, "-b"), (-1.0, "-b")), None)  # names may begin with a dash
    assert [is_sum(x) for x in ("a", "a.b-c_d", "a+b", "2*a", "a@head=b", 3, None)] == [False] * 2 + [True] * 3 + [
        False
    ] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a+", "empty term"),
        ("+a", "empty term"),
        ("a++b", "empty term"),
        ("0.5*", "empty term"),
        ("0*a", "'0' is not a decimal number other than 0"),
        ("-0.0*a", "other than 0"),
        ("nan*a", "'nan' is not"),
        ("inf*a", "'inf' is not"),
        ("1e5*a", "'1e5' is not"),
        ("9" * 400 + "*a", "is not a decimal"),
        ("*a", "'' is not"),
        ("2*3*a", "'2*3' is not"),
        ("a-0.5*b", "'a-0.5' is not"),
        ("a+b@tail=c", "@tail=c means nothing"),
        ("a+b@head=", "'' is not the name of an adapter"),
        ("a+b@head=c+d", "'c+d' is not the name of an adapter"),
        ("a + b", "'a ' is not the name of an adapter"),
        ("../a+b", "'../a' is not the name of an adapter"),
        ("a+/etc/passwd", "never paths"),
        ("a+b@head=a@head=b", "not the name of an adapter"),
    ],
)
def test_expressions_that_are_none(text, says):
    with pytest.raises(UnknownNameError) as caught:
        parse_sum(text)
    assert says in str(caught.value)
    assert caught.value.hint


def loaded(rng, n, *, dtype=np.float16, size=1.0, scale=1.0, prefix="adapter_", kind="hartley", labels=0, gaps=True):
    """An adapter with up to ``n`` coefficients a site, laid out as the contract says."""
    sites, out, inn = SHAPE
    arrays = {f"{prefix}values": np.zeros((sites, n + 1), dtype), f"{prefix}scales": np.zeros(sites, np.float32)}
    arrays[f"{prefix}cols"] = np.zeros((sites, n + 1), np.uint16)
    arrays[f"{prefix}{POINTERS}"] = np.zeros((2 * sites, out // 2 + 1), np.uint16)
    for site in range(sites):
        count = int(rng.integers(0 if gaps else n, n + 1))
        places = rng.choice(out * inn, count, replace=False)
        rows, cols = np.divmod(places, inn)
        order = np.lexsort((cols, rows))
        arrays[f"{prefix}values"][site, :count] = rng.normal(size=count) * size
        pointers = [(rows < u).sum() for u in range(out + 1)]
        arrays[f"{prefix}{POINTERS}"][2 * site : 2 * site + 2] = pointers[: out // 2 + 1], pointers[out // 2 :]
        arrays[f"{prefix}cols"][site, :count] = cols[order]
        arrays[f"{prefix}scales"][site] = (rng.normal() * scale) if count else 0
    kinds = {kind: arrays}
    if labels:
        kinds["head"] = {"adapter_head.c.weight": rng.normal(size=(labels, 4)).astype(np.float32)}
    names = tuple(f"l{i}" for i in range(labels))
    return Loaded(kinds, bool(labels), names, str(rng.integers(1 << 60)), "ssh", None, True)


def pointers_of(part, site):
    """Row pointers [out+1] of a site, of which its two blocks share one."""
    first, second = part[POINTERS][2 * site : 2 * site + 2].tolist()
    assert first[-1] == second[0]
    return first + second[1:]


def dense(found, prefix="adapter_", kind="hartley"):
    """Spectra [sites, out, in] in float64."""
    out = np.zeros(SHAPE)
    if kind in found.kinds:
        part = {k.removeprefix(prefix): v for k, v in found.kinds[kind].items()}
        for site in range(SHAPE[0]):
            scaled = part["values"][site].astype(np.float64) * part["scales"][site].astype(np.float64)
            for u, (start, stop) in enumerate(itertools.pairwise(pointers_of(part, site))):
                np.add.at(out[site, u], part["cols"][site, start:stop], scaled[start:stop])
    return out


def summed(text, **adapters):
    expression = parse_sum(text)
    digest = sum_digest(expression, {name: a.digest for name, a in adapters.items()})
    return combine(text, expression, adapters, digest, outs=[SHAPE[1]] * SHAPE[0])


def check_contract(found, prefix="adapter_", kind="hartley"):
    """Pointers lead from 0 upwards to the last coefficient, and a row's columns ascend."""
    part = {k.removeprefix(prefix): v for k, v in found.kinds[kind].items()}
    for site in range(SHAPE[0]):
        pointers = pointers_of(part, site)
        assert pointers[0] == 0
        assert pointers[-1] < part["values"].shape[1]
        assert not part["values"][site, pointers[-1] :].any()
        for start, stop in itertools.pairwise(pointers):
            assert start <= stop
            assert (np.diff(part["cols"][site, start:stop].astype(int)) > 0).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_sum_is_the_float64_sum_of_its_terms(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dtype = data.draw(st.sampled_from([np.float16, np.float32]))
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.5, -0.5, 2.0, -1.0, 0.013, 300.0]), min_size=1, max_size=4))
    terms = {
        f"a{i}": loaded(
            rng,
            int(rng.integers(1, 60)),
            dtype=dtype,
            size=10.0 ** rng.integers(-3, 3),
            scale=10.0 ** rng.integers(-4, 2),
        )
        for i in range(len(weights))
    }
    found = summed("+".join(f"{w}*a{i}" for i, w in enumerate(weights)), **terms)
    check_contract(found)
    parts = [w * dense(a) for w, a in zip(weights, terms.values(), strict=True)]
    want = np.sum(parts, axis=0)
    rounding = 2.0**-11 if dtype == np.float16 else 2.0**-23
    floor = np.abs(want).max(axis=(1, 2), keepdims=True) * (2.0**-38 if dtype == np.float16 else 0)
    assert (np.abs(dense(found) - want) <= np.abs(want) * rounding + floor + 1e-30).all()
    assert found.kinds["hartley"]["adapter_values"].dtype == dtype


def test_a_single_term_is_exact_and_keeps_its_order():
    for seed, dtype in itertools.product(range(20), (np.float16, np.float32)):
        term = loaded(np.random.default_rng(seed), 30, dtype=dtype, size=300.0)
        found = summed("1*a", a=term)
        np.testing.assert_array_equal(dense(found), dense(term))
        for part in ("cols", POINTERS):
            width = found.kinds["hartley"][f"adapter_{part}"].shape[1]
            mine = term.kinds["hartley"][f"adapter_{part}"]
            np.testing.assert_array_equal(found.kinds["hartley"][f"adapter_{part}"], mine[:, :width])


def test_a_dominant_term_stays_exact():
    """Where only the dominant term has a coefficient its value is bit for bit its own."""
    rng = np.random.default_rng(3)
    big, small = loaded(rng, 40, scale=1.0, gaps=False), loaded(rng, 40, scale=1e-3, gaps=False)
    small.kinds["hartley"]["adapter_scales"][:] = 1e-4
    big.kinds["hartley"]["adapter_scales"][:] = 0.7
    found = summed("big+0.5*small", big=big, small=small)
    own, other, got = dense(big), dense(small), dense(found)
    alone = (own != 0) & (other == 0)
    assert alone.sum() > 80
    np.testing.assert_array_equal(got[alone], own[alone])


def test_values_that_cancel_are_gone_and_nothing_overflows():
    term = loaded(np.random.default_rng(1), 30, size=20_000.0, gaps=False)
    assert summed("a+-1*a", a=term).kinds["hartley"]["adapter_values"].shape == (3, 1)
    found = summed("9000*a+8000*a", a=term)
    np.testing.assert_allclose(dense(found), 17_000 * dense(term), rtol=2.0**-11)


def test_a_scale_beyond_float32_is_refused():
    term = loaded(np.random.default_rng(1), 30, gaps=False)
    for weight in ("9" * 45, "0." + "0" * 45 + "1"):
        with pytest.raises(AdapterMismatchError, match=r"(?s)beyond float32.*weights nearer"):
            summed(f"{weight}*a", a=term)


def test_kinds_fill_rows_of_their_own():
    rng = np.random.default_rng(5)
    a, b = loaded(rng, 20), loaded(rng, 30, prefix="adapter_cosine_", kind="cosine")
    found = summed("2*a+-1*b", a=a, b=b)
    np.testing.assert_allclose(dense(found), 2 * dense(a), rtol=1e-6)
    np.testing.assert_allclose(
        dense(found, "adapter_cosine_", "cosine"), -dense(b, "adapter_cosine_", "cosine"), rtol=1e-6
    )
    odd = replace(b, kinds={"reflection": {}})
    with pytest.raises(AdapterMismatchError, match="reflection adapters multiply what passes"):
        summed("a+b", a=a, b=odd)


def product(rng, rank):
    """Rows of a low-rank adapter on two sites of one in and different outs."""
    shapes = {
        "adapter_lowrank_a.5": (2, rank, 5),
        "adapter_lowrank_b.7": (1, 7, rank),
        "adapter_lowrank_b.3": (1, 3, rank),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_low_rank_products_stand_side_by_side():
    rng = np.random.default_rng(8)
    a, b = (replace(loaded(rng, 5), kinds={"lowrank": product(rng, rank)}) for rank in (2, 3))
    found = summed("0.3*a+-2*b", a=a, b=b).kinds["lowrank"]
    assert found["adapter_lowrank_a.5"].shape == (2, 5, 5)
    for site, name in enumerate(("adapter_lowrank_b.7", "adapter_lowrank_b.3")):
        terms = [
            weight * term.kinds["lowrank"][name][0].astype(float) @ term.kinds["lowrank"]["adapter_lowrank_a.5"][site]
            for weight, term in ((0.3, a), (-2.0, b))
        ]
        got = found[name][0].astype(float) @ found["adapter_lowrank_a.5"][site]
        np.testing.assert_allclose(got, sum(terms), rtol=0, atol=1e-6 * np.abs(sum(terms)).max())
        assert found[name].dtype == np.float32


def test_a_low_rank_weight_beyond_float32_is_refused():
    rng = np.random.default_rng(8)
    a = replace(loaded(rng, 5), kinds={"lowrank": product(rng, 2)})
    with pytest.raises(AdapterMismatchError, match="b times its weight is beyond float32"):
        summed("9" * 40 + "*a+a", a=a)


def test_a_spectrum_and_a_product_keep_a_bank_each():
    rng = np.random.default_rng(8)
    a, b = loaded(rng, 5), replace(loaded(rng, 5), kinds={"lowrank": product(rng, 2)})
    found = summed("a+b", a=a, b=b).kinds
    assert set(found) == {"hartley", "lowrank"}
    assert all(np.array_equal(found["lowrank"][key], array) for key, array in b.kinds["lowrank"].items())


def test_whose_head():
    rng = np.random.default_rng(6)
    two, also, three, none = (loaded(rng, 5, labels=labels) for labels in (2, 2, 3, 0))
    assert summed("two+also", two=two, also=also).kinds["head"] is two.kinds["head"]
    assert summed("two+none", two=two, none=none).labels == ("l0", "l1")
    with pytest.raises(
        AdapterMismatchError, match=r"(?s)two answers with 2 labels \(l0, l1\), three with 3.*@head=two"
    ):
        summed("two+three", two=two, three=three)
    with pytest.raises(AdapterMismatchError, match=r"(?s)none answers with no head, two with 2.*none\+two@head=two"):
        summed("none+two", none=none, two=two)
    found = summed("two+three@head=three", two=two, three=three)
    assert (found.labels, found.headed) == (("l0", "l1", "l2"), True)
    assert found.kinds["head"] is three.kinds["head"]
    with pytest.raises(AdapterMismatchError, match=r"(?s)none brings no head"):
        summed("two@head=none", two=two, none=none)


def test_identity_is_weights_and_contents_in_order():
    digests = {"a": "1", "b": "2", "c": "1"}
    same = sum_digest(parse_sum("a+0.5*b"), digests)
    assert same == sum_digest(parse_sum("c+.50*b"), digests)
    others = {sum_digest(parse_sum(t), digests) for t in ("a+b", "0.5*b+a", "a+0.5*b@head=b", "a+0.5*c")}
    assert len(others - {same}) == 4
    assert same != sum_digest(parse_sum("a+0.5*b"), digests | {"b": "3"})


def head(labels, seed):
    rng = np.random.default_rng(seed)
    return {"classifier": {"weight": rng.normal(size=(labels, 8)).astype(np.float32)}}


@pytest.fixture
def deployment(tmp_path):
    made = {
        "spam": random_adapter(SITES, n=9, seed=1, heads=head(2, 1), labels=("ham", "spam")),
        "style": random_adapter(SITES, n=7, seed=2),
        "cosine": random_adapter(SITES, n=5, seed=3, transform="cosine", alpha=0.5),
        "topics": random_adapter(SITES, n=6, seed=4, heads=head(4, 4), labels=("w", "x", "y", "z")),
    }
    with Deployment.open(make_folder(tmp_path / "out", base_labels=3), threads=1, max_coefficients=20) as opened:
        for name, adapter in made.items():
            write_file(adapter, tmp_path / f"{name}.safetensors")
            opened.load(name, tmp_path / f"{name}.safetensors")
        yield opened


def test_through_the_graph_against_dense_deltas(deployment, tmp_path):
    """The graph with the sum's row, against the formula with the float64 sum of the dense deltas."""
    import torch
    from contract_folder import expected

    from ssh_deploy.adapters.file import read_file

    read = {name: read_file(tmp_path / f"{name}.safetensors") for name in ("spam", "style", "cosine", "topics")}
    deltas = {n: {m: d.dense(dtype=torch.float64).numpy() for m, d in a.deltas.items()} for n, a in read.items()}
    heads = {n: a.replaced["classifier"].tensors["weight"] for n, a in read.items() if a.replaced}
    cases = {
        "spam+0.5*style": ({"spam": 1, "style": 0.5}, "spam"),
        "spam+-0.5*style+0.3*cosine": ({"spam": 1, "style": -0.5, "cosine": 0.3}, "spam"),
        "0.2*topics+spam@head=spam": ({"topics": 0.2, "spam": 1}, "spam"),
        "style@head=topics": ({"style": 1}, "topics"),
    }
    ids = np.arange(4, 10)[None]
    feeds = {"input_ids": np.repeat(ids, 6, 0), "attention_mask": np.ones((6, 6), np.int64)}
    mixed = deployment.run(feeds, [*cases, None, "spam"])
    for row, (text, (weights, owner)) in enumerate(cases.items()):
        delta = {site: sum(w * deltas[name][site] for name, w in weights.items()) for site in SITES}
        logits, hidden = expected(ids, delta, (heads[owner], 0.0))
        count = len(heads[owner])
        for got in (mixed, deployment.run(feeds, text)):
            scale = max(1.0, np.abs(hidden[0]).max(), np.abs(logits[0]).max())
            np.testing.assert_allclose(got["last_hidden_state"][row], hidden[0], atol=2e-3 * scale)
            np.testing.assert_allclose(got["logits"][row][:count], logits[0], atol=2e-3 * scale)
    labels = deployment.predict(["who"] * 4, list(cases))
    assert [p.labels for p in labels] == [("ham", "spam")] * 3 + [("w", "x", "y", "z")]


def test_a_sum_is_made_once_and_again_when_a_term_changes(deployment, tmp_path, monkeypatch):
    from ssh_deploy.runtimes import catalogue

    made = []
    monkeypatch.setattr(catalogue, "combine", lambda text, *a, **k: made.append(text) or combine(text, *a, **k))
    feeds = {"input_ids": np.ones((1, 5), np.int64), "attention_mask": np.ones((1, 5), np.int64)}
    first = deployment.run(feeds, "spam+0.5*style")["last_hidden_state"]
    assert deployment.run(feeds, ["spam+0.5*style"])["last_hidden_state"].tobytes() == first.tobytes()
    assert len(made) == 1
    write_file(random_adapter(SITES, n=7, seed=77), tmp_path / "style.safetensors", overwrite=True)
    second = deployment.run(feeds, "spam+0.5*style")["last_hidden_state"]
    assert np.abs(first - second).max() > 1e-3
    assert len(made) == 2


def test_sums_that_cannot_be(deployment):
    for text, error, says in (
        ("spam+stile", UnknownNameError, r"no adapter 'stile'.*Did you mean style"),
        ("spam@head=topic", UnknownNameError, r"no adapter 'topic'.*Did you mean topics"),
        ("spam+topics", AdapterMismatchError, r"spam answers with 2 labels.*topics with 4.*@head=spam"),
        (
            "spam+style+topics@head=spam",
            AdapterMismatchError,
            r"21 adapter_coefficients.*holds 20.*max_coefficients=21",
        ),
        ("spam+../style", UnknownNameError, "never paths"),
    ):
        with pytest.raises(error, match=f"(?s){says}"):
            deployment.predict(["who"], text)
    with pytest.raises(UnknownNameError, match="is not the name"):
        deployment.load("spam+style")
    deployment.unload("style")
    with pytest.raises(UnknownNameError, match="no adapter 'style'"):
        deployment.predict(["who"], "spam+style")


def test_unloading_a_term_frees_its_sums(deployment):
    before = deployment.nbytes
    deployment.predict(["who"], "spam+0.5*style")
    assert deployment.nbytes > before
    deployment.unload("style")
    row = deployment.how_many_fit().adapter_bytes["hartley"]
    assert deployment.nbytes == before - row

"""Residents: who is evicted, who waits, what is refused; every lease sees its own bytes whatever happens meanwhile."""

import threading
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ssh_deploy.errors import AdapterMismatchError, DeploymentError
from ssh_deploy.runtimes.bank import Bank
from ssh_deploy.runtimes.loading import Loaded
from ssh_deploy.runtimes.residents import MustReadError, Residents, Wanted
from ssh_deploy.runtimes.session import Input

INPUTS = {
    "hartley": [
        Input("adapter_values", np.float32, ("adapters", 2, "coefficients")),
        Input("adapter_scales", np.float32, ("adapters", 2)),
    ],
    "cosine": [Input("adapter_cosine_values", np.float32, ("cosine_adapters", 2, "cosine_coefficients"))],
    "head": [
        Input("adapter_head.c.weight", np.float32, ("head_adapters", "labels", 3)),
        Input("adapter_head.c.bias", np.float32, ("head_adapters", "labels")),
    ],
}
WIDTHS = {"coefficients": 4, "cosine_coefficients": 3, "labels": 5}
ROW = {"hartley": 40, "cosine": 24, "head": 80}


def residents(budget):
    banks = {k: Bank(k, inputs, widths=WIDTHS, capacity=budget // ROW[k]) for k, inputs in INPUTS.items()}
    assert {kind: bank.row_bytes for kind, bank in banks.items()} == ROW
    return Residents(banks, budget=budget)


def content(i, kinds=("hartley",)):
    """Content ``i``, recognisable in every number; its widths depend on ``i``."""
    made = {
        "hartley": {
            "adapter_values": np.full((2, 1 + i % 4), i, np.float32),
            "adapter_scales": np.full(2, i, np.float32),
        },
        "cosine": {"adapter_cosine_values": np.full((2, 1 + i % 3), i, np.float32)},
        "head": {
            "adapter_head.c.weight": np.full((1 + i % 5, 3), i, np.float32),
            "adapter_head.c.bias": np.full(1 + i % 5, i, np.float32),
        },
    }
    return Loaded({k: made[k] for k in kinds}, "head" in kinds, (), f"digest{i}", "ssh", None, None)


def want(i, kinds=("hartley",), terms=()):
    return Wanted(f"name{i}", f"digest{i}", content(i, kinds), frozenset(terms))


def hold(r, *wanted):
    """Rows of ``wanted``, or None where it would have to wait."""
    with r.changed:
        return r._take(wanted)


def let_go(r, held):
    with r.changed:
        r.release(held)


def load(r, i, **options):
    """As loading a name does: owned by one name, then idle."""
    with r.changed:
        r.own(f"digest{i}", **options)
    held = r.acquire([want(i)].copy)
    let_go(r, held)


def check(r, held, kinds):
    """``held`` still has the numbers of its content, exactly padded."""
    i = int(held.loaded.digest.removeprefix("digest"))
    assert set(held.rows) == set(kinds)
    for kind, arrays in content(i, kinds).kinds.items():
        fed = r.banks[kind].mixed([held.rows[kind]])
        for name, array in arrays.items():
            full = np.full(fed[name].shape[1:], -np.inf if name.endswith(".bias") else 0, np.float32)
            full[tuple(slice(0, n) for n in array.shape)] = array
            np.testing.assert_array_equal(fed[name][held.rows[kind]], full)


def test_the_longest_idle_goes_first_and_rows_are_reused():
    r = residents(3 * ROW["hartley"])
    for i in (1, 2, 3):
        load(r, i)
    load(r, 1)  # used again
    load(r, 4)
    assert [r.holds(f"digest{i}") for i in (1, 2, 3, 4)] == [True, False, True, True]
    assert (len(r), r.used) == (3, r.budget)
    with pytest.raises(MustReadError):
        r.acquire([Wanted("name2", "digest2")].copy)


def test_a_batch_does_not_evict_its_own():
    """The longest idle is wanted by the very batch that needs room."""
    r = residents(3 * ROW["hartley"])
    for i in (1, 2, 3):
        load(r, i)
    held = hold(r, want(1), want(4), want(2))
    assert [r.holds(f"digest{i}") for i in (1, 2, 3, 4)] == [True, True, False, True]
    for one in held:
        check(r, one, ("hartley",))


def test_an_eviction_for_another_kind():
    """Bytes are what counts: a head's 80 take the place of two spectra of 40."""
    r = residents(120)
    for i in (1, 2, 3):
        load(r, i)
    held = hold(r, want(4, ("head",)))
    assert [r.holds(f"digest{i}") for i in (1, 2, 3, 4)] == [False, False, True, True]
    assert (r.used, r.head_bytes()) == (120, 80)
    check(r, held[0], ("head",))


def test_pinned_and_used_contents_stay():
    r = residents(3 * ROW["hartley"])
    load(r, 1, pinned=True)
    load(r, 2)
    held = hold(r, want(2))
    load(r, 3)
    load(r, 4)
    assert [r.holds(f"digest{i}") for i in (1, 2, 3, 4)] == [True, True, False, True]
    with r.changed:
        r.unpin("digest1")
    let_go(r, held)
    load(r, 5)
    load(r, 6)
    assert [r.holds(f"digest{i}") for i in (1, 2, 4, 5, 6)] == [False, True, False, True, True]


def test_what_could_never_fit_is_refused_with_the_numbers():
    r = residents(3 * ROW["hartley"])
    with pytest.raises(DeploymentError, match=r"(?s)4 distinct adapters at once take 160 bytes.*budget is 120.*0 are"):
        hold(r, *map(want, range(1, 5)))
    assert (len(r), r.used) == (0, 0)
    load(r, 1, pinned=True)
    load(r, 2, pinned=True)
    with pytest.raises(DeploymentError, match=r"(?s)2 distinct.*take 80 bytes.*of which 80 are pinned.*unpin"):
        hold(r, want(3), want(4))
    assert hold(r, want(1), want(2), want(3)) is not None  # the pinned ones are in this batch themselves
    with pytest.raises(AdapterMismatchError, match="name9: needs lowrank slots"):
        r.acquire([Wanted("name9", "d", Loaded({"lowrank": {}}, False, (), "d", "lora", None, None))].copy)


def test_an_adapter_takes_rows_only_of_its_kinds():
    r = residents(1000)
    held = hold(r, want(1), want(2, ("cosine", "head")), want(3, ("hartley", "cosine")))
    assert [sorted(c.rows) for c in held] == [["hartley"], ["cosine", "head"], ["cosine", "hartley"]]
    assert {kind: bank.used for kind, bank in r.banks.items()} == {"hartley": 2, "cosine": 2, "head": 1}
    assert r.used == 2 * 40 + 2 * 24 + 80
    assert [c.nbytes for c in held] == [40, 104, 64]


def test_two_names_share_a_content_until_both_are_gone():
    r = residents(1000)
    load(r, 1)
    load(r, 1)
    assert r.used == 40
    with r.changed:
        r.disown("digest1")
    assert r.holds("digest1")
    held = hold(r, want(1))
    with r.changed:
        r.disown("digest1")
    assert r.holds("digest1")  # a run has it still
    check(r, held[0], ("hartley",))
    let_go(r, held)
    assert (len(r), r.used) == (0, 0)


def test_sums_go_with_their_terms_and_copies_are_without_padding():
    r = residents(1000)
    load(r, 1)
    let_go(r, hold(r, want(2, terms=["digest1", "digest9"])))
    assert r.holds("digest2")
    assert r.copy("digest2").kinds["hartley"]["adapter_values"].tolist() == [[2, 2, 2]] * 2
    assert r.copy("digest3") is None
    with r.changed:
        r.disown("digest1")
    assert (len(r), r.used) == (0, 0)


def test_a_batch_waits_holding_nothing_and_is_served_in_order():
    r = residents(3 * ROW["hartley"])
    first = hold(r, want(1), want(2))
    served = []

    def ask(label, *wanted):
        held = r.acquire(list(wanted).copy, lambda: served.append(label))
        time.sleep(0.02)
        let_go(r, held)

    large = threading.Thread(target=ask, args=("large", want(3), want(4), want(5)))
    large.start()
    while not r._queue:
        time.sleep(0.001)
    assert (len(r), r.used) == (2, 80)  # the third row is free: whoever waits does not hold it
    small = threading.Thread(target=ask, args=("small", want(6)))  # would fit now, and does not overtake
    small.start()
    time.sleep(0.05)
    assert served == []
    let_go(r, first)
    for thread in (large, small):
        thread.join(5)
        assert not thread.is_alive()
    assert served == ["large", "small"]


def test_whoever_waits_asks_again_and_may_give_up():
    r = residents(ROW["hartley"])
    first = hold(r, want(1))
    asked, raised = [], []

    def settle():
        asked.append(1)
        if len(asked) > 1:
            raise DeploymentError("gone meanwhile")
        return [want(2)]

    def ask():
        try:
            r.acquire(settle)
        except DeploymentError as error:
            raised.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not r._queue:
        time.sleep(0.001)
    let_go(r, first)
    thread.join(5)
    assert raised == ["gone meanwhile"]
    assert not r._queue
    assert hold(r, want(3)) is not None  # nobody is in the way


class Machine(RuleBasedStateMachine):
    """Any history of loads, leases, releases, drops, pins and the evictions they cause."""

    def __init__(self):
        super().__init__()
        self.r = residents(3 * 40 + 2 * 24 + 80)
        self.kinds = {}
        self.names = {}
        self.pins = {}
        self.leases = []

    def kinds_of(self, i):
        return self.kinds.setdefault(i, [("hartley",), ("cosine",), ("head",), ("hartley", "head")][i % 4])

    @rule(i=st.integers(1, 12))
    def load(self, i):
        with self.r.changed:
            self.r.own(f"digest{i}")
        self.names[i] = self.names.get(i, 0) + 1

    @rule(batch=st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True))
    def lease(self, batch):
        try:
            held = hold(self.r, *(want(i, self.kinds_of(i)) for i in batch))
        except DeploymentError:
            pinned = sum(sum(ROW[k] for k in self.kinds_of(i)) for i in self.pins if i not in batch)
            assert sum(sum(ROW[k] for k in self.kinds_of(i)) for i in batch) + pinned > self.r.budget
            return
        if held is None:
            assert self.leases  # only those who run can be in the way
        else:
            self.leases.append((batch, held))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        _, held = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        let_go(self.r, held)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def drop(self, data):
        i = data.draw(st.sampled_from(sorted(self.names)))
        with self.r.changed:
            self.r.disown(f"digest{i}")
        self.names[i] -= 1
        if not self.names[i]:
            del self.names[i]
            used = any(i in batch for batch, _ in self.leases)
            assert self.r.holds(f"digest{i}") == used or i in self.pins

    @rule(i=st.integers(1, 12), pinned=st.booleans())
    def pin(self, i, pinned):
        with self.r.changed:
            if pinned and len(self.pins) < 2:
                self.r.pin(f"digest{i}")
                self.pins[i] = self.pins.get(i, 0) + 1
            elif not pinned and i in self.pins:
                self.r.unpin(f"digest{i}")
                self.pins[i] -= 1
                if not self.pins[i]:
                    del self.pins[i]

    @invariant()
    def every_lease_sees_its_own_bytes(self):
        for batch, held in self.leases:
            for i, one in zip(batch, held, strict=True):
                assert one.loaded.digest == f"digest{i}"
                check(self.r, one, self.kinds_of(i))

    @invariant()
    def no_two_owners_of_a_row(self):
        for kind, bank in self.r.banks.items():
            rows = [c.rows[kind] for c in self.r._contents.values() if kind in c.rows]
            assert len(rows) == len(set(rows)) == bank.used
            assert all(0 < row <= bank.capacity for row in rows)

    @invariant()
    def the_budget_is_held(self):
        assert self.r.used == sum(bank.used * bank.row_bytes for bank in self.r.banks.values()) <= self.r.budget

    @invariant()
    def only_what_is_idle_is_up_for_eviction(self):
        used = {f"digest{i}" for batch, _ in self.leases for i in batch}
        assert not used & set(self.r._idle)
        assert not {f"digest{i}" for i in self.pins} & set(self.r._idle)

    @invariant()
    def nothing_stays_that_nobody_wants(self):
        wanted = {f"digest{i}" for i in self.names} | {f"digest{i}" for batch, _ in self.leases for i in batch}
        assert set(self.r._contents) <= wanted


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""Models that are timed are opened anew together, in another order, closed in the end, and warm."""

from ssh_deploy.jobs.reopening import ROUNDS, Openings


class Opened:
    """Opens models that are numbers, and notes what is closed."""

    def __init__(self):
        self.forms, self.closed = [], []

    def __call__(self, stack, form):
        self.forms.append(form)
        stack.callback(self.closed.append, len(self.forms) - 1)
        return len(self.forms) - 1


def test_all_are_opened_anew_together_after_some_rounds_and_closed_in_the_end():
    opens = Opened()
    with Openings(opens, 2) as openings:
        plain, ours = openings.of("plain"), openings.of("qv")
        assert (plain, ours) == ([0, 1], [2, 3])
        assert openings.of("qv") is ours
        for i in range(ROUNDS + 1):
            assert [openings.renew(i) for _ in range(3)] == [i % ROUNDS == 0, False, False]
            assert opens.closed == ([] if i < ROUNDS else [3, 2, 1, 0])  # closed before others are opened
        assert {*plain, *ours} == {4, 5, 6, 7}
        assert [opens.forms[k] for k in plain + ours] == ["plain", "plain", "qv", "qv"]
    assert sorted(opens.closed) == list(range(8))


def test_the_order_of_opening_changes():
    opens = Opened()
    with Openings(opens, 3) as openings:
        openings.of("plain"), openings.of("qv")
        for i in range(0, 9 * ROUNDS, ROUNDS):
            openings.renew(i)
    orders = {tuple(opens.forms[k : k + 6]) for k in range(0, len(opens.forms), 6)}
    assert len(orders) > 3


def test_what_was_just_opened_is_warm_before_it_counts():
    told = []
    with Openings(Opened(), 1) as openings:
        openings.of("qv")
        variants = {name: lambda i, name=name: told.append((name, i)) for name in ("on", "off")}
        before = openings.before(variants, times=2)
        before["on"](0)
        assert told == [("on", 0), ("on", 1), ("off", 0), ("off", 1), ("on", 0)]
        told.clear()
        before["off"](0), before["on"](1)
        assert told == [("off", 0), ("on", 1)]
        told.clear()
        before["off"](ROUNDS)
        assert told[-1] == ("off", ROUNDS)
        assert len(told) == 5


def test_those_that_hold_them_end_first():
    told = []

    def opens(stack, form):
        stack.callback(told.append, "closed")

    with Openings(opens, 1) as openings:
        openings.of("qv")
        openings.ending.append(lambda: told.append("ended"))
        for i in (0, ROUNDS):
            openings.renew(i)
    assert told == ["ended", "closed", "ended", "closed"]

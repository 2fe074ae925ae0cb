"""Interleaved timing on made-up clocks: pairs, medians, intervals, and when it stops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.jobs import timing
from ssh_deploy.jobs.timing import interleaved, median_interval


class Clock:
    """Time that passes only when a variant says so."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def takes(self, name, seconds):
        def run(i):
            self.calls.append((name, i))
            self.now += seconds(i) if callable(seconds) else seconds

        return run


def timed(clock, variants, **options):
    runs = {name: clock.takes(name, seconds) for name, seconds in variants.items()}
    return interleaved(runs, base="base", clock=clock, cpu_clock=clock, **options)


def test_steady_variants_stop_at_the_first_look_and_say_what_they_take():
    found = timed(Clock(), {"base": 0.010, "slow": 0.012, "fast": 0.005})
    assert found["slow"].ratio == pytest.approx(1.2)
    assert found["fast"].ratio == pytest.approx(0.5)
    assert found["base"].ratio == found["base"].cpu_ratio == 1.0
    assert found["slow"].ms == pytest.approx(12.0)
    assert found["slow"].difference_ms == pytest.approx(2.0)
    assert found["slow"].low == pytest.approx(1.2) == found["slow"].high
    assert {one.rounds for one in found.values()} == {8}


def test_a_machine_that_drifts_does_not_move_the_ratio():
    clock = Clock()
    drift = lambda i: 1.0 + 0.2 * i  # noqa: E731  (every round is slower, for both)
    found = timed(clock, {"base": lambda i: 0.01 * drift(i), "x": lambda i: 0.011 * drift(i)}, least=20)
    assert found["x"].ratio == pytest.approx(1.1)
    assert found["x"].high - found["x"].low < 1e-9


def test_every_round_runs_each_variant_once_and_the_order_changes():
    clock = Clock()
    timed(clock, {"base": 0.01, "a": 0.01, "b": 0.01}, least=16)
    counted = clock.calls[3:]  # the first of each is the warm-up
    rounds = [counted[i : i + 3] for i in range(0, len(counted), 3)]
    assert all({name for name, _ in one} == {"base", "a", "b"} for one in rounds)
    assert [{i for _, i in one} for one in rounds] == [{k} for k in range(len(rounds))]
    assert len({tuple(name for name, _ in one) for one in rounds}) > 2


def test_noise_goes_on_until_the_interval_is_narrow():
    rng = np.random.default_rng(0)
    variants = {"base": 0.01, "x": lambda i: 0.01 * (1 + 0.05 * rng.standard_normal())}
    found = timed(Clock(), variants, seconds=1e9, width=0.02)
    assert found["x"].rounds > 40
    assert found["x"].high - found["x"].low < 0.02
    wider = timed(Clock(), {"base": 0.01, "x": lambda i: 0.01 * (1 + 0.05 * rng.standard_normal())}, width=0.1)
    assert wider["x"].rounds < found["x"].rounds


def test_the_time_limit_ends_it_with_the_interval_it_has():
    rng = np.random.default_rng(0)
    found = timed(Clock(), {"base": 0.5, "x": lambda i: 0.5 + rng.random()}, seconds=20.0, width=1e-6)
    assert found["x"].high - found["x"].low > 1e-6
    assert 8 <= found["x"].rounds <= 40


def test_the_least_rounds_are_run_whatever_the_limit():
    assert timed(Clock(), {"base": 5.0, "x": 5.0}, seconds=0.1, least=8)["x"].rounds == 8


def test_progress_counts_seconds():
    told = []
    timed(Clock(), {"base": 0.1, "x": 0.1}, seconds=10.0, progress=lambda *a: told.append(a), stage="s")
    assert told[0][0] == "s"
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2] == 10_000


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=50))
def test_an_interval_lies_within_the_values_and_round_the_median(values):
    low, high = median_interval(values)
    assert min(values) <= low <= high <= max(values)
    assert low <= np.median(values) <= high


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        low, high = median_interval(rng.standard_normal(40) + 1.0, seed=seed)
        inside += low <= 1.0 <= high
    assert 180 <= inside <= 199


def test_one_outlier_and_the_warm_up_move_nothing():
    found = timed(Clock(), {"base": 0.01, "x": lambda i: 9.0 if i == 5 else 0.02}, least=40, width=5.0)
    assert found["x"].ratio == pytest.approx(2.0)
    clock, calls = Clock(), []

    def cold(i):
        calls.append(i)
        clock.now += 5.0 if len(calls) == 1 else 0.02

    steady = clock.takes("base", 0.01)
    found = interleaved({"base": steady, "x": cold}, base="base", clock=clock, cpu_clock=clock)
    assert found["x"].high == pytest.approx(2.0)


def test_looks_grow_rarer_as_rounds_grow(monkeypatch):
    looks = []
    monkeypatch.setattr(timing, "_settled", lambda wall, *rest: looks.append(len(wall["x"])))
    timed(Clock(), {"base": 0.01, "x": 0.01}, seconds=40.0)
    assert looks[:4] == [8, 10, 13, 17]
    assert len(looks) < 30


def test_what_comes_before_is_not_timed_and_comes_right_before():
    clock = Clock()
    runs = {name: clock.takes(name, seconds) for name, seconds in (("base", 0.01), ("x", 0.02))}
    warm = {"x": clock.takes("warm x", 7.0)}
    found = interleaved(runs, base="base", clock=clock, cpu_clock=clock, before=warm)
    assert found["x"].ratio == pytest.approx(2.0)
    names = [name for name, _ in clock.calls[2:]]
    assert all(names[i - 1] == "warm x" for i, name in enumerate(names) if name == "x")
    assert names.count("warm x") == names.count("x")
    assert "warm base" not in names


def test_what_ran_before_has_stopped_when_a_variant_was_spun_down(monkeypatch):
    """A short variant runs again and again, a long one once, always in its own round."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    for takes, times in ((0.03, 4), (0.5, 1)):
        rounds = []

        def variant(i, takes=takes, rounds=rounds):
            rounds.append(i)
            now[0] += takes

        timing.spun_down(variant, 7)
        assert rounds == [7] * times

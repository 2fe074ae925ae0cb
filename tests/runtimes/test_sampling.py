"""Sampling against its plain definition in float64; draws follow the distribution; seeds; what is refused."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.sampling import Sampling, choose, distribution


def definition(logits, temperature, top_k, top_p):
    """{token: probability}, as plainly as can be."""
    scaled = [float(x) / temperature for x in logits]
    kept = list(range(len(scaled)))
    if 0 < top_k < len(kept):
        least = sorted(scaled, reverse=True)[top_k - 1]
        kept = [i for i in kept if scaled[i] >= least]
    weights = {i: math.exp(scaled[i] - max(scaled)) for i in kept}
    total = math.fsum(weights.values())
    mass = {i: w / total for i, w in weights.items()}
    if top_p < 1:
        nucleus, before = [], 0.0
        for i in sorted(mass, key=lambda i: (-mass[i], i)):
            if before >= top_p and nucleus:
                break
            nucleus.append(i)
            before += mass[i]
        total = math.fsum(mass[i] for i in nucleus)
        mass = {i: mass[i] / total for i in nucleus}
    return mass


logits = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(lambda x: np.array(x, np.float32))


@settings(max_examples=300, deadline=None)
@example(np.array([0.0, 0.0, 0.0, 0.0, 2.0**-52], np.float32), 4.0, 0, 0.5)
@given(logits, st.floats(0.05, 5), st.integers(0, 45), st.floats(0.01, 1))
def test_distribution_is_the_definition(logits, temperature, top_k, top_p):
    tokens, mass = distribution(logits, Sampling(temperature, top_k, top_p))
    want = definition(logits, temperature, top_k, top_p)
    got = dict(zip(tokens.tolist(), mass.tolist(), strict=True))
    if set(got) == set(want):
        assert all(got[i] == pytest.approx(want[i], rel=1e-9) for i in want)
    elif len(got) == len(want):  # at its border are logits that no exponential tells from one another for certain
        assert np.ptp([float(logits[i]) for i in set(got) ^ set(want)]) < 1e-12 * temperature
    else:  # the border of the nucleus falls on a rounding
        order = np.sort(np.array(list(definition(logits, temperature, top_k, 1.0).values())))[::-1].cumsum()
        assert np.abs(order - top_p).min() < 1e-12


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (5, 0.7)])
def test_it_is_what_transformers_draws_from(top_k, top_p):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = np.random.default_rng(0).normal(size=500).astype(np.float32) * 3
    warped = TemperatureLogitsWarper(0.8)(None, torch.from_numpy(scores.astype(np.float64))[None])
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    want = torch.softmax(warped, -1)[0].numpy()
    got = np.zeros(500)
    tokens, mass = distribution(scores, Sampling(0.8, top_k, top_p))
    got[tokens] = mass
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_draws_follow_the_distribution():
    scores = np.array([1.0, 0.0, 2.0, -1.0, 0.5], np.float32)
    sampling = Sampling(temperature=1.3, top_k=4, top_p=0.95)
    rng = np.random.default_rng(3)
    drawn = np.bincount([choose(scores, sampling, rng) for _ in range(20_000)], minlength=5) / 20_000
    want = definition(scores, 1.3, 4, 0.95)
    assert drawn[3] == 0
    for token, probability in want.items():
        assert drawn[token] == pytest.approx(probability, abs=0.015)


def test_greedy_takes_the_best_and_of_equals_the_first():
    rng = np.random.default_rng(0)
    assert choose(np.array([0, 3, 3, 1], np.float32), Sampling(), rng) == 1
    assert choose(np.array([-np.inf, -2, -np.inf], np.float32), Sampling(), rng) == 1


def test_the_coldest_draw_is_the_best():
    scores = np.array([0, 1, 3, 2], np.float32)
    assert {choose(scores, Sampling(1e-300), np.random.default_rng(s)) for s in range(20)} == {2}


def test_tokens_that_are_impossible_are_never_drawn():
    scores = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    rng = np.random.default_rng(0)
    assert {choose(scores, Sampling(1.0), rng) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_choice_among_what_is_no_number(bad, temperature):
    with pytest.raises(DeploymentError, match="for token 2"):
        choose(np.array([0, 1, bad, 2], np.float32), Sampling(temperature), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_numbers_that_say_nothing(fields, says):
    with pytest.raises(DeploymentError, match=says):
        Sampling(**fields)

"""The job of `ssh-deploy run --prompt`: answers in order, told as they come, refused with the reason."""

import pytest

from ssh_deploy import Deployment
from ssh_deploy.errors import DeploymentError, UnknownNameError
from ssh_deploy.jobs.generating import generate_texts
from ssh_deploy.jobs.running import answer_texts
from ssh_deploy.runtimes.sampling import Sampling

PROMPTS = ["the quick", "h", "when is the end"]


def test_answers_are_those_of_the_deployment_and_told_in_order(decoder):
    told = []
    names = ["red", None, "green"]
    report = generate_texts(
        decoder[2], PROMPTS, adapters=names, max_new_tokens=12, rows=2, said=lambda *x: told.append(x)
    )
    with Deployment.open(decoder[2]) as deployment:
        want = deployment.generate(PROMPTS, names, max_new_tokens=12)
    assert [(a.text, a.tokens, a.adapter) for a in report.answers] == [(w.text, w.tokens, w.adapter) for w in want]
    assert [row for row, _ in told] == sorted(row for row, _ in told)
    for i, answer in enumerate(want):
        assert "".join(text for row, text in told if row == i) == answer.text
        assert sum(row == i for row, _ in told) > 1
    shown = report.as_dict()
    assert [a["prompt"] for a in shown["answers"]] == PROMPTS
    assert [a["adapter"] for a in shown["answers"]] == names
    assert shown["answers"][0]["tokens"] == list(want[0].tokens)
    assert shown["tokens_per_second"] > 0


def test_options_reach_the_requests(decoder, tmp_path):
    loads = [("mine", decoder[1]["green"])]
    sampling = Sampling(1.0, seed=5)
    one = generate_texts(decoder[2], ["who"], adapters=["mine"], loads=loads, chat=True, sampling=sampling)
    with Deployment.open(decoder[2]) as deployment:
        want = deployment.generate(["who"], "green", chat=True, sampling=sampling)
    assert one.answers[0].tokens == want[0].tokens
    assert one.answers[0].seed == 5
    stop = want[0].text[2:4]
    cut = generate_texts(decoder[2], ["who"], adapters=["green"], chat=True, sampling=sampling, stop=[stop])
    assert cut.answers[0].text == want[0].text[: want[0].text.find(stop)]


def test_mistakes_are_refused(decoder, exported):
    out = decoder[2]
    with pytest.raises(DeploymentError, match="no prompt"):
        generate_texts(out, [])
    with pytest.raises(DeploymentError, match="2 adapters for 3"):
        generate_texts(out, PROMPTS, adapters=["red", "green"])
    with pytest.raises(UnknownNameError, match=r"reed(.|\n)*red"):
        generate_texts(out, PROMPTS, adapters=["reed"])
    with pytest.raises(DeploymentError, match="--text"):
        generate_texts(exported("bert")[2], PROMPTS)
    with pytest.raises(DeploymentError, match=r"run --prompt"):
        answer_texts(out, PROMPTS)

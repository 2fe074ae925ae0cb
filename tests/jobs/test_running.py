"""The job of `ssh-deploy run`: answers in order, adapters spread over texts, progress told."""

import numpy as np
import pytest
from contract_folder import SITES, make_folder

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.errors import DeploymentError, UnknownNameError
from ssh_deploy.jobs.running import answer_texts
from ssh_deploy.testing import random_adapter


@pytest.fixture
def folder(tmp_path):
    head = {"classifier": {"weight": np.ones((2, 8), np.float32), "bias": np.array([0, 99], np.float32)}}
    adapter = random_adapter(SITES, n=5, heads=head, labels=("a", "b"))
    write_file(adapter, tmp_path / "mine.safetensors")
    return make_folder(tmp_path / "out", base_labels=3)


def test_answers_are_those_of_predict_in_order(folder, tmp_path):
    loads = [("mine", tmp_path / "mine.safetensors")]
    texts = ["free", "who", "what is the question"]
    report = answer_texts(folder, texts, adapters=["mine", None, "mine"], loads=loads, batch_size=2)
    with Deployment.open(folder) as deployment:
        deployment.load(*loads[0])
        want = deployment.predict(texts, ["mine", None, "mine"])
    assert [a.text for a in report.answers] == texts
    for answer, prediction in zip(report.answers, want, strict=True):
        np.testing.assert_allclose(answer.value.logits, prediction.logits, atol=1e-5)
    shown = report.as_dict()["answers"]
    assert [row["adapter"] for row in shown] == ["mine", None, "mine"]
    assert shown[0]["label"] == "b"
    assert set(shown[1]["logits"]) == {"no", "maybe", "yes"}
    assert report.lines()[0] == f"b {want[0].score:.3f}  [mine]  free"
    assert "[base]" in report.lines()[1]


def test_one_adapter_serves_all_texts_and_none_is_the_base(folder, tmp_path):
    loads = [("mine", tmp_path / "mine.safetensors")]
    one = answer_texts(folder, ["free", "who"], adapters=["mine"], loads=loads)
    assert [a.adapter for a in one.answers] == ["mine", "mine"]
    assert [a.adapter for a in answer_texts(folder, ["free", "who"]).answers] == [None, None]


def test_a_model_without_head_gives_the_mean_of_its_hidden_state(tmp_path):
    folder = make_folder(tmp_path / "out", task="feature-extraction")
    report = answer_texts(folder, ["free prize"])
    shown = report.as_dict()["answers"][0]
    with Deployment.open(folder) as deployment:
        hidden = deployment.predict(["free prize"])[0]
    assert shown["tokens"] == len(hidden) == 4
    np.testing.assert_allclose(shown["mean"], hidden.mean(axis=0), atol=1e-6)
    assert report.lines() == ["4 tokens  [base]  free prize"]


def test_progress_is_told_and_mistakes_are_refused(folder):
    told = []
    answer_texts(folder, ["who"] * 5, batch_size=2, progress=lambda *x: told.append(x))
    assert told == [("answering", 2, 5), ("answering", 4, 5), ("answering", 5, 5)]
    with pytest.raises(DeploymentError, match="no text to answer"):
        answer_texts(folder, [])
    with pytest.raises(DeploymentError, match="2 adapters for 3 texts"):
        answer_texts(folder, ["a"] * 3, adapters=["x", "y"])
    with pytest.raises(UnknownNameError, match="no adapter 'x'"):
        answer_texts(folder, ["a"], adapters=["x"])

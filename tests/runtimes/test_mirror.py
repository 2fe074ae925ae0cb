"""Banks on a device: uploaded when a row was written, lent as they are, and never another row's numbers."""

import numpy as np
import pytest

from ssh_deploy import Deployment
from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.bank import Bank
from ssh_deploy.runtimes.mirror import Mirror
from ssh_deploy.runtimes.session import Input, Session, onnxruntime, ort_value

CUDA = "CUDAExecutionProvider"
needs_cuda_provider = pytest.mark.skipif(
    CUDA not in onnxruntime().get_available_providers(), reason="this onnxruntime has no CUDA provider"
)
INPUTS = [Input("adapter_values", np.float32, ("rows", 2))]


def test_uploads_only_what_was_written_since():
    uploads = []

    def upload(array):
        uploads.append(array.shape)
        return array.copy()

    bank = Bank("hartley", INPUTS, widths={}, capacity=20, upload=upload)
    assert bank.on_device
    first = bank.put({"adapter_values": np.float32([1, 2])})
    one = bank.mixed([first, 0])
    assert one["adapter_ids"].tolist() == [1, 0]
    assert one["adapter_values"].tolist() == [[0, 0], [1, 2]]
    assert bank.mixed([0, first])["adapter_values"] is one["adapter_values"]
    second = bank.put({"adapter_values": np.float32([3, 4])})
    two = bank.mixed([second])
    assert two["adapter_values"][second].tolist() == [3, 4]
    assert one["adapter_values"].tolist() == [[0, 0], [1, 2]]  # runs that began keep what they were lent
    assert uploads == [(2, 2), (4, 2)]  # rows as a power of two: few shapes
    bank.free(first)
    bank.give_back()
    assert bank.put({"adapter_values": np.float32([5, 6])}) == first
    assert bank.mixed([first])["adapter_values"][first].tolist() == [5, 6]
    assert not Bank("hartley", INPUTS, widths={}, capacity=2).on_device


def test_an_older_version_does_not_replace_a_newer_one():
    mirror = Mirror(lambda array: array.copy())
    new = mirror.values({"x": np.ones(4)}, used=3, version=5)
    assert mirror.values({"x": np.zeros(4)}, used=3, version=4)["x"] is new["x"]


@pytest.mark.hostile
def test_a_row_beyond_the_bank_is_refused_here():
    """On the host, before a run: Gather on a GPU would answer something."""
    for upload in (None, np.copy):
        bank = Bank("hartley", INPUTS, widths={}, capacity=4, upload=upload)
        row = bank.put({"adapter_values": np.float32([1, 2])})
        for wrong in ([0, row + 1], [-1], [4000]):
            with pytest.raises(DeploymentError, match="bank of hartley adapters"):
                bank.mixed(wrong)


def test_a_session_takes_what_lies_on_a_device(exported):
    """Values instead of arrays among the feeds: the same answers."""
    _, _, folder = exported("bert")
    session = Session(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert (session.device, session.upload) == ("cpu", None)
    ids = np.arange(4, 12).reshape(1, 8)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    plain = session.run(feeds)
    lent = session.run({**feeds, "input_ids": ort_value(ids)})
    assert all(np.array_equal(plain[name], lent[name]) for name in plain)


def test_a_deployment_with_banks_on_a_device(exported, monkeypatch):
    """The device's way, its memory played by copies in this one: bit for bit the answers of arrays lent."""
    _, files, folder = exported("bert")
    names = sorted(files)
    ids = np.arange(4, 36).reshape(4, 8) % 60
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    batches = ([None] * 4, [names[0]] * 4, [names[0], None, names[1], names[0]], ["mine", names[1], "mine", None])

    def answers():
        with Deployment.open(folder, providers=["CPUExecutionProvider"]) as deployment:
            deployment.load("mine", files[names[1]])
            return [deployment.run(feeds, batch)["logits"] for batch in batches]

    want = answers()
    uploads = []

    def upload(array):
        uploads.append(array.nbytes)
        return ort_value(array.copy())

    monkeypatch.setattr(Session, "upload", property(lambda session: upload))
    for got, right in zip(answers(), want, strict=True):
        np.testing.assert_array_equal(got, right)
    assert uploads


@pytest.mark.gpu
@needs_cuda_provider
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_cuda_answers_as_the_cpu_does(exported, architecture):
    """Every row its own, on the CUDA provider with banks on the device, beside the CPU provider."""
    _, files, folder = exported(architecture)
    names = [*sorted(files), None]
    ids = np.arange(4, 36).reshape(4, 8) % 60
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    answers = []
    for provider in ("CPUExecutionProvider", CUDA):
        with Deployment.open(folder, providers=[provider]) as deployment:
            feeds = {name: every[name] for name in deployment.inputs}
            answers.append(
                [deployment.run(feeds, batch)["logits"] for batch in ([names[0]] * 4, [*names, names[0]][:4])]
            )
    for cpu, cuda in zip(*answers, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=2e-3 * np.abs(cpu).max())

"""Banks for stock onnxruntime: packed, loaded by it, fed adapter_ids, and the same numbers as one by one."""

import json

import numpy as np
import onnxruntime as ort
import pytest

from ssh_deploy.errors import DeploymentError, OutputError, UnknownNameError
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.jobs.packing import pack_adapters


def run(folder, feeds, path):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(folder / "model.onnx"), options)
    adapter, active = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(path))
    active.add_active_adapter(adapter)
    return session.run(None, feeds, active)[0]


def inputs(architecture, rows=4):
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(5, 25, (rows, 9)), "attention_mask": np.ones((rows, 9), np.int64)}
    return feeds | ({"token_type_ids": np.zeros((rows, 9), np.int64)} if architecture == "bert" else {})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_a_bank_fed_with_ids_gives_each_row_its_own(exported, tmp_path, architecture):
    _, _, folder = exported(architecture)
    report = pack_adapters(folder, ["plain", "headed"], tmp_path / "bank.onnx_adapter")
    index = json.loads((tmp_path / "bank.json").read_text())
    assert index["ids"] == report.ids
    assert index["ids"]["plain"] == {"adapter_ids": 1, "adapter_head_ids": 0}
    assert index["ids"]["headed"] == {"adapter_ids": 2, "adapter_head_ids": 1}
    feeds = inputs(architecture)
    order = ["headed", None, "plain", "headed"]
    ids = {
        key: np.array([index["ids"][name][key] if name else 0 for name in order])
        for key in ("adapter_ids", "adapter_head_ids")
    }
    mixed = run(folder, {**feeds, **ids}, tmp_path / "bank.onnx_adapter")
    assert mixed.shape == (4, 5)
    for row, name in enumerate(order):
        one = {key: array[row : row + 1] for key, array in feeds.items()}
        if name:
            alone = run(folder, one, folder / "adapters" / f"{name}.onnx_adapter")
        else:
            session = ort.InferenceSession(str(folder / "model.onnx"))
            alone = session.run(None, one)[0]
        np.testing.assert_allclose(mixed[row, : alone.shape[1]], alone[0], rtol=0, atol=1e-5)
        assert np.isneginf(mixed[row, alone.shape[1] :]).all()  # labels that this row's head has not
    for bad in ([-1] * 4, [3, 0, 0, 0], [1, 2]):
        with pytest.raises(Exception, match=r"out of data bounds|invalid expand"):
            run(folder, {**feeds, **ids, "adapter_ids": np.array(bad)}, tmp_path / "bank.onnx_adapter")


def test_all_adapters_without_names(exported, tmp_path):
    assert list(pack_adapters(exported("bert")[2], [], tmp_path / "b.onnx_adapter").ids) == ["headed", "plain"]


def test_outputs_that_exist_are_left_alone(exported, tmp_path):
    folder = exported("bert")[2]
    (tmp_path / "b.json").write_text("mine")
    with pytest.raises(OutputError, match=r"b\.json exists already"):
        pack_adapters(folder, [], tmp_path / "b.onnx_adapter")
    assert (tmp_path / "b.json").read_text() == "mine"
    with pytest.raises(OutputError, match=r"NAME\.onnx_adapter"):
        pack_adapters(folder, [], tmp_path / "c.json")


def test_unknown_and_absent_adapters(exported, pico, tmp_path):
    with pytest.raises(UnknownNameError, match=r"(?s)'haeded'.*Did you mean headed"):
        pack_adapters(exported("bert")[2], ["haeded"], tmp_path / "b.onnx_adapter")
    export_model(pico("bert"), [], tmp_path / "out")
    with pytest.raises(DeploymentError, match="no adapters to pack"):
        pack_adapters(tmp_path / "out", [], tmp_path / "b.onnx_adapter")

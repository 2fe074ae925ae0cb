"""Exported folders that must be refused, each with its message, before anything answers."""

import json
import os

import numpy as np
import pytest
from contract_folder import GUARD, SITES, add_stored, edit, make_folder, write_onnx_adapter

from ssh_deploy import Deployment
from ssh_deploy.errors import (
    AdapterFileError,
    AdapterMismatchError,
    DeployError,
    DeploymentError,
    FingerprintError,
    UnknownNameError,
)
from ssh_deploy.runtimes.folder import CONTRACT

pytestmark = pytest.mark.hostile


def arrays(n=4, **changes):
    rng = np.random.default_rng(0)
    made = {
        "adapter_values": np.pad(rng.normal(size=(2, n)), ((0, 0), (0, 1))).astype(np.float16),
        "adapter_scales": np.ones(2, np.float32),
        **{f"adapter_row_pointers.{out}": np.minimum(np.arange(out + 1), n).astype(np.uint16)[None] for out in (10, 8)},
        "adapter_cols": np.tile(np.arange(n + 1, dtype=np.uint16) % n, (2, 1)),
        "adapter_head.classifier.weight": rng.normal(size=(2, 8)).astype(np.float32),
        "adapter_head.classifier.bias": np.zeros(2, np.float32),
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


@pytest.fixture
def folder(tmp_path):
    made = make_folder(tmp_path / "out")
    add_stored(made, "good", arrays(), labels=("a", "b"))
    return made


def refused(call, error, *patterns):
    with pytest.raises(error) as caught:
        call()
    for pattern in patterns:
        assert pattern in str(caught.value), str(caught.value)
    assert caught.value.hint


def test_the_good_folder_answers(folder):
    assert Deployment.open(folder).predict(["who"], "good")[0].labels == ("a", "b")


@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_a_flipped_byte_of_an_adapter(folder, where):
    path = folder / "adapters" / "good.onnx_adapter"
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(data)
    deployment = Deployment.open(folder)
    refused(lambda: deployment.predict(["who"], "good"), DeploymentError, "good.onnx_adapter", "not those that were")
    refused(lambda: deployment.load("good"), DeploymentError, "sha256")


def test_a_file_replaced_after_opening_is_refused_at_first_use(folder):
    deployment = Deployment.open(folder)
    write_onnx_adapter(folder / "adapters" / "good.onnx_adapter", arrays(n=5))
    refused(lambda: deployment.predict(["who"], "good"), DeploymentError, "not those that were exported")


def test_a_missing_adapter_file(folder):
    (folder / "adapters" / "good.onnx_adapter").unlink()
    refused(lambda: Deployment.open(folder).predict(["who"], "good"), DeploymentError, "good.onnx_adapter is missing")


def test_symlinks_out_of_the_folder(folder, tmp_path):
    path = folder / "adapters" / "good.onnx_adapter"
    path.rename(tmp_path / "elsewhere.onnx_adapter")
    path.symlink_to(tmp_path / "elsewhere.onnx_adapter")
    refused(lambda: Deployment.open(folder).predict(["who"], "good"), DeploymentError, "leads out of the folder")
    inside = folder / "adapters" / "inside.onnx_adapter"
    (tmp_path / "elsewhere.onnx_adapter").rename(inside)
    path.unlink()
    path.symlink_to(inside)
    assert Deployment.open(folder).predict(["who"], "good")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "deployment.json"])
def test_symlinked_parts_out_of_the_folder(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(lambda: Deployment.open(folder), DeploymentError, name, "leads out of the folder")


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "adapters/../../x", "a\\b"])
def test_forged_paths(folder, file):
    edit(folder, lambda fields: fields["adapters"]["good"].update(file=file))
    refused(lambda: Deployment.open(folder), DeploymentError, repr(file), "forged")


def test_an_adapter_file_that_is_a_folder(folder):
    edit(folder, lambda fields: fields["adapters"]["good"].update(file="adapters"))
    refused(lambda: Deployment.open(folder).predict(["who"], "good"), DeploymentError, "adapters is no file")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 129])
def test_forged_names(folder, name):
    edit(folder, lambda fields: fields["adapters"].update({name: fields["adapters"]["good"]}))
    refused(lambda: Deployment.open(folder), DeploymentError, "not the name of an adapter")


@pytest.mark.parametrize("contract", [1, 0, "1", None, True, 1.0])
def test_unknown_contracts(folder, contract):
    edit(folder, lambda fields: fields.update(contract=contract))
    refused(lambda: Deployment.open(folder), DeploymentError, f"contract {contract!r}", f"this release runs {CONTRACT}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sites": "x"}, "sites"),
        ({"sites": [{"module": "m", "in": 1, "out": 1, "index": 5}]}, "not one table"),
        ({"sites": [{"module": "m", "in": "1", "out": 1, "index": 0}]}, "in is '1'"),
        ({"guard": [1, 2, 3]}, "guard is [1, 2, 3]"),
        ({"guard": None}, "deployment.json says None"),
        ({"guard": [1, 0, 1 << 40]}, "guard"),
        ({"guard": [GUARD[0] + 1, 0, GUARD[2]]}, "deployment.json says"),
        ({"orders": {"hartley": {"8": 3}}}, "orders"),
        ({"adapters": []}, "adapters"),
        ({"adapters": {"x": {"file": "a", "sha256": "zz", "family": "ssh", "labels": []}}}, "no sha256"),
        ({"head": {"module": "classifier", "in": 8, "labels": 2, "base_labels": ["a"]}}, "1 base_labels for 2"),
        ({"head": {"module": "classifier", "in": 8, "labels": -1, "base_labels": None}}, "-1 labels"),
        ({"task": 3}, "task is 3"),
        ({"padding": [1]}, "padding"),
    ],
)
def test_forged_fields(folder, change, says):
    edit(folder, lambda fields: fields.update(change))
    refused(lambda: Deployment.open(folder), DeploymentError, "deployment.json", says)


@pytest.mark.parametrize(
    "key", ["base", "fingerprint", "task", "sites", "orders", "kinds", "adapters", "adapter_inputs"]
)
def test_missing_fields(folder, key):
    edit(folder, lambda fields: fields.pop(key))
    refused(lambda: Deployment.open(folder), DeploymentError, f"{key} is missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"contract": NaN}'])
def test_deployment_json_that_is_none(folder, text):
    (folder / "deployment.json").write_text(text)
    refused(lambda: Deployment.open(folder), DeploymentError, "deployment.json" if text[-1:] != "}" else "contract")


def test_folders_that_are_none(folder, tmp_path):
    refused(lambda: Deployment.open(tmp_path / "nowhere"), DeploymentError, "no such folder")
    refused(lambda: Deployment.open(tmp_path), DeploymentError, "deployment.json is missing")
    (folder / "model.onnx").unlink()
    refused(lambda: Deployment.open(folder), DeploymentError, "model.onnx is missing")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("keep", [0.0, 0.4, 0.9])
def test_truncated_models(folder, name, keep):
    path = folder / name
    os.truncate(path, int(path.stat().st_size * keep))
    refused(lambda: Deployment.open(folder), DeploymentError, "cannot load it")


def test_missing_weights(folder):
    (folder / "model.onnx.data").unlink()
    refused(lambda: Deployment.open(folder), DeploymentError, "cannot load it")


def test_a_model_whose_weights_lie_outside_the_folder(folder, tmp_path):
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").rename(tmp_path / "model.onnx.data")
    refused(lambda: Deployment.open(folder), DeploymentError, "cannot load it")


def test_a_model_of_another_export(folder, tmp_path):
    other = make_folder(tmp_path / "other", kinds={"hartley": "adapter_"})
    edit(other, lambda fields: fields.update(guard=[5, 0, 7]))
    (other / "deployment.json").rename(folder / "deployment.json")
    refused(lambda: Deployment.open(folder), DeploymentError, "different exports")


def test_a_strangers_adapter_and_one_without_a_guard(folder, tmp_path):
    deployment = Deployment.open(folder)
    stranger = write_onnx_adapter(tmp_path / "s.onnx_adapter", arrays(), guard=(7, 0, 9))
    refused(lambda: deployment.load("x", stranger), DeploymentError, "guard [7, 0, 9]", "another export")
    bare = write_onnx_adapter(tmp_path / "b.onnx_adapter", arrays(), guard=None)
    refused(lambda: deployment.load("x", bare), DeploymentError, "carries no guard")
    add_stored(folder, "forged", arrays())
    path = write_onnx_adapter(folder / "adapters" / "forged.onnx_adapter", arrays(), guard=(7, 0, 9))
    digest = __import__("hashlib").sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda fields: fields["adapters"]["forged"].update(sha256=digest))
    refused(lambda: Deployment.open(folder).predict(["who"], "forged"), DeploymentError, "another export")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *[
            ({"adapter_row_pointers.8": np.array([forged], np.uint16)}, "adapter_row_pointers.8 do not lead through 4")
            for forged in ([1, 2, 3, 4, 4, 4, 4, 4, 4], [0, 2, 1, 4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 4, 5, 5, 5, 5])
        ],
        ({"adapter_cols": np.full((2, 5), 11, np.uint16)}, "layer.value has col 11, outside 0…9"),
        ({"adapter_values": np.full((2, 5), np.nan, np.float16)}, "NaN or infinite"),
        ({"adapter_scales": np.full(2, np.inf, np.float32)}, "NaN or infinite"),
        ({"adapter_values": np.zeros((2, 5), np.float32)}, "float32 [2, 5] where the graph takes float16"),
        ({"adapter_values": np.zeros((3, 5), np.float16)}, "[3, 5]"),
        ({"adapter_values": None}, "where the graph takes"),
        ({"adapter_other": np.zeros(3, np.float32)}, "'adapter_other', which the graph has not"),
        ({"input_ids": np.zeros(3, np.int64)}, "'input_ids', which the graph has not"),
        ({"adapter_head.classifier.weight": np.zeros((3, 8), np.float32)}, "adapter_head.classifier"),
    ],
)
def test_forged_contents(folder, tmp_path, changes, says):
    path = write_onnx_adapter(tmp_path / "x.onnx_adapter", arrays(**changes))
    deployment = Deployment.open(folder)
    before = deployment.nbytes
    with pytest.raises((AdapterMismatchError, AdapterFileError)) as caught:
        deployment.load("x", path)
    assert deployment.nbytes == before  # no bank kept half of it
    assert says in str(caught.value)
    assert "x" not in deployment.adapters
    assert deployment.predict(["who"], "good")  # and the deployment goes on


def test_a_bank_is_not_an_adapter(folder, tmp_path):
    import onnxruntime as ort

    tensors = {name: np.stack([array, array]) for name, array in arrays().items()}
    file = ort.AdapterFormat()
    tensors["adapter_guard"] = np.zeros(GUARD, np.uint8)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in tensors.items()})
    file.export_adapter(str(tmp_path / "bank.onnx_adapter"))
    refused(lambda: Deployment.open(folder).load("x", tmp_path / "bank.onnx_adapter"), DeploymentError, "is a bank")


def test_an_adapter_that_holds_nothing(folder, tmp_path):
    path = write_onnx_adapter(tmp_path / "x.onnx_adapter", {})
    refused(lambda: Deployment.open(folder).load("x", path), DeploymentError, "neither coefficients nor a head")


def test_files_that_are_no_adapters(folder, tmp_path):
    deployment = Deployment.open(folder)
    for name, content in (("x.onnx_adapter", b"TORT" * 30), ("y.onnx_adapter", b""), ("z.safetensors", b"\xff" * 40)):
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: deployment.load("x", tmp_path / name), DeployError, name)
    refused(lambda: deployment.load("x", tmp_path / "none.onnx_adapter"), DeploymentError, "no such file")
    for name in ("none", "null\0byte"):
        refused(lambda name=name: deployment.load("x", tmp_path / name), AdapterFileError, "no such file")


def test_orders_of_another_release(folder, tmp_path):
    from ssh_deploy.adapters.file import write_file
    from ssh_deploy.testing import random_adapter

    write_file(random_adapter(SITES, n=4), tmp_path / "a.safetensors")
    edit(folder, lambda fields: fields["orders"]["hartley"].update({"12": [3, 4]}))
    deployment = Deployment.open(folder)
    refused(
        lambda: deployment.load("a", tmp_path / "a.safetensors"), DeploymentError, "orders length 12", "Another release"
    )


def test_deployment_json_of_a_gigabyte_is_not_read(folder):
    with (folder / "deployment.json").open("r+b") as file:
        file.truncate(1 << 30)  # sparse
    refused(lambda: Deployment.open(folder), DeploymentError, "over 64 MiB")


def test_json_that_is_valid_but_deep(folder):
    text = json.dumps({"contract": 2})[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}"
    (folder / "deployment.json").write_text(text)
    refused(lambda: Deployment.open(folder), DeploymentError, "deployment.json")


def test_unknown_names_list_the_near_ones_and_paths_are_none(folder):
    deployment = Deployment.open(folder)
    refused(lambda: deployment.predict(["who"], "goood"), UnknownNameError, "no adapter 'goood'", "Did you mean good?")
    refused(lambda: deployment.predict(["who"], "good+goood"), UnknownNameError, "'goood'", "Did you mean good?")
    for path in ("adapters/good.onnx_adapter", "../good", str(folder), ".", "C:\\good"):
        refused(lambda path=path: deployment.predict(["who"], path), UnknownNameError, "never paths")
        refused(lambda path=path: deployment.predict(["who"], f"good+{path}"), UnknownNameError, "never paths")
        refused(lambda path=path: deployment.load(path), UnknownNameError, "never paths")
        refused(lambda path=path: deployment.pin(path), UnknownNameError, "never paths")


@pytest.mark.parametrize("memory", [0, -1, "", "much", "1.5.2GB", "-1MiB", "0MiB", "1 QB", True, None, 1.5, "nanMB"])
def test_memory_that_is_none(folder, memory):
    refused(lambda: Deployment.open(folder, memory=memory), DeploymentError, "no amount of memory", "512MiB")


def test_a_budget_too_small_for_one_adapter(folder):
    """Two sites of 10 and 8 rows with four coefficients and a zero each, and a head of up to 16 labels of 8 numbers."""
    one = 2 * 5 * 4 + 2 * 4 + (11 + 9) * 2 + 16 * 9 * 4
    refused(
        lambda: Deployment.open(folder, memory=one - 1), DeploymentError, f"{one - 1:,} bytes", f"{one:,}", "memory="
    )
    assert Deployment.open(folder, memory=one).predict(["who"], "good")


def test_more_adapters_at_once_than_the_budget_holds(folder):
    add_stored(folder, "other", arrays(adapter_scales=np.full(2, 3, np.float32)), labels=("a", "b"))
    deployment = Deployment.open(folder, memory=2 * (5 * 4 + 4) + (11 + 9) * 2 + 16 * 9 * 4)
    for name in ("good", "other"):
        assert deployment.predict(["who"], name)
    refused(
        lambda: deployment.predict(["who", "who"], ["good", "other"]), DeploymentError, "2 distinct adapters", "memory="
    )
    deployment.pin("good")
    refused(lambda: deployment.predict(["who"], "other"), DeploymentError, "1 distinct adapter at once", "pinned")


def test_widths_of_nothing(folder):
    for width in (0, -5):
        refused(
            lambda width=width: Deployment.open(folder, max_coefficients=width), DeploymentError, "max_coefficients"
        )
        refused(lambda width=width: Deployment.open(folder, max_labels=width), DeploymentError, "max_labels")


def test_an_adapter_for_another_base(folder, tmp_path):
    from contract_folder import weights
    from safetensors.numpy import save_file

    from ssh_deploy.adapters.file import write_file
    from ssh_deploy.checkpoints.fingerprint import Fingerprint, sample
    from ssh_deploy.testing import random_adapter

    mine, other = (Fingerprint("bert", {s: sample(weights(seed)[s]) for s in SITES}) for seed in (0, 7))
    fields = {"architecture": "bert", "sites": json.dumps({site: list(SITES[site]) for site in SITES})}
    save_file({s: v.values for s, v in mine.sites.items()}, folder / "fingerprint.safetensors", metadata=fields)
    edit(folder, lambda fields: fields.update(fingerprint=mine.sha256))
    write_file(random_adapter(SITES, n=4, fingerprint=other), tmp_path / "a.safetensors")
    deployment = Deployment.open(folder)
    before = deployment.nbytes
    refused(
        lambda: deployment.load("a", tmp_path / "a.safetensors"), FingerprintError, "made for another base than tiny"
    )
    refused(lambda: deployment.predict(["who"], "a"), UnknownNameError, "no adapter 'a'")
    assert deployment.nbytes == before


def test_unloading_one_in_use(folder):
    deployment = Deployment.open(folder)
    with deployment._catalogue.lend(["good"]), deployment._catalogue.lend(["good"]):
        refused(
            lambda: deployment.unload("good", timeout=0), DeploymentError, "good is in use by 2 runs", "stays loaded"
        )
        assert deployment.predict(["who"], "good")
    deployment.unload("good", timeout=0)
    refused(lambda: deployment.predict(["who"], "good"), UnknownNameError, "good was unloaded")
    refused(lambda: deployment.unload("good"), UnknownNameError, "good is not loaded")
    assert deployment.nbytes == 0


@pytest.mark.parametrize("ids", [[2], [-1], [0, 99], [1, -7]])
def test_ids_out_of_range(folder, ids):
    """Fed to the graph by hand; the deployment itself takes names and never ids."""
    deployment = Deployment.open(folder, memory="1MiB", max_coefficients=4)
    feeds = {name: np.ones((len(ids), 3), np.int64) for name in deployment.inputs}
    refused(lambda: deployment.run({**feeds, "adapter_ids": np.array(ids)}), DeploymentError, "never as feeds")
    rows = {name: np.stack([np.zeros_like(a), a]) for name, a in arrays().items() if "head" not in name}
    refused(
        lambda: deployment._session.run({**feeds, **rows, "adapter_ids": np.array(ids)}), DeploymentError, "refused"
    )


def test_a_row_whose_adapter_has_not_the_head_that_is_asked_for(folder, tmp_path):
    bare = {name: array for name, array in arrays().items() if "head" not in name}
    deployment = Deployment.open(folder)
    deployment.load("bare", write_onnx_adapter(tmp_path / "bare.onnx_adapter", bare))
    for names in ("bare", "good", ["good", "bare"]):
        call = lambda names=names: deployment.predict(["who", "who"], names)  # noqa: E731
        if names == "good":
            assert call()
        else:
            refused(call, DeploymentError, "adapter bare, which brings no head", "no classification head")
    refused(lambda: deployment.predict(["who"], "good@head=bare"), AdapterMismatchError, "bare brings no head")
    refused(lambda: deployment.predict(["who"], "bare+good"), AdapterMismatchError, "no head", "@head=good")
    assert deployment.predict(["who"], "bare@head=good")[0].labels == ("a", "b")

"""Adapters added to and removed from an exported folder: same numbers as an export with them, nothing half-done."""

import json
import shutil

import numpy as np
import pytest
from exported_folders import make_adapter, write_adapter

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import (
    AdapterFileError,
    AdapterMismatchError,
    DeploymentError,
    FingerprintError,
    OutputError,
    UnknownNameError,
    VerificationError,
)
from ssh_deploy.jobs.editing import add_adapter, remove_adapter
from ssh_deploy.jobs.exporting import export_model

TEXTS = ["what is the good film", "win a free prize now"]


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the exported BERT that a test may change."""
    copied = tmp_path / "out"
    shutil.copytree(exported("bert")[2], copied)
    return copied


def logits(folder, name):
    return np.stack([answer.logits for answer in Deployment.open(folder).predict(TEXTS, adapters=[name] * 2)])


def stored(folder):
    return json.loads((folder / "deployment.json").read_text())["adapters"]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_added_is_as_exported(exported, folder, tmp_path, form):
    base, files, _ = exported("bert")
    if form == "file":
        path = write_adapter(tmp_path / "new.safetensors", base, "bert", labels=4, seed=9)
    else:
        path = tmp_path / "new"
        write_folder(make_adapter(base, "bert", labels=4, seed=9), path)
    report = add_adapter(folder, str(path))
    assert report.adapters == ("headed", "plain", "new")
    assert report.verified is False
    entry = stored(folder)["new"]
    assert entry["labels"] == [f"bert-{i}" for i in range(4)]
    assert (folder / entry["file"]).exists()
    assert "| new | ssh | 40 |" in (folder / "README.md").read_text()
    export_model(base, [str(files["headed"]), str(path)], tmp_path / "again")
    np.testing.assert_array_equal(logits(folder, "new"), logits(tmp_path / "again", "new"))
    assert logits(folder, "headed").shape == (2, 5)


def test_removed_is_forgotten_and_its_file_deleted(folder):
    report = remove_adapter(folder, "headed")
    assert report.adapters == ("plain",)
    assert list(stored(folder)) == ["plain"]
    assert sorted(p.name for p in (folder / "adapters").iterdir()) == ["plain.onnx_adapter"]
    with pytest.raises(UnknownNameError, match="headed"):
        Deployment.open(folder).predict(TEXTS, adapters=["headed"] * 2)


def test_remove_then_add_gives_the_same_bytes(exported, folder):
    before = {name: entry["sha256"] for name, entry in stored(folder).items()}
    remove_adapter(folder, "plain")
    add_adapter(folder, str(exported("bert")[1]["plain"]))
    assert {name: entry["sha256"] for name, entry in stored(folder).items()} == before


def test_a_taken_name_is_refused(exported, folder):
    with pytest.raises(OutputError, match=r"(?s)'plain' already.*remove"):
        add_adapter(folder, str(exported("bert")[1]["plain"]))
    assert add_adapter(folder, f"other={exported('bert')[1]['plain']}").name == "other"


def test_unknown_name_lists_the_near_ones(folder):
    with pytest.raises(UnknownNameError, match=r"(?s)'plian'.*Did you mean plain"):
        remove_adapter(folder, "plian")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ("key",)}, "--sites"),
        ({"transform": "cosine"}, r"cosine.*--kinds hartley,head,cosine|--kinds hartley,cosine"),
    ],
)
def test_outside_the_slots_is_refused_with_the_flag(exported, folder, tmp_path, options, message):
    path = write_adapter(tmp_path / "a.safetensors", exported("bert")[0], "bert", **options)
    before = sorted(p.name for p in folder.rglob("*"))
    with pytest.raises(AdapterMismatchError, match=f"(?s){message}"):
        add_adapter(folder, str(path))
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_a_plain_export_takes_no_adapter(exported, pico, tmp_path):
    export_model(pico("bert"), [], tmp_path / "out")
    with pytest.raises(AdapterMismatchError, match="without slots"):
        add_adapter(tmp_path / "out", str(exported("bert")[1]["plain"]))


def test_an_adapter_of_another_base_is_refused(exported, pico, folder, tmp_path):
    base = exported("bert")[0]
    adapter = make_adapter(base, "bert", seed=5)
    own = fingerprint_of(open_checkpoint(base), adapter.deltas)
    other = fingerprint_of(open_checkpoint(pico("bert", "text-classification", seed=7)), adapter.deltas)
    for name, samples in (("own", own), ("other", other)):
        object.__setattr__(adapter, "fingerprint", samples)
        write_file(adapter, tmp_path / f"{name}.safetensors")
    assert add_adapter(folder, str(tmp_path / "own.safetensors")).verified is True
    with pytest.raises(FingerprintError, match="another base"):
        add_adapter(folder, str(tmp_path / "other.safetensors"))
    assert "other" not in stored(folder)


def test_an_adapter_without_effect_is_refused(exported, folder, tmp_path):
    adapter = make_adapter(exported("bert")[0], "bert", seed=5)
    for delta in adapter.deltas.values():
        object.__setattr__(delta, "alpha", 1e-25)
    write_file(adapter, tmp_path / "weak.safetensors")
    with pytest.raises(VerificationError, match="weak: its deltas change no bit"):
        add_adapter(folder, str(tmp_path / "weak.safetensors"))
    assert "weak" not in stored(folder)


def test_no_folder_and_no_adapter(folder, tmp_path):
    with pytest.raises(DeploymentError, match="no such folder"):
        add_adapter(tmp_path / "nowhere", str(folder / "x.safetensors"))
    with pytest.raises(AdapterFileError, match="no such file"):
        add_adapter(folder, str(tmp_path / "missing.safetensors"))


def test_a_failed_write_changes_nothing(exported, folder, tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "new.safetensors", exported("bert")[0], "bert", seed=9)
    before = (folder / "deployment.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        add_adapter(folder, str(path))
    assert (folder / "deployment.json").read_bytes() == before
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]

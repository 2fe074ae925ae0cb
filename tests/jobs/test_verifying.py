"""Torch against merged checkpoints and exported folders: agreement, disagreement, and what cannot be compared."""

import shutil

import pytest
from exported_folders import write_adapter

from ssh_deploy.errors import DeploymentError, VerificationError
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.jobs.verifying import read_texts, verify_target


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "vit"])
@pytest.mark.parametrize("name", ["headed", "plain"])
def test_an_exported_folder_agrees(exported, architecture, name):
    base, files, folder = exported(architecture)
    verdict = verify_target(base, files[name], folder)
    assert verdict.ok
    assert verdict.agreement == 1
    assert verdict.rows == 21
    assert 0 < verdict.max_abs_diff <= verdict.tolerance
    assert set(verdict.as_dict()) >= {"ok", "max_abs_diff", "agreement", "rows", "tolerance"}


def test_texts_are_compared(exported, tmp_path):
    base, files, folder = exported("bert")
    (tmp_path / "texts").write_text("what is the film\n\nwin a free prize now\n")
    texts = read_texts(tmp_path / "texts")
    verdict = verify_target(base, files["headed"], folder, texts=texts)
    assert (verdict.ok, verdict.rows) == (True, 2)


def test_an_adapter_that_is_not_in_the_folder_is_fed_into_its_slots(exported, tmp_path):
    base, _, folder = exported("bert")
    path = write_adapter(tmp_path / "new.safetensors", base, "bert", labels=2, seed=31)
    assert verify_target(base, path, folder).ok


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_checkpoint_agrees_and_another_does_not(exported, tmp_path, dtype):
    base, files, _ = exported("bert")
    merge_adapters(base, [str(files["headed"])], tmp_path / "merged", dtype=dtype)
    verdict = verify_target(base, files["headed"], tmp_path / "merged")
    assert verdict.ok
    assert verdict.target == "merged checkpoint"
    other = write_adapter(tmp_path / "other.safetensors", base, "bert", labels=5, seed=77)
    wrong = verify_target(base, other, tmp_path / "merged")
    assert not wrong.ok
    assert wrong.max_abs_diff > wrong.tolerance
    assert wrong.agreement < 1


def test_a_base_in_the_place_of_a_merged_checkpoint_differs(exported):
    base, files, _ = exported("bert")
    assert not verify_target(base, files["plain"], base).ok


@pytest.mark.slow
def test_merged_and_required_exports(exported, tmp_path):
    base, files, _ = exported("bert")
    export_model(base, [str(files["headed"])], tmp_path / "m", options=ExportOptions(mode="merged"))
    assert verify_target(base, files["headed"], tmp_path / "m").ok
    with pytest.raises(VerificationError, match=r"logits is \[8, 5\], torch's \[8, 3\]"):
        verify_target(base, files["plain"], tmp_path / "m")
    export_model(base, [str(files["headed"])], tmp_path / "r", options=ExportOptions(adapter_inputs="required"))
    assert verify_target(base, files["headed"], tmp_path / "r").ok


def test_damage_is_named(exported, tmp_path):
    base, files, folder = exported("bert")
    copied = tmp_path / "out"
    shutil.copytree(folder, copied)
    path = copied / "adapters" / "headed.onnx_adapter"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeploymentError, match="damaged or replaced"):
        verify_target(base, files["headed"], copied)


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty").write_text("\n \n")
    for name, message in (("bad", "UTF-8"), ("empty", "no text"), ("missing", "cannot be read")):
        with pytest.raises(VerificationError, match=message):
            read_texts(tmp_path / name)

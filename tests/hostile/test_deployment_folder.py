"""Exports, additions, banks and verdicts that must be refused, each with its message; outputs appear whole or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from exported_folders import make_adapter, write_adapter

from ssh_deploy.adapters.file import write_file
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError, DeployError, DeploymentError, OutputError
from ssh_deploy.jobs.editing import add_adapter, remove_adapter
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.jobs.packing import pack_adapters

pytestmark = pytest.mark.hostile


@pytest.fixture
def folder(exported, tmp_path):
    copied = tmp_path / "out"
    shutil.copytree(exported("bert")[2], copied)
    return copied


def test_a_flipped_byte_of_an_adapter_is_found_before_it_is_packed(folder, tmp_path):
    path = folder / "adapters" / "headed.onnx_adapter"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with pytest.raises(DeploymentError, match=r"(?s)sha256 is .*damaged or replaced.*remove"):
        pack_adapters(folder, ["headed"], tmp_path / "b.onnx_adapter")
    assert not (tmp_path / "b.onnx_adapter").exists()
    assert not (tmp_path / "b.json").exists()


def test_a_flipped_byte_of_a_compact_file_is_found_before_it_is_exported_or_added(exported, folder, tmp_path):
    base, files, _ = exported("bert")
    path = tmp_path / "bad.safetensors"
    data = bytearray(files["plain"].read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match="bits were changed"):
        export_model(base, [str(path)], tmp_path / "new")
    with pytest.raises(AdapterFileError, match="bits were changed"):
        add_adapter(folder, str(path))
    assert not (tmp_path / "new").exists()


def test_an_output_that_exists_is_left_alone(exported, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export_model(exported("bert")[0], [], tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["../up", "a/b", "x y", "", ".", "..", "é", "n" * 129])
def test_names_that_are_paths_or_worse(exported, folder, name):
    path = exported("bert")[1]["plain"]
    with pytest.raises(AdapterFileError, match="no adapter name"):
        add_adapter(folder, f"{name}={path}")


def test_modules_that_match_nothing_list_the_near_misses(exported, tmp_path):
    adapter = make_adapter(exported("bert")[0], "bert")
    renamed = {m.replace("query", "qurey"): d for m, d in adapter.deltas.items()}
    object.__setattr__(adapter, "deltas", renamed)
    write_file(adapter, tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"(?s)2 of 4 modules .*qurey.*Did you mean .*query"):
        export_model(exported("bert")[0], [str(tmp_path / "a.safetensors")], tmp_path / "new")


def test_an_adapter_for_another_size(exported, pico, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", exported("gpt2")[0], "gpt2")
    with pytest.raises(AdapterMismatchError, match="match nothing"):
        export_model(exported("bert")[0], [str(path)], tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contract": 9}, "contract 9"),
        ({"kinds": "hartley"}, "kinds"),
        (
            {"adapters": {"x": {"file": "../../etc/passwd", "sha256": "0" * 64, "family": "ssh", "labels": []}}},
            "not inside",
        ),
        ({"sites": [{"module": "q"}]}, "sites|in is missing|missing"),
    ],
)
def test_a_forged_deployment_is_refused_by_every_command(folder, tmp_path, change, message):
    fields = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps(fields | change))
    for attempt in (
        lambda: add_adapter(folder, str(folder / "x.safetensors")),
        lambda: remove_adapter(folder, "plain"),
        lambda: pack_adapters(folder, [], tmp_path / "b.onnx_adapter"),
    ):
        with pytest.raises(DeploymentError, match=message):
            attempt()


def test_an_adapter_file_that_is_a_link_out_of_the_folder(folder, tmp_path):
    path = folder / "adapters" / "plain.onnx_adapter"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeploymentError, match="leads out of the folder"):
        pack_adapters(folder, ["plain"], tmp_path / "b.onnx_adapter")
    with pytest.raises(DeployError):
        remove_adapter(folder, "plain")
    assert (tmp_path / "elsewhere").exists()


def test_an_onnx_adapter_of_another_export_is_refused(exported, folder):
    stranger = exported("roberta")[2] / "adapters" / "plain.onnx_adapter"
    with pytest.raises(DeploymentError, match="made for another export"):
        add_adapter(folder, f"stranger={stranger}")


@pytest.mark.slow
def test_killed_in_the_middle_leaves_no_output(exported, tmp_path):
    base, files, _ = exported("bert")
    command = Path(sys.executable).parent / "ssh-deploy"
    process = subprocess.Popen(
        [command, "export", "--onnx", base, files["plain"], "-o", tmp_path / "new"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".new.partial-*/*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".new.partial-*")), "it had begun"
    assert not (tmp_path / "new").exists()

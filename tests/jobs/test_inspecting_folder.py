"""Inspecting an exported folder: what its description says, what is missing, and what is forged."""

import json
import shutil

import pytest
from click.testing import CliRunner

from ssh_deploy.cli.main import main
from ssh_deploy.errors import DeploymentError
from ssh_deploy.jobs.export_job import ExportOptions
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.jobs.inspecting_folder import QuantizedView, inspect_folder
from ssh_deploy.runtimes.folder import is_exported


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the exported pico BERT, to be changed."""
    return shutil.copytree(exported("bert")[2], tmp_path / "out")


def stated(folder, **fields):
    path = folder / "deployment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_sidecar_folder(folder):
    deployment = json.loads((folder / "deployment.json").read_text())
    found = inspect_folder(folder)
    assert (found.mode, found.base, found.quantized) == ("sidecar", deployment["base"], None)
    assert found.fingerprint == deployment["fingerprint"]
    assert sum(sites for _, sites in found.shapes) == len(deployment["sites"])
    assert {shape for shape, _ in found.shapes} == {(site["out"], site["in"]) for site in deployment["sites"]}
    data = folder / "model.onnx.data"
    assert found.bytes == (folder / "model.onnx").stat().st_size + (data.stat().st_size if data.exists() else 0)
    assert [adapter.name for adapter in found.adapters] == sorted(deployment["adapters"])
    for adapter in found.adapters:
        entry = deployment["adapters"][adapter.name]
        assert adapter.bytes == (folder / entry["file"]).stat().st_size
        assert (adapter.family, list(adapter.labels)) == (entry["family"], entry["labels"])
        assert adapter.verified == (entry["base"] == "verified")
    text = "\n".join(found.lines())
    for word in ("not quantised", found.fingerprint, *(adapter.name for adapter in found.adapters), *found.kinds):
        assert word in text


def test_a_decoder_says_its_context(decoder):
    found = inspect_folder(decoder[2])
    assert found.task == "text-generation"
    assert f"context of {found.context:,} tokens" in found.lines()


def test_a_quantised_base_says_its_bits(folder):
    stated(folder, quantized={"scheme": "int4", "modules": {"a": 4, "b": 4, "c": 8}})
    found = inspect_folder(folder)
    assert found.quantized == QuantizedView("int4", {4: 2, 8: 1})
    assert "quantised to int4: 2 modules of 4 bits, 1 modules of 8 bits" in found.lines()[2]


@pytest.mark.parametrize("forged", [[], {"scheme": 4, "modules": {}}, {"scheme": "int4", "modules": {"a": "4"}}])
def test_a_forged_quantisation_is_refused(folder, forged):
    stated(folder, quantized=forged)
    with pytest.raises(DeploymentError, match="names no scheme and bits"):
        inspect_folder(folder)


def test_a_missing_adapter_file_is_said(folder):
    name, entry = next(iter(json.loads((folder / "deployment.json").read_text())["adapters"].items()))
    (folder / entry["file"]).unlink()
    found = next(adapter for adapter in inspect_folder(folder).adapters if adapter.name == name)
    assert found.bytes is None
    assert any(name in line and "its file is missing" in line for line in inspect_folder(folder).lines())


def test_a_merged_folder_has_no_slots(exported, tmp_path):
    base, adapters, _ = exported("bert")
    export_model(base, [str(next(iter(adapters.values())))], tmp_path / "merged", options=ExportOptions(mode="merged"))
    found = inspect_folder(tmp_path / "merged")
    assert (found.mode, found.kinds, found.shapes) == ("merged", (), ())
    assert "no slots: its adapter is merged" in found.lines()


def test_the_command(folder):
    done = CliRunner().invoke(main, ["inspect", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == inspect_folder(folder).lines()
    done = CliRunner().invoke(main, ["inspect", str(folder), "--json"])
    assert json.loads(done.output) == json.loads(json.dumps(inspect_folder(folder).as_dict()))
    assert json.loads(done.output)["shapes"][0].keys() == {"out", "in", "sites"}


@pytest.mark.parametrize("option", ["--base", "--plot"])
def test_what_is_for_adapters_is_refused(folder, option):
    done = CliRunner().invoke(main, ["inspect", str(folder), option, "x"])
    assert done.exit_code == 2
    assert "is an exported folder" in done.output


def test_an_adapter_is_no_exported_folder(exported):
    _, adapters, folder = exported("bert")
    assert is_exported(folder)
    assert not any(is_exported(path) for path in adapters.values())

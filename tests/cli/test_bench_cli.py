"""`ssh-deploy bench` as a user runs it: one JSON object with machine, results and summary, or a table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssh_deploy.cli.main import main

HEADLINES = {
    "ratio_on_8x64", "ratio_on_1x128", "ratio_on_1x16", "ratio_off", "ratio_12_vs_1", "thrash_20_vs_2",
    "bytes_per_adapter", "swap_ms", "lora8_on_8x64", "lora16_on_8x64",
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench-cli")


@pytest.fixture(scope="module")
def quick(work):
    command = str(Path(sys.executable).parent / "ssh-deploy")
    arguments = ["bench", "bank", "--quick", "--json", "--work", str(work)]
    done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_quick_prints_the_form_that_every_bench_speaks(quick):
    assert {"machine", "results", "summary"} <= set(quick)
    assert quick["machine"]["cores"] >= 1
    assert quick["machine"]["versions"]["onnxruntime"]
    assert set(quick["summary"]) == HEADLINES
    assert all(math.isfinite(value) for value in quick["summary"].values())
    assert all(value > 0 for key, value in quick["summary"].items() if key != "swap_ms")


@pytest.mark.slow
def test_every_figure_of_the_summary_is_a_row_of_the_results(quick):
    rows = {(row.get("batch"), row["variant"]): row for row in quick["results"]}
    summary = quick["summary"]
    assert summary["ratio_on_8x64"] == rows["8x64", "on"]["ratio"]
    assert summary["ratio_off"] == max(row["ratio"] for (_, name), row in rows.items() if name == "off")
    assert summary["ratio_12_vs_1"] == rows["8x64", "resident_12"]["ratio"]
    assert summary["thrash_20_vs_2"] == rows["1x16", "many_20"]["ratio"]
    assert summary["lora16_on_8x64"] == rows["8x64", "lora16_bank"]["ratio"]
    assert summary["swap_ms"] == rows["1x16", "swap"]["swap_ms"]
    for row in rows.values():
        if "ratio" in row:
            assert row["low"] <= row["ratio"] <= row["high"]
            assert row["rounds"] >= 8


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.mark.slow
def test_the_table_names_its_columns(quick, work):
    done = run("bank", "--quick", "--only", "ratios", "--batch", "2x4", "--work", str(work))
    assert done.exit_code == 0, done.output
    assert "variant" in done.output
    assert "ratio_on_2x4" in done.output


def test_help_lists_both():
    done = run("--help")
    assert done.exit_code == 0
    assert "bank" in done.output
    assert "soak" in done.output


@pytest.mark.parametrize("batch", ["8", "0x4", "4x0", "8x513", "x", "1x16x2", "-1x4"])
def test_batches_that_are_none(batch):
    done = run("bank", f"--batch={batch}")
    assert done.exit_code == 2
    assert "ROWSxTOKENS" in done.output


def test_unknown_names_list_the_near_ones(work):
    done = run("bank", "--shape", "bert-bas", "--work", str(work))
    assert done.exit_code == 1
    assert "bert-base" in done.output
    done = run("bank", "--only", "ratio", "--work", str(work))
    assert done.exit_code == 1
    assert "ratios" in done.output
    done = run("bnk")
    assert done.exit_code == 2
    assert "bank" in done.output


def test_a_work_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("bank", "--quick", "--work", str(tmp_path / "file" / "below"))
    assert done.exit_code == 1
    assert "--work" in done.output


def test_soak_of_no_folder(tmp_path):
    done = run("soak", str(tmp_path / "nowhere"))
    assert done.exit_code == 1
    assert "nowhere" in done.output

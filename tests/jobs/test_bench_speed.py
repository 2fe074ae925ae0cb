"""`bench transform` and `bench merge`: they run, check what they time, and the committed results keep their form."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ssh_deploy.cli.main import main
from ssh_deploy.errors import OutputError, UnknownNameError, VerificationError
from ssh_deploy.jobs import bench_merge, bench_transform
from ssh_deploy.jobs.bench_checkpoint import build_base
from ssh_deploy.jobs.bench_merge import MergeBenchOptions, check_merged, measure_merge
from ssh_deploy.jobs.bench_transform import TransformOptions, measure_transform
from ssh_deploy.jobs.merging import merge_adapters


def run(*words):
    return CliRunner().invoke(main, ["bench", *map(str, words)])


def test_transform_runs(tmp_path):
    done = run("transform", "--quick", "--json", "--out", tmp_path / "t.json", "--size", "64x64", "--threads", "1")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "t.json").read_text())
    rows = {(row["dtype"], row["variant"]): row for row in found["results"]}
    assert {"ours", "memcpy", "ours_fourier", "peft", "torch_fft"} <= {
        name for dtype, name in rows if dtype == "float32"
    }
    assert {dtype for dtype, _ in rows} == {"float32", "bfloat16", "float16"}
    assert found["summary"]["speedup_vs_peft_64"] == pytest.approx(rows["float32", "peft"]["ratio"], abs=1e-3)
    assert found["summary"]["over_memcpy_64"] == pytest.approx(1 / rows["float32", "memcpy"]["ratio"], rel=1e-2)


def test_threads_of_torch_are_given_back():
    before = torch.get_num_threads()
    measure_transform(
        options=TransformOptions(sizes=((8, 12),), dtypes=("float32",), coefficients=5, seconds=0.1, threads=before + 1)
    )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", ["ours", "peft"])
def test_a_wrong_transform_is_never_timed(monkeypatch, wrong):
    if wrong == "ours":
        monkeypatch.setattr(bench_transform, "_dense", lambda delta: np.zeros(delta.shape, np.float32))
    else:
        real = bench_transform._peft

        def off(shape, n):
            weight, delta = real(shape, n)
            return (lambda device: weight(device) * 1.001), delta

        monkeypatch.setattr(bench_transform, "_peft", off)
    monkeypatch.setattr(bench_transform, "interleaved", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(VerificationError, match=wrong):
        measure_transform(options=TransformOptions(sizes=((16, 24),), coefficients=9))


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("transform", "--quick", "--device", "cuda")
    assert done.exit_code == 1
    assert "sees no CUDA device" in done.stderr


@pytest.mark.parametrize("size", ["4096", "0x4", "4x", "x", "4x4x4"])
def test_sizes_that_are_none(size):
    assert run("transform", "--size", size).exit_code == 2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    work = tmp_path_factory.mktemp("bench-merge")
    return work, build_base(work, 0.03)


@pytest.mark.slow
def test_merge_runs(small):
    work, _ = small
    done = run("merge", "--quick", "--work", work, "--json", "--out", work / "m.json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((work / "m.json").read_text())
    assert set(found["summary"]) == {"over_cp", "peak_rss_mb", "speedup_vs_peft", "memory_vs_peft"}
    rows = {row["variant"]: row for row in found["results"]}
    assert list(rows) == ["cp + sync", "transforms", "merge", "peft", "merge beside peft"]
    assert rows["merge"]["ratio"] == found["summary"]["over_cp"]
    assert rows["merge"]["peak_mb"] > rows["merge"]["anonymous_mb"] > 10
    assert rows["peft"]["peak_mb"] > 200  # torch alone
    assert not (work / "out").exists()


def test_a_base_is_made_once_and_its_merge_is_right(small):
    work, base = small
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert build_base(work, 0.03).deltas.keys() == base.deltas.keys()
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == before
    merge_adapters(base.folder, [str(base.adapter)], work / "right")
    check_merged(base, work / "right")
    merge_adapters(base.folder, [str(base.adapter)], work / "wrong", weights=[1.05])
    with pytest.raises(VerificationError, match=r"[qv]_proj.weight of the merged checkpoint is wrong"):
        check_merged(base, work / "wrong")
    shard = next((work / "right").glob("*-00004.safetensors"))
    with shard.open("r+b") as file:  # the last norm: nothing that an adapter changes
        file.seek(-2, 2)
        file.write(b"xy")
    with pytest.raises(VerificationError, match="wrong"):
        check_merged(base, work / "right")


def test_a_wrong_merge_is_never_timed(small, monkeypatch):
    work, _ = small
    monkeypatch.setattr(bench_merge, "_MERGE", bench_merge._MERGE.replace("jobs=", "weights=[2.0], jobs="))
    monkeypatch.setattr(bench_merge, "_copy", lambda *_: pytest.fail("timed"))
    with pytest.raises(VerificationError, match="is wrong"):
        measure_merge(work, options=MergeBenchOptions(gigabytes=(0.03,)))
    assert not (work / "out").exists()


def test_a_process_that_fails_says_why(small, monkeypatch):
    work, _ = small
    monkeypatch.setattr(bench_merge, "_MERGE", "raise SystemExit('so it is')")
    with pytest.raises(OutputError, match="so it is"):
        measure_merge(work, options=MergeBenchOptions(gigabytes=(0.03,)))


def test_unknown_parts_list_the_near_ones(tmp_path):
    with pytest.raises(UnknownNameError, match="copy"):
        measure_merge(tmp_path, options=MergeBenchOptions(parts=("cpy",)))


@pytest.fixture
def committed(root):
    return {name: json.loads((root / "examples" / "results" / f"bench_{name}.json").read_text())
            for name in ("transform", "merge")}  # fmt: skip


def test_committed_results_of_the_transform(committed):
    found = committed["transform"]
    rows = {(row["shape"], row["dtype"], row["variant"]): row for row in found["results"]}
    for size in (4096, 768):
        row = {
            name: rows[f"{size}x{size}", "float32", name] for name in ("ours", "peft", "memcpy", "torch_fft", "scipy")
        }
        assert found["summary"][f"speedup_vs_peft_{size}"] == pytest.approx(row["peft"]["ratio"], abs=1e-3)
        assert all(one["low"] <= one["ratio"] <= one["high"] for one in row.values())
    assert found["summary"]["speedup_vs_peft_4096"] >= 4
    assert found["summary"]["over_memcpy_4096"] <= 5


def test_committed_results_of_the_merge(committed):
    found = committed["merge"]
    assert all(math.isfinite(value) for value in found["summary"].values())
    assert found["summary"]["over_cp"] <= 1.25
    assert found["summary"]["peak_rss_mb"] <= 500
    assert found["summary"]["speedup_vs_peft"] >= 5
    assert found["summary"]["memory_vs_peft"] >= 10
    flat = {row["gigabytes"]: row["anonymous_mb"] for row in found["results"] if row["variant"] == "merge"}
    assert set(flat) == {4.0, 12.0}
    assert flat[12.0] <= 1.1 * flat[4.0]


def test_a_short_variant_runs_for_a_while_before_it_is_timed(monkeypatch):
    """A long one once: what matters is that the machine is at work for as long as for the others."""
    now = [0.0]
    monkeypatch.setattr(bench_transform.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(bench_transform.time, "perf_counter", lambda: now[0])
    runs = {0.003: 0, 0.5: 0}
    for takes in runs:

        def variant(_, takes=takes):
            runs[takes] += 1
            now[0] += takes

        bench_transform._settled(variant)(0)
    assert runs == {0.003: 4, 0.5: 1}

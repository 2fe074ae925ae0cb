"""The plan of a merge: what it says before anything is written, and that what is written is that."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.index import INDEX
from ssh_deploy.cli.main import main
from ssh_deploy.jobs import merging
from ssh_deploy.jobs.merge_plan import MergeOptions, plan_merge
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.testing import random_adapter
from ssh_deploy.transforms import cpu, reference


@pytest.fixture
def sharded(tmp_path):
    """Three shards of two bf16 matrices, an adapter on one of each."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rng = np.random.default_rng(0)
    places, modules = {}, {}
    for i in range(3):
        pair = {f"model.layers.{i}.mlp.{part}_proj.weight": rng.normal(size=(300, 200)).astype(ml_dtypes.bfloat16)
                for part in ("up", "gate")}  # fmt: skip
        save_file(pair, base / f"{i}.safetensors")
        places |= dict.fromkeys(pair, f"{i}.safetensors")
        modules[f"model.layers.{i}.mlp.up_proj"] = (300, 200)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_file(random_adapter(modules, n=100, alpha=300.0), tmp_path / "a.safetensors")
    return base, str(tmp_path / "a.safetensors")


def test_the_plan_says_what_is_written(sharded, tmp_path):
    base, adapter = sharded
    plan = plan_merge(base, [adapter], MergeOptions(jobs=2))
    said = plan.as_dict(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = merge_adapters(base, [adapter], tmp_path / "out", jobs=2)
    assert said["adapted"] == [site.tensor for site in report.sites]
    assert said["tensors"] == 6
    assert said["computed_bytes"] == report.changed_bytes == 3 * 300 * 200 * 2
    headers = sum(s.start for s in plan.checkpoint.shards.values())
    index = (tmp_path / "out" / INDEX).stat().st_size - (base / INDEX).stat().st_size
    assert said["bytes"] == report.bytes - headers - index
    assert said["shards"] == dict.fromkeys([f"{i}.safetensors" for i in range(3)], 2 * 300 * 200 * 2)
    assert said["memory_bytes"] < 200e6
    assert said["finished_bytes"] == 0


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_jobs_make_no_difference(sharded, tmp_path, dtype):
    base, adapter = sharded
    reports = [merge_adapters(base, [adapter], tmp_path / f"{j}", jobs=j, dtype=dtype) for j in (1, 2, 8)]
    one, two, eight = ({p.name: p.read_bytes() for p in (tmp_path / f"{j}").iterdir()} for j in (1, 2, 8))
    assert one == two == eight
    assert reports[0].sites == reports[1].sites == reports[2].sites


@pytest.mark.parametrize("jobs", [1, 3])
def test_many_blocks_are_the_definition_rounded_once(sharded, tmp_path, monkeypatch, jobs):
    """Blocks of 16 rows, by two threads where there is one job: every one in its place."""
    monkeypatch.setattr(cpu, "_BLOCK", 1)
    monkeypatch.setattr("ssh_deploy.jobs.merge_plan.cores", lambda: 2)
    base, path = sharded
    merge_adapters(base, [path], tmp_path / "out", jobs=jobs)
    for module, delta in read_adapter(Path(path)).deltas.items():
        shard = f"{module.split('.')[2]}.safetensors"
        before, after = (load_file(f / shard)[f"{module}.weight"] for f in (base, tmp_path / "out"))
        places = (delta.rows, delta.cols, delta.values)
        exact = reference.delta("hartley", *places, delta.shape, alpha=delta.alpha, norm="backward")
        want = (before.astype(np.float64) + exact).astype(ml_dtypes.bfloat16)
        assert np.count_nonzero(after != want) <= 2  # ties that float32 takes for another side
        assert np.count_nonzero(after != before) > 0.5 * before.size


def test_whoever_writes_on_after_an_error_is_stopped():
    told = []
    count = merging._Count(10, lambda *step: told.append(step), 2)
    count(3)
    count.stopped = True
    with pytest.raises(merging._StoppedError):
        count(3)
    assert told == [("merge", 5, 10)]


def test_an_error_in_one_shard_ends_the_others(sharded, tmp_path):
    base, _ = sharded
    module = {"model.layers.1.mlp.up_proj": (300, 200)}
    write_file(random_adapter(module, alpha=1e12), tmp_path / "wild.safetensors")
    with pytest.raises(Exception, match=r"layers\.1.*go beyond the range of float16"):
        merge_adapters(base, [str(tmp_path / "wild.safetensors")], tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base", "wild.safetensors"]


def test_numbers_that_are_not_finite_stay_and_are_told(sharded, tmp_path):
    """One such number does not hide how much of ΔW survived in all others."""
    base, adapter = sharded
    clean = merge_adapters(base, [adapter], tmp_path / "clean")
    tensors = load_file(base / "1.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][5, 7], tensors[name][6, 8] = np.inf, np.nan
    save_file(tensors, base / "1.safetensors")
    report = merge_adapters(base, [adapter], tmp_path / "out")
    assert report.infinite == (name,)
    assert any(f"Not finite in the base, and left as they are: numbers of {name}" in note for note in report.notes)
    got = load_file(tmp_path / "out" / "1.safetensors")[name].astype(np.float32)
    assert np.isposinf(got[5, 7])
    assert np.isnan(got[6, 8])
    assert np.isfinite(got).sum() == got.size - 2
    assert report.survival == pytest.approx(clean.survival, abs=1e-4)


def test_a_dry_run_writes_nothing(sharded, tmp_path):
    base, adapter = sharded
    before = sorted(tmp_path.rglob("*"))
    words = ["merge", str(base), adapter, "-o", str(tmp_path / "out"), "--dry-run", "--jobs", "2"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "Would merge a × 1 into" in done.output
    assert "6 tensors, 3 of them adapted" in done.output
    assert "2 of 3 shards at once" in done.output
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert found["computed_bytes"] == 360_000
    assert sorted(tmp_path.rglob("*")) == before
    done = CliRunner().invoke(main, [*words[:-3], "--fresh", "--jobs", "3", "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / INDEX).exists()

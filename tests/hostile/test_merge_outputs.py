"""Outputs: one that exists, a full disk, a kill in the middle; never half an OUT, never a file left behind."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.checkpoints import copying, resumable, whole, writer
from ssh_deploy.checkpoints.index import INDEX
from ssh_deploy.checkpoints.writer import entry_bytes
from ssh_deploy.errors import CheckpointError, OutputError
from ssh_deploy.jobs.merge_plan import MergeOptions, plan_merge
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.testing import random_adapter

pytestmark = pytest.mark.hostile

SITE = "encoder.layer.0.attention.self.query"
MERGE = "import sys; from ssh_deploy.cli.main import main; main(['merge', *sys.argv[1:]])"


@pytest.fixture
def adapter(tmp_path):
    write_file(random_adapter({SITE: (48, 48)}), tmp_path / "a.safetensors")
    return str(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link"])
def test_output_exists(pico, adapter, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "notes").write_text("precious")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"out exists already\.\n.*another name"):
        merge_adapters(pico("bert"), [adapter], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    if kind in ("folder", "file"):
        assert (out / "notes" if kind == "folder" else out).read_text() == "precious"


def test_output_that_appears_meanwhile(pico, adapter, tmp_path):
    """rename(2) would replace an empty folder in silence."""

    def steal(stage, done, total):
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(OutputError, match="exists already"):
        merge_adapters(pico("bert"), [adapter], tmp_path / "out", progress=steal)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "out"]
    assert not list((tmp_path / "out").iterdir())


def test_merging_onto_the_base_itself(pico, adapter, tmp_path):
    base = shutil.copytree(pico("bert"), tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        merge_adapters(base, [adapter], base)
    assert (base / "model.safetensors").read_bytes() == before


def test_too_little_space_is_known_before_anything_is_written(pico, adapter, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(resumable, "Partial", lambda *_: pytest.fail("something was written"))
    with pytest.raises(OutputError, match=r"[\d,]+ bytes are needed, 1,000 are free\.\n.*Free some space"):
        merge_adapters(pico("bert"), [adapter], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.fixture
def sharing(monkeypatch):
    """A file system that shares blocks, as far as its users can see, and has 30,000 bytes left."""

    def clone(source, target):
        os.pwrite(target, source.read_bytes(), 0)
        return True

    for module in (copying, writer):
        monkeypatch.setattr(module, "clone", clone)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 30_000, 30_000))


def test_blocks_shared_with_the_base_need_no_space(pico, adapter, tmp_path, monkeypatch, sharing):
    plan = planned(pico("bert"), [adapter])
    assert plan.computed == plan.space(tmp_path / "new" / "shared") == 48 * 48 * 4 < 30_000 < plan.need
    assert "They take 9,216 bytes of the disk: the rest is shared" in "\n".join(plan.lines(tmp_path / "shared"))
    merge_adapters(pico("bert"), [adapter], tmp_path / "shared")
    monkeypatch.undo()
    merge_adapters(pico("bert"), [adapter], tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes()
    assert planned(pico("bert"), [adapter]).space(tmp_path / "x") == plan.need  # there is room: nothing is tried


def test_a_shard_with_another_layout_shares_nothing(pico, adapter, tmp_path, sharing):
    tensors = sum(
        entry_bytes(e) for e in planned(pico("bert"), [adapter], "float16").shards["model.safetensors"].values()
    )
    with pytest.raises(OutputError, match=rf"{tensors:,} bytes are needed, 30,000 are free"):
        merge_adapters(pico("bert"), [adapter], tmp_path / "out", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def planned(base, adapters, dtype="keep"):
    return plan_merge(base, adapters, MergeOptions(dtype=dtype))


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite", "fsync"])
def test_disk_full(pico, adapter, tmp_path, monkeypatch, call):
    """The system says ENOSPC in the copy, in the write of a tensor, or only at fsync: nothing is left."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device\.\n.*Nothing was left behind"):
        merge_adapters(pico("bert"), [adapter], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("extra", [[], ["--dtype", "bfloat16"]])
def test_a_real_limit_of_the_system(pico, adapter, tmp_path, extra):
    """A process that may not write files beyond 60 kB: exit status 1, the reason, no traceback, nothing left."""
    words = [sys.executable, "-c", MERGE, str(pico("bert")), adapter, "-o", str(tmp_path / "out"), *extra]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 1
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_parent_that_is_a_file(pico, adapter, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        merge_adapters(pico("bert"), [adapter], tmp_path / "file" / "out")


def test_an_error_in_the_middle_leaves_nothing(pico, tmp_path):
    """The second of two sites overflows after the first was written."""
    modules = {SITE: (48, 48), "encoder.layer.1.output.dense": (48, 80)}
    write_file(random_adapter(modules, alpha=1e9), tmp_path / "a.safetensors")
    with pytest.raises(Exception, match="go beyond the range of float16"):
        merge_adapters(pico("bert"), [str(tmp_path / "a.safetensors")], tmp_path / "out", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base of 200 MB in 24 shards."""
    base = tmp_path_factory.mktemp("large") / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    block = np.random.default_rng(0).normal(size=(2048, 2048)).astype(ml_dtypes.bfloat16)
    places = {}
    for number in range(24):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        places[name] = f"model-{number:05}.safetensors"
        save_file({name: block}, base / places[name])
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    modules = {name.removesuffix(".weight"): (2048, 2048) for name in places}
    write_file(random_adapter(modules, n=100), base.parent / "a.safetensors")
    yield base
    shutil.rmtree(base)


def words_of(large, out, *more):
    return [sys.executable, "-c", MERGE, str(large), str(large.parent / "a.safetensors"), "-o", str(out), *more]


def start(large, out, *more):
    """The command as a process of its own, stopped after a few shards."""
    # a shell's background jobs ignore Ctrl-C, and so would a child of tests that run as one
    awake = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        words_of(large, out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=awake
    )
    deadline = time.monotonic() + 60
    while len(finished(out.parent, out.name)) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    assert not out.exists()
    return process


def end(process, how):
    process.send_signal(how)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) != 0


def finished(parent, name="out"):
    """Names in the journals of cut-short runs."""
    lines = [line for p in parent.glob(f".{name}.partial-*/.journal") for line in p.read_text().split("\n")[:-1]]
    return [json.loads(line)["name"] for line in lines]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_ctrl_c_in_the_middle_leaves_nothing(large, tmp_path):
    end(start(large, tmp_path / "out"), signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle_goes_on(large, tmp_path):
    """kill -9 leaves no OUT; another command ignores what it left; the same one finishes it, to the same bytes."""
    adapters = [str(large.parent / "a.safetensors")]
    whole_report = merge_adapters(large, adapters, tmp_path / "whole")
    end(start(large, tmp_path / "out"), signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    done = finished(tmp_path)
    assert 3 <= len(done) < 24
    left = next(tmp_path.glob(".out.partial-*"))
    other = merge_adapters(large, adapters, tmp_path / "out", weights=[0.5])
    assert other.resumed == ()
    assert left.is_dir()
    shutil.rmtree(tmp_path / "out")
    stamps = {name: (left / name).stat().st_mtime_ns for name in done}
    with (left / ".journal").open("ab") as journal:
        journal.write(b'{"name": "model-00023.safet')  # torn by the kill
    report = merge_adapters(large, adapters, tmp_path / "out", jobs=1)
    assert set(report.resumed) == set(done)
    assert any(f"{len(done)} shards were there" in note for note in report.notes)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == stamps
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert (report.sites, report.survival) == (whole_report.sites, whole_report.survival)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_fresh_begins_anew(large, tmp_path):
    end(start(large, tmp_path / "out"), signal.SIGKILL)
    report = merge_adapters(large, [str(large.parent / "a.safetensors")], tmp_path / "out", fresh=True)
    assert report.resumed == ()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_same_command_twice_at_once(large, tmp_path):
    process = start(large, tmp_path / "out")
    try:
        with pytest.raises(OutputError, match="the same command is running already"):
            merge_adapters(large, [str(large.parent / "a.safetensors")], tmp_path / "out")
        assert len(finished(tmp_path)) >= 3  # and its work is left alone
    finally:
        end(process, signal.SIGKILL)


@pytest.mark.parametrize("harm", ["shorter", "missing", "nonsense"])
def test_a_finished_shard_that_is_no_more_is_written_again(large, tmp_path, harm):
    end(start(large, tmp_path / "out"), signal.SIGKILL)
    left = next(tmp_path.glob(".out.partial-*"))
    first = finished(tmp_path)[0]
    if harm == "shorter":
        with (left / first).open("r+b") as file:
            file.truncate(1000)
    elif harm == "missing":
        (left / first).unlink()
    else:
        (left / ".journal").write_bytes(b'{"name": "../a.safetensors", "bytes": 1, "tallies": {}}\n')
    adapters = [str(large.parent / "a.safetensors")]
    report = merge_adapters(large, adapters, tmp_path / "out")
    assert report.resumed == ()  # nothing behind a wrong line counts
    for number in (0, 23):
        name = f"model-{number:05}.safetensors"
        assert (tmp_path / "out" / name).stat().st_size == (large / name).stat().st_size


@pytest.mark.parametrize("how", ["written", "replaced", "shrunk"])
def test_a_shard_that_changes_while_it_is_read(tmp_path, how):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    block = np.random.default_rng(0).normal(size=(512, 512)).astype(ml_dtypes.bfloat16)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    path = base / "model.safetensors"
    save_file(dict.fromkeys(names, block), path)
    write_file(random_adapter({n.removesuffix(".weight"): (512, 512) for n in names}), tmp_path / "a.safetensors")
    changed = []

    def change(*_):
        if changed:
            return
        changed.append(how)
        if how == "replaced":
            shutil.copy(path, base / "new")
            (base / "new").replace(path)
        elif how == "written":
            with path.open("r+b") as file:
                file.seek(-2, 2)
                file.write(b"xy")
            os.utime(path)
        else:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)

    with pytest.raises(CheckpointError, match=r"changed while it was read|became shorter while it was read"):
        merge_adapters(base, [str(tmp_path / "a.safetensors")], tmp_path / "out", progress=change)
    assert changed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base"]


def test_a_base_that_changed_is_another_merge(large, tmp_path):
    """What was finished of the base as it was does not become part of a merge of what it is now."""
    base = shutil.copytree(large, tmp_path / "base")
    adapters = [str(large.parent / "a.safetensors")]
    before = plan_merge(base, adapters, MergeOptions()).key
    assert plan_merge(base, adapters, MergeOptions(jobs=1, fresh=True)).key == before
    os.utime(base / "model-00003.safetensors")
    assert plan_merge(base, adapters, MergeOptions()).key != before


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_kernel_that_cannot_copy(pico, adapter, tmp_path, monkeypatch, code):
    """copy_file_range refused half-way: the rest goes by read and write, and the result is the same."""
    merge_adapters(pico("bert"), [adapter], tmp_path / "kernel")
    real, calls = os.copy_file_range, []

    def sometimes(source, target, count, offset_src, offset_dst):
        calls.append(count)
        if len(calls) % 2 == 0:
            raise OSError(code, os.strerror(code))
        return real(source, target, min(count, 1000), offset_src, offset_dst)

    monkeypatch.setattr(os, "copy_file_range", sometimes)
    merge_adapters(pico("bert"), [adapter], tmp_path / "plain")
    assert len(calls) > 3
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "kernel" / name).read_bytes()


def test_a_base_that_shrinks_while_it_is_copied(pico, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    with pytest.raises(OutputError, match="became shorter while it was read"):
        merge_adapters(pico("bert"), [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_fill_their_tensor_are_a_bug(tmp_path, pico):
    from ssh_deploy.checkpoints.index import open_checkpoint

    source = open_checkpoint(pico("bert")).shards["model.safetensors"]
    entry = writer.Made("F32", (4,), lambda: [np.ones(3, np.float32)])
    with pytest.raises(AssertionError, match="12 bytes made for 16"):
        writer.write_shard(tmp_path / "x", source, {"a": entry}, advance=lambda _: None)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_compact_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write_file(random_adapter({SITE: (48, 48)}), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_peft_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write_folder(random_adapter({SITE: (48, 48)}), tmp_path / "peft")
    assert not list(tmp_path.iterdir())

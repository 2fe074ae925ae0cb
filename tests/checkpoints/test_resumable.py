"""A folder filled over several runs: what counts as finished, what is thrown away, who may work on it."""

import json

import pytest

from ssh_deploy.checkpoints.resumable import JOURNAL, finished_bytes, partial_path, resumable_folder
from ssh_deploy.errors import OutputError

KEY = "ab" * 32


class Killed(BaseException):
    """Stands for a process that ends without cleaning up."""


def cut_short(out, finished, half=()):
    """A run that finishes some files and is killed while it writes others."""
    with resumable_folder(out, key=KEY) as partial:
        for name in finished:
            (partial.folder / name).write_text(name * 10)
            partial.finish(name, {"said": name})
        for name in half:
            (partial.folder / name).parent.mkdir(exist_ok=True)
            (partial.folder / name).write_text("half")
        raise Killed


@pytest.fixture
def kill(tmp_path):
    def kill(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ssh_deploy.checkpoints.resumable.shutil.rmtree", lambda *_, **__: None)
            with pytest.raises(Killed):
                cut_short(tmp_path / "out", *args)

    return kill


@pytest.fixture
def killed(tmp_path, kill):
    """A run that finished ``a`` and ``b`` and was killed while it wrote ``c`` and more."""
    kill("ab", ["c", "deep/d"])
    return partial_path(tmp_path / "out", KEY)


def test_finished_files_stay_and_half_ones_go(tmp_path, killed):
    assert finished_bytes(tmp_path / "out", KEY) == 20
    with resumable_folder(tmp_path / "out", key=KEY) as partial:
        assert {name: line["said"] for name, line in partial.finished.items()} == {"a": "a", "b": "b"}
        assert sorted(p.name for p in killed.iterdir()) == [JOURNAL, "a", "b"]
        (partial.folder / "c").write_text("whole")
        partial.finish("c", {})
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"a": "a" * 10, "b": "b" * 10, "c": "whole"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_line_behind_half_a_line_is_not_lost(tmp_path, killed, kill):
    with (killed / JOURNAL).open("ab") as journal:
        journal.write(b'{"name": "c", "by')
    kill("e")
    with resumable_folder(tmp_path / "out", key=KEY) as partial:
        assert sorted(partial.finished) == ["a", "b", "e"]


def test_another_key_has_a_folder_of_its_own(tmp_path, killed):
    assert finished_bytes(tmp_path / "out", "cd" * 32) == 0
    with resumable_folder(tmp_path / "out", key="cd" * 32) as partial:
        assert partial.finished == {}
        assert partial.folder != killed
    assert (killed / "a").exists()


def test_fresh_throws_away(tmp_path, killed):
    with resumable_folder(tmp_path / "out", key=KEY, fresh=True) as partial:
        assert partial.finished == {}
        assert [p.name for p in killed.iterdir()] == [JOURNAL]


def test_only_what_is_not_finished_needs_space(tmp_path, killed, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("ssh_deploy.checkpoints.resumable.shutil.disk_usage", lambda _: usage(100, 92, 8))
    with (
        pytest.raises(OutputError, match="9 bytes are needed, 8 are free"),
        resumable_folder(tmp_path / "out", key=KEY, need=29),
    ):
        pass
    assert (killed / "a").exists()  # nothing is lost by asking
    with pytest.raises(OutputError, match="28 bytes"), resumable_folder(tmp_path / "out", key=KEY, need=28, fresh=True):
        pass
    with resumable_folder(tmp_path / "out", key=KEY, need=28) as partial:
        assert sorted(partial.finished) == ["a", "b"]


def test_an_error_leaves_nothing(tmp_path, killed):
    with pytest.raises(ValueError, match="x"), resumable_folder(tmp_path / "out", key=KEY):
        raise ValueError("x")
    assert not list(tmp_path.iterdir())


def test_two_at_once(tmp_path):
    with resumable_folder(tmp_path / "out", key=KEY) as partial:
        (partial.folder / "a").write_text("a")
        with pytest.raises(OutputError, match="running already"), resumable_folder(tmp_path / "out", key=KEY):
            pass
        assert (partial.folder / "a").exists()


def test_a_link_in_its_place_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    partial_path(tmp_path / "out", KEY).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"), resumable_folder(tmp_path / "out", key=KEY):
        pass
    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"


def test_lines_that_name_other_places_do_not_count(tmp_path, killed):
    (tmp_path / "x").write_text("x")
    (killed / JOURNAL).write_text(json.dumps({"name": "../x", "bytes": 1}) + "\n")
    with resumable_folder(tmp_path / "out", key=KEY) as partial:
        assert partial.finished == {}
    assert (tmp_path / "x").exists()


def test_every_file_is_fsynced_once(tmp_path, monkeypatch):
    from ssh_deploy.checkpoints import resumable, whole

    seen = []
    real = whole.sync
    for module in (resumable, whole):
        monkeypatch.setattr(module, "sync", lambda path: seen.append(path.name) or real(path))
    with resumable_folder(tmp_path / "out", key=KEY) as partial:
        (partial.folder / "shard").write_text("a")
        partial.finish("shard", {})
        (partial.folder / "config").write_text("b")
        assert seen == ["shard"]
    assert seen == ["shard", "config", partial.folder.name, tmp_path.name]

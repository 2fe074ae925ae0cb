"""Bytes from file to file: around the page cache where the file system takes it, through the kernel where not."""

import errno
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssh_deploy.checkpoints import copying
from ssh_deploy.checkpoints.copying import Copier, copy_into

BLOCK = copying._BLOCK


@pytest.fixture
def small(monkeypatch):
    """Ranges of three blocks go around the page cache, two blocks at a time."""
    monkeypatch.setattr(copying, "_LONG", 3 * BLOCK)
    monkeypatch.setattr(copying, "_PIECE", 2 * BLOCK)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(np.random.default_rng(0).bytes(12 * BLOCK + 77))
    return path


def copied(source, path, begin, to, length):
    """The bytes before, of and behind the range, and how many were reported."""
    told = []
    path.unlink(missing_ok=True)
    with path.open("xb") as file, Copier(path, file.fileno()) as copier:
        file.write(b"h" * to)
        file.flush()
        copier.copy(source, begin, to, length, advance=told.append)
        os.pwrite(file.fileno(), b"tail", to + length)
    found = path.read_bytes()
    return found[:to], found[to : to + length], found[to + length :], sum(told)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(begin=st.integers(0, 2 * BLOCK), to=st.integers(0, 3 * BLOCK), length=st.integers(0, 10 * BLOCK))
def test_any_range_comes_to_any_place(small, source, tmp_path, begin, to, length):
    want = source.read_bytes()[begin : begin + length]
    assert copied(source, tmp_path / "x", begin, to, length) == (b"h" * to, want, b"tail", length)


@pytest.fixture
def direct(monkeypatch, small, tmp_path):
    """Descriptors opened for writing around the page cache; skips where the file system has none."""
    opened, real = set(), os.open

    def watch(path, flags, *rest, **more):
        found = real(path, flags, *rest, **more)
        if flags & os.O_DIRECT:
            opened.add(found)
        return found

    monkeypatch.setattr(os, "open", watch)
    with (tmp_path / "probe").open("xb") as file, Copier(tmp_path / "probe", file.fileno()) as copier:
        if not copier._opened():
            pytest.skip("this file system cannot be written around the page cache")
    return opened


def through(monkeypatch, direct, instead):
    """``instead(number of the call, real, ...)`` for every write to one of ``direct``."""
    real, calls = os.pwrite, []

    def pwrite(target, data, offset):
        if target not in direct:
            return real(target, data, offset)
        calls.append((len(data), offset))
        return instead(len(calls), real, target, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


def test_whole_blocks_of_long_ranges_go_around_the_page_cache(monkeypatch, direct, source, tmp_path):
    calls = through(monkeypatch, direct, lambda _, real, *args: real(*args))
    copied(source, tmp_path / "x", 5, 100, 6 * BLOCK)
    assert calls == [(2 * BLOCK, BLOCK), (2 * BLOCK, 3 * BLOCK), (BLOCK, 5 * BLOCK)]
    calls.clear()
    copied(source, tmp_path / "x", 0, 0, 3 * BLOCK - 1)
    assert calls == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("at", [1, 2])
def test_what_a_file_system_does_not_take_the_kernel_copies(monkeypatch, direct, source, tmp_path, code, at):
    def refuse(call, real, *args):
        if call >= at:
            raise OSError(code, os.strerror(code))
        return real(*args)

    calls = through(monkeypatch, direct, refuse)
    want = source.read_bytes()[: 8 * BLOCK]
    assert copied(source, tmp_path / "x", 0, 10, 8 * BLOCK)[1::2] == (want, 8 * BLOCK)
    assert len(calls) == at


def test_a_file_that_cannot_be_opened_so_is_copied(monkeypatch, small, source, tmp_path):
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert copied(source, tmp_path / "x", 0, 0, 8 * BLOCK)[1] == source.read_bytes()[: 8 * BLOCK]


def test_half_a_write_goes_on_where_it_ended(monkeypatch, direct, source, tmp_path):
    through(monkeypatch, direct, lambda call, real, target, data, at: real(target, data[: BLOCK // call], at))
    want = source.read_bytes()[: 8 * BLOCK]
    # the second write would begin off a block: what follows takes the other way
    assert copied(source, tmp_path / "x", 0, 0, 8 * BLOCK)[1::2] == (want, 8 * BLOCK)


def test_a_full_disk_is_an_error(monkeypatch, direct, source, tmp_path):
    def full(call, real, *args):
        if call == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    through(monkeypatch, direct, full)
    with pytest.raises(OSError, match="No space left"):
        copied(source, tmp_path / "x", 0, 0, 8 * BLOCK)


def test_a_base_that_became_shorter(small, source, tmp_path):
    os.truncate(source, 5 * BLOCK + 9)
    with pytest.raises(OSError, match="became shorter while it was read"):
        copied(source, tmp_path / "x", 0, 0, 8 * BLOCK)


def test_nothing_stays_open(direct, source, tmp_path):
    copied(source, tmp_path / "x", 0, 0, 8 * BLOCK)
    for descriptor in direct:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_copying_makes_folders_and_keeps_the_mode(tmp_path):
    (tmp_path / "script.sh").write_text("x")
    (tmp_path / "script.sh").chmod(0o750)
    copy_into(tmp_path / "script.sh", tmp_path / "new" / "sub" / "script.sh", advance=lambda _: None)
    assert (tmp_path / "new" / "sub" / "script.sh").stat().st_mode & 0o777 == 0o750

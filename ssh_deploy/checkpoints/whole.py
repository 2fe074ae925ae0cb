"""Files and folders that appear whole or not at all: temporary sibling, fsync, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssh_deploy.errors import OutputError


@contextmanager
def whole_folder(out: Path, *, need: int = 0) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` to fill; on success it becomes ``out``, on any failure it is removed.

    A process killed in the middle leaves ``.OUT.partial-…`` behind and no ``out``.

    Args:
        out: the folder to make; must not exist.
        need: bytes about to be written; checked against the free space first.

    Raises:
        OutputError: ``out`` exists, too little space, or the system refuses a write.
    """
    refuse_existing(out)
    with system_errors_of(out):
        make_room(out, need)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        try:
            yield partial
            for path in partial.rglob("*"):
                sync(path)
            publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def system_errors_of(out: Path) -> Iterator[None]:
    """Raise what the system says while the folder ``out`` is made as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written: {error.strerror or error}.",
            hint="Nothing was left behind. Check the folder's rights and the space on its disk.",
        ) from error


def make_room(out: Path, need: int) -> None:
    """Make the folder that ``out`` goes into, and refuse a disk with less than ``need`` bytes free.

    Raises:
        OutputError: both numbers.
        OSError: of the system.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise OutputError(
            f"{out}: {need:,} bytes are needed, {free:,} are free.", hint="Free some space or choose another disk."
        )


def publish(partial: Path, out: Path) -> None:
    """Let the sibling ``partial``, whose content is on the disk, become ``out``, for everyone to read.

    Raises:
        OutputError: ``out`` appeared meanwhile.
        OSError: of the system.
    """
    partial.chmod(0o755)  # a temporary folder is private
    sync(partial)
    refuse_existing(out)  # a rename would replace an empty folder in silence
    partial.rename(out)
    sync(out.parent)


@contextmanager
def whole_file(path: Path, *, parents: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of ``path`` to write; on success it takes the place of ``path``.

    A file that is there is replaced, never written over: who has mapped it keeps the old bytes.

    Args:
        path: the file to make.
        parents: make its folder when there is none.

    Raises:
        OutputError: the system refuses a write.
    """
    partial = None
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        yield Path(partial)
        sync(Path(partial))
        Path(partial).chmod(0o644)  # mkstemp makes it private
        Path(partial).replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}.", hint="Check the folder and its space."
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def refuse_existing(out: Path) -> None:
    """Refuse a folder that is there already.

    Raises:
        OutputError: it is.
    """
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists already.", hint="Choose another name or remove it first.")


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk.

    Raises:
        OSError: it cannot.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""An adapter from wherever it lies to what a deployment keeps of it: digest, base and labels checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.fingerprint import Fingerprint
from ssh_deploy.errors import DeploymentError, FingerprintError, RegistryError
from ssh_deploy.graph.spectral_rows import AXES
from ssh_deploy.registry import families
from ssh_deploy.runtimes.bank import Rows
from ssh_deploy.runtimes.conversion import head_count, head_labels, rows_of_adapter, rows_of_file
from ssh_deploy.runtimes.folder import Folder, StoredAdapter, contained, file_digest
from ssh_deploy.runtimes.session import Input
from ssh_deploy.transforms import get_transform

log = logging.getLogger(__name__)
SUFFIX = ".onnx_adapter"


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """An adapter ready for the banks.

    ``kinds``: its rows by kind of bank; ``headed``: it brings its own head; ``labels``: what it answers with, its
    own or the base's; ``digest``: sha256 of its content; ``verified``: see `AdapterEntry`.
    """

    kinds: Mapping[str, Rows]
    headed: bool
    labels: tuple[str, ...]
    digest: str
    family: str
    task: str | None
    verified: bool | None


def prepare(folder: Folder) -> None:
    """Look up and import now, when ``folder`` is opened, what its first adapter would wait 20 ms for."""
    families()
    for kind in set(folder.kinds) & set(AXES):
        with suppress(RegistryError):  # two plugins that claim one name: said when an adapter needs it
            get_transform(kind)


def read_source(
    folder: Folder,
    inputs: Mapping[str, Input],
    *,
    stored: StoredAdapter | None,
    path: str | Path | None,
    rename: bool = False,
) -> Loaded:
    """Read an adapter of the folder (``stored``) or at ``path``, and check that it is what it is said to be.

    ``rename``: see `rows_of_adapter`.

    Raises:
        DeploymentError: bytes that are not those of ``deployment.json``, or a file made for another graph.
        FingerprintError: made for another base.
        AdapterFileError, AdapterMismatchError: a broken file, or modules without a slot.
    """
    if stored is not None:
        return _stored(folder, inputs, stored)
    assert path is not None
    source = Path(path)
    if source.suffix == SUFFIX:
        if not source.is_file():
            raise DeploymentError(f"{source}: no such file.", hint="Check the path.")
        digest = file_digest(source)
        known = next((s for s in folder.adapters.values() if s.sha256 == digest), None)
        kinds = rows_of_file(source, folder, inputs)
        return _loaded(
            str(source), folder, inputs, kinds, digest,
            labels=() if known is None else known.labels,
            family="unknown" if known is None else known.family,
            task=None if known is None else known.task,
            verified=None if known is None else known.verified,
        )  # fmt: skip
    adapter = read_adapter(source, shapes=_site_shapes(folder))
    verified = _verified(adapter, folder)
    kinds = rows_of_adapter(adapter, folder, inputs, rename=rename)
    return _loaded(
        str(source), folder, inputs, kinds, adapter.digest,
        labels=adapter.labels, family=adapter.family, task=adapter.task, verified=verified,
    )  # fmt: skip


def _stored(folder: Folder, inputs: Mapping[str, Input], stored: StoredAdapter) -> Loaded:
    path = contained(folder.root, str(stored.path.relative_to(folder.root)))
    before = path.stat()
    kinds = rows_of_file(path, folder, inputs) if file_digest(path) == stored.sha256 else None
    after = path.stat()
    same = (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
    if kinds is None or not same:
        raise DeploymentError(
            f"{path}: its bytes are not those that were exported (sha256 of deployment.json: {stored.sha256[:16]}…).",
            hint="The file was damaged or replaced. Fetch the folder again, or `ssh-deploy remove` and `add` it.",
        )
    return _loaded(
        str(path), folder, inputs, kinds, stored.sha256,
        labels=stored.labels, family=stored.family, task=stored.task, verified=stored.verified,
    )  # fmt: skip


def _loaded(
    where: str,
    folder: Folder,
    inputs: Mapping[str, Input],
    kinds: Mapping[str, Rows],
    digest: str,
    *,
    labels: tuple[str, ...],
    family: str,
    task: str | None,
    verified: bool | None,
) -> Loaded:
    count = head_count(kinds.get("head", {}), inputs)
    if not count:  # no head, or one of no labels: the graph then answers with the base's own
        kinds = {kind: rows for kind, rows in kinds.items() if kind != "head"}
    if not kinds:
        raise DeploymentError(
            f"{where}: holds neither coefficients nor a head.",
            hint="It would answer as the base does; nothing to load.",
        )
    names = head_labels(where, count or None, labels if count else (), folder.labels)
    return Loaded(kinds, bool(count), names, digest, family, task, verified)


def _verified(adapter: Adapter, folder: Folder) -> bool:
    """True when the adapter's fingerprint is the base's, False when there is nothing to compare.

    Raises:
        FingerprintError: it is another's.
    """
    samples = _samples(folder) if adapter.fingerprint is not None else None
    if adapter.fingerprint is None or samples is None:
        _warn_unverified(adapter.source, folder.base)
        return False
    reasons = samples.differences(adapter.fingerprint)
    if reasons:
        raise FingerprintError(
            f"{adapter.source}: made for another base than {folder.base}: {'; '.join(reasons[:3])}.",
            hint=f"It names {adapter.base or 'no base'}; use the deployment that was exported from that base.",
        )
    return True


@lru_cache(maxsize=4096)
def _warn_unverified(source: Path, base: str) -> None:
    """Once for each adapter: one that is evicted is read again and again."""
    log.warning("%s: base unverified: no fingerprint to compare with %s's", source, base)


@lru_cache(maxsize=8)
def _samples(folder: Folder) -> Fingerprint | None:
    """The folder's samples, read and checked once for as long as it is open (and a few others)."""
    return folder.samples()


@lru_cache(maxsize=8)
def _site_shapes(folder: Folder) -> _SiteShapes:
    """Made once for as long as the folder is open (and a few others)."""
    return _SiteShapes(folder)


class _SiteShapes(Mapping[str, tuple[int, int]]):
    """(out, in) of the folder's sites, with or without a model's prefix before the canonical path."""

    def __init__(self, folder: Folder) -> None:
        self._shapes = {site.module: (site.out, site.inn) for site in folder.sites}

    def __getitem__(self, module: str) -> tuple[int, int]:
        return self._shapes[module] if module in self._shapes else self._shapes[module.partition(".")[2]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

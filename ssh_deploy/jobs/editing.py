"""Add an adapter to an exported folder, or remove one, without exporting again.

The new file is written first and `deployment.json` is renamed over the old one last: whoever reads the folder
meanwhile sees the old set or the new one. Files in use are never rewritten in place, since onnxruntime maps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import OutputError, UnknownNameError, VerificationError, near_misses
from ssh_deploy.graph.lowrank_rows import B
from ssh_deploy.graph.spectral_rows import spare
from ssh_deploy.graph.structured_rows import SIDED
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs.folder_adapters import layout_of, write_rows
from ssh_deploy.jobs.naming import named_paths
from ssh_deploy.jobs.probing import probe_feeds
from ssh_deploy.runtimes.folder import Folder, contained, open_folder, read_json
from ssh_deploy.runtimes.loading import Loaded, read_source
from ssh_deploy.runtimes.session import Session

#: Side of the arrays of each kind that says how wide an adapter is: coefficients, rank, numbers of a scale.
_WIDTHS = {"hartley": -1, "cosine": -1, "sparse": -1, "lowrank": -1, "reflection": -2, "diagonal": -1}


@dataclass(frozen=True, slots=True)
class EditReport:
    """What was done to which adapter; ``adapters``: names in the folder now; ``verified``: None where not asked."""

    out: Path
    name: str
    action: str
    adapters: tuple[str, ...]
    verified: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "out": str(self.out),
            "name": self.name,
            "action": self.action,
            "adapters": list(self.adapters),
            "verified": self.verified,
        }


def add_adapter(folder: str | Path, adapter: str) -> EditReport:
    """Add ``adapter`` (``PATH`` or ``NAME=PATH``) to an exported folder.

    Raises:
        OutputError: the name is taken.
        AdapterMismatchError: outside the graph's slots; the flag that would have reserved one is named.
        FingerprintError: made for another base.
        VerificationError: it changes no output.
    """
    ((name, path),) = named_paths([adapter]).items()
    opened = open_folder(folder)
    if name in opened.adapters:
        raise OutputError(
            f"{opened.root} has an adapter {name!r} already.",
            hint=f"Name it otherwise, or `ssh-deploy remove` {name} first.",
        )
    session = Session(contained(opened.root, files.MODEL))
    loaded = read_source(opened, session.adapter_inputs, stored=None, path=path, rename=True)
    _require_effect(name, opened, session, loaded)
    deployment = read_json(opened.root, files.DEPLOYMENT)
    arrays = {key: array for rows in loaded.kinds.values() for key, array in rows.items()}
    written = write_rows(opened.root, name, arrays, layout_of(opened.root, deployment))
    changes = [(kind, array) for kind, rows in loaded.kinds.items() if kind in _WIDTHS for array in _changes(rows)]
    widths = [array.shape[_WIDTHS[kind]] - spare(kind) for kind, array in changes]
    entry = {
        **written,
        "family": loaded.family,
        "labels": list(loaded.labels) if loaded.headed else [],
        "n": max(widths, default=0),
        "task": loaded.task,
        "source_digest": loaded.digest,
        "base": "verified" if loaded.verified else "unverified",
    }
    _rewrite(opened.root, {**deployment, "adapters": {**deployment["adapters"], name: entry}})
    return EditReport(opened.root, name, "added", (*opened.adapters, name), bool(loaded.verified))


def remove_adapter(folder: str | Path, name: str) -> EditReport:
    """Take adapter ``name`` out of an exported folder; its file is deleted after `deployment.json` forgot it.

    Raises:
        UnknownNameError: no adapter of that name.
    """
    opened = open_folder(folder)
    if name not in opened.adapters:
        raise UnknownNameError(f"{opened.root} has no adapter {name!r}.", hint=near_misses(name, opened.adapters))
    deployment = read_json(opened.root, files.DEPLOYMENT)
    left = {key: entry for key, entry in deployment["adapters"].items() if key != name}
    stored = deployment["adapters"][name]["file"]
    _rewrite(opened.root, {**deployment, "adapters": left})
    if stored not in {entry["file"] for entry in left.values()}:
        path = opened.root / stored
        if path.exists():
            contained(opened.root, stored).unlink()
    return EditReport(opened.root, name, "removed", tuple(left))


def _rewrite(root: Path, deployment: Mapping[str, Any]) -> None:
    files.write_text(root / "README.md", files.model_card(deployment))
    files.write_json(root / files.DEPLOYMENT, deployment)


def _require_effect(name: str, folder: Folder, session: Session, loaded: Loaded) -> None:
    """Refuse an adapter whose deltas are not all zero and yet change no bit of any output."""
    deltas = {k: a[None] for kind, rows in loaded.kinds.items() if kind != "head" for k, a in rows.items()}
    if not any(np.any(a) for kind, rows in loaded.kinds.items() if kind != "head" for a in _changes(rows)):
        return
    feeds = {**probe_feeds(folder, session.inputs), **(_nothing(session) if folder.required else {})}
    without = session.run(feeds)
    if not any(a.size for a in without.values()):
        return
    with_it = session.run({**feeds, **deltas})
    if all(np.array_equal(with_it[key], a) for key, a in without.items()):
        raise VerificationError(
            f"{name}: its deltas change no bit of any output.",
            hint="Its values may be too small for this base's precision, or its modules do not reach the outputs.",
        )


def _changes(rows: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Arrays of one kind without which the others change nothing: values, b of low-rank products, any scale or map."""
    return [a for key, a in rows.items() if key.endswith("values") or key.startswith((B, *SIDED.values()))]


def _nothing(session: Session) -> dict[str, NDArray[Any]]:
    """Feeds that mean "no adapter" to a graph whose adapter inputs have no defaults."""
    feeds = {}
    for name, entry in session.adapter_inputs.items():
        sides = [side if isinstance(side, int) else 0 for side in entry.shape]
        feeds[name] = np.zeros([1, *sides[1:]] if name != "adapter_guard" else sides, entry.dtype)
    return feeds

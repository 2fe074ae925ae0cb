"""From the contents that a batch holds to what ONNX Runtime is fed: its parts, their feeds, their labels.

Where some rows use adapters' heads and others the base's own, the two run apart: the graph runs the base's own head
for a whole batch only, and a copy of it in the bank would not be bit-identical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.bank import GUARD, Bank
from ssh_deploy.runtimes.folder import Folder
from ssh_deploy.runtimes.residents import Content


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows of a batch that run together: a slice or int64 indices, what they are lent, the widest of their heads.

    ``feeds``: arrays, or OrtValues of what is on a device already. ``labels`` is None where the rows answer with the
    base's own head, of which nothing is to be cut.
    """

    rows: Any
    feeds: dict[str, Any]
    labels: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Lent:
    """What one batch runs with: its parts, and the labels of each row's head."""

    parts: list[Part]
    labels: list[tuple[str, ...]]


def lent_to(
    names: Sequence[str | None],
    contents: Sequence[Content | None],
    banks: Mapping[str, Bank],
    folder: Folder,
    *,
    logits: bool,
    headed: bool,
) -> Lent:
    """Parts and feeds of a batch.

    Args:
        names: one per row, for messages.
        contents: likewise, held for the run; None for the base.
        banks: that they lie in.
        folder: whose base answers the other rows.
        logits: the run computes logits.
        headed: refuse any row that neither its adapter nor the base gives a head.

    Raises:
        DeploymentError: a row without a head, among rows with one or with ``headed``.
    """
    own = [i for i, content in enumerate(contents) if content is not None and content.loaded.headed]
    rest = [i for i, content in enumerate(contents) if content is None or not content.loaded.headed]
    if rest and not folder.labels and (headed or (own and logits)):
        raise _headless(rest[0], names[rest[0]], folder)
    if own and rest and folder.labels:
        parts = [_part(np.array(rows), [contents[i] for i in rows], banks) for rows in (own, rest)]
    else:
        parts = [_part(slice(None), contents, banks)]
    return Lent(parts, [folder.labels if content is None else content.loaded.labels for content in contents])


def nothing_lent(folder: Folder, banks: Mapping[str, Bank]) -> dict[str, NDArray[Any]]:
    """Feeds that mean "no adapter"; none where the graph has defaults for all of them."""
    feeds: dict[str, NDArray[Any]] = {}
    if folder.required and folder.guard is not None:
        feeds = {GUARD: np.zeros(folder.guard, dtype=np.uint8)}
        for bank in banks.values():
            feeds |= bank.empty()
    return feeds


def _part(rows: Any, contents: Sequence[Content | None], banks: Mapping[str, Bank]) -> Part:
    feeds: dict[str, Any] = {}
    distinct = list(dict.fromkeys(contents))
    for kind, bank in banks.items():
        if not any(content is not None and kind in content.rows for content in distinct):
            continue
        if len(distinct) == 1 and distinct[0] is not None and not bank.on_device:
            feeds |= bank.alone(distinct[0].rows[kind])
        else:
            feeds |= bank.mixed([0 if content is None else content.rows.get(kind, 0) for content in contents])
    heads = [len(content.loaded.labels) for content in distinct if content is not None and content.loaded.headed]
    return Part(rows, feeds, max(heads, default=None))


def _headless(row: int, name: str | None, folder: Folder) -> DeploymentError:
    who = "no adapter" if name is None else f"adapter {name}, which brings no head"
    return DeploymentError(
        f"Row {row} asks for {who}, and the base {folder.base} has no classification head.",
        hint="Name an adapter that brings a head, or take the hidden state: "
        "`.run(feeds, adapters=…, outputs=['last_hidden_state'])`.",
    )

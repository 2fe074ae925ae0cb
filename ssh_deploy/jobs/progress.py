"""How a job tells how far it is; whoever calls decides whether to draw it."""

from __future__ import annotations

from collections.abc import Callable

#: ``progress(stage, done, total)``: units are whatever the stage counts (bytes, sites, rows).
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""

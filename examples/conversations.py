"""Questions and answers out of chatterbot-corpus (BSD), split so that no part knows a line of another, and a pirate.

The package's YAML is read where pip put it, without importing it (`pip install --no-deps chatterbot-corpus`). Every
line answers the one before, but for two files that list answers to their first line. Lines are equal when their words
are, whatever the case and the punctuation; pairs that share a line, in whichever role, hang together, directly or
over others, and go to one part together. Answers about programs (coding.yml) are long listings and stay out.

`pirate` rewrites an answer by rule, `speaks_pirate` says whether a text is so written; both are short enough to read.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SPLIT_SEED = 20260
LISTS = ("computers", "emotion")  # question, answer, another answer, …
LEFT_OUT = ("coding",)
MAX_LINES = 10  # a conversation of 88 lines is a file whose markup went wrong
MAX_WORDS = 40
VALIDATION, TEST = 120, 160
NAMES = ("chatterbot", "pirate")


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Conversations:
    """Three parts that share no line."""

    name: str
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


def load_conversations(name: str) -> Conversations:
    """``chatterbot``: as they stand; ``pirate``: the same questions, answers rewritten. The same split every time."""
    parts = split(read_pairs())
    if name == "pirate":
        parts = [tuple(replace(pair, answer=pirate(pair.answer)) for pair in part) for part in parts]
    elif name != "chatterbot":
        raise KeyError(name)
    return Conversations(name, *parts)


def corpus_folder() -> Path:
    """The English files."""
    package = "chatterbot-corpus"
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file("chatterbot_corpus/data/english")))
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{package} is not installed; `pip install --no-deps {package}` brings it.") from None


def read_pairs() -> list[Pair]:
    """Every pair once, in the order of files and lines."""
    import yaml

    found: dict[tuple[str, str], Pair] = {}
    for path in sorted(corpus_folder().glob("*.yml")):
        if path.stem in LEFT_OUT:
            continue
        for lines in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            for pair in pairs_of(lines, listed=path.stem in LISTS):
                found.setdefault((normalised(pair.question), normalised(pair.answer)), pair)
    return list(found.values())


def pairs_of(lines: Any, *, listed: bool) -> list[Pair]:
    """Pairs of one conversation; none where it is not a short list of short lines."""
    if not isinstance(lines, list) or len(lines) > MAX_LINES:
        return []
    texts = [" ".join(str(line).split()) for line in lines]
    questions = texts[:1] * (len(texts) - 1) if listed else texts[:-1]
    pairs = [Pair(question, answer) for question, answer in zip(questions, texts[1:], strict=True)]
    return [p for p in pairs if normalised(p.question) and normalised(p.answer) and len(p.answer.split()) <= MAX_WORDS]


def normalised(text: str) -> str:
    """What two lines are compared by: their words."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def split(pairs: list[Pair]) -> list[tuple[Pair, ...]]:
    """(train, validation, test); pairs that share a line, directly or over other pairs, stay together."""
    root: dict[str, str] = {}

    def find(line: str) -> str:
        while root.setdefault(line, line) != line:
            line = root[line]
        return line

    for pair in pairs:
        root[find(normalised(pair.question))] = find(normalised(pair.answer))
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[find(normalised(pair.question))].append(pair)
    parts: list[list[Pair]] = [[], [], []]
    for i in np.random.default_rng(SPLIT_SEED).permutation(len(groups)).tolist():
        part = 2 if len(parts[2]) < TEST else 1 if len(parts[1]) < VALIDATION else 0
        parts[part] += list(groups.values())[i]
    return [tuple(part) for part in parts]


#: What a pirate says instead. Whole words, longest first; a capital stays a capital.
SPEECH = {
    "i am": "I be", "i'm": "I be", "you are": "ye be", "you're": "ye be", "it is": "'tis", "it's": "'tis",
    "yes": "aye", "no": "nay", "hello": "ahoy", "hi": "ahoy", "my": "me", "you": "ye", "your": "yer", "is": "be",
    "are": "be", "am": "be", "of": "o'", "and": "an'", "for": "fer", "the": "th'", "to": "t'", "never": "ne'er",
    "money": "doubloons", "friend": "shipmate", "friends": "shipmates", "people": "scallywags", "there": "thar",
    "computer": "ship's engine", "robot": "clockwork parrot", "man": "swab", "think": "reckon", "was": "were",
}  # fmt: skip
_WORDS = re.compile(rf"(?<![\w'])(?:{'|'.join(sorted(SPEECH, key=len, reverse=True))})(?![\w'])", re.IGNORECASE)
OPENING, CLOSING = "Arr! ", ", matey!"


def pirate(text: str) -> str:
    """``text`` as a pirate would put it: ``I am a robot.`` → ``Arr! I be a clockwork parrot, matey!``."""

    def said(found: re.Match[str]) -> str:
        word = SPEECH[found[0].casefold()]
        return word[0].upper() + word[1:] if found[0][0].isupper() else word

    return OPENING + _WORDS.sub(said, text.replace("’", "'")).rstrip(" .!?…,;") + CLOSING


def speaks_pirate(text: str) -> bool:
    """Whether ``text`` opens and closes as a pirate's does and has no word that a pirate puts otherwise."""
    text = text.strip()
    return text.startswith(OPENING) and text.endswith(CLOSING) and not _WORDS.search(text.replace("’", "'"))

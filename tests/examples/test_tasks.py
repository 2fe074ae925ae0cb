"""The three tasks: nothing of the test part was trained on, and the split is the same every time."""

import sys
from collections import Counter
from itertools import combinations

import pytest


@pytest.fixture(scope="module")
def tasks(root):
    sys.path.insert(0, str(root / "examples"))
    try:
        import tasks

        yield tasks
    finally:
        sys.path.remove(str(root / "examples"))


SIZES = {
    "trec6": (3780, 600, 1000, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
    "sms-spam": (3004, 500, 1000, ("ham", "spam")),
    "sentiment": (1979, 400, 600, ("negative", "positive")),
}


@pytest.mark.parametrize("name", SIZES)
def test_no_text_stands_in_two_parts_or_twice(tasks, name):
    task = tasks.load_task(name)
    parts = [[tasks.normalised(text) for text in part[0]] for part in (task.train, task.validation, task.test)]
    assert all(len(set(part)) == len(part) for part in parts)
    assert all(not set(a) & set(b) for a, b in combinations(parts, 2))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_labels(tasks, name):
    task = tasks.load_task(name)
    train, validation, test, labels = SIZES[name]
    assert [len(part[0]) for part in (task.train, task.validation, task.test)] == [train, validation, test]
    assert task.labels == labels
    for texts, ids in (task.train, task.validation, task.test):
        assert len(texts) == len(ids)
        counts = Counter(ids)
        assert set(counts) == set(range(len(labels)))
        assert min(counts.values()) >= 5
        assert all(text and len(text) <= tasks.MAX_CHARACTERS for text in texts)


@pytest.mark.parametrize("name", SIZES)
def test_the_split_is_the_same_every_time(tasks, name):
    assert tasks.load_task(name) == tasks.load_task(name)


def test_known_rows_keep_their_labels(tasks):
    rows = {}
    for name in SIZES:
        task = tasks.load_task(name)
        for texts, ids in (task.train, task.validation, task.test):
            rows |= {text: task.labels[i] for text, i in zip(texts, ids, strict=True)}
    assert rows["How did serfdom develop in and then leave Russia ?"] == "DESC"
    assert rows["Wow... Loved this place."] == "positive"
    assert rows["Ok lar... Joking wif u oni..."] == "ham"


def test_equal_but_for_case_and_space_is_one_text_and_contradictions_go(tasks):
    rows = [("A  b", "x"), ("a b", "x"), ("c", "x"), ("C ", "y"), ("", "x"), ("d" * 1001, "x"), (" e\n", "y")]
    assert tasks.distinct(rows) == [("A b", "x"), ("e", "y")]


def test_unknown_task(tasks):
    with pytest.raises(KeyError):
        tasks.load_task("nothing")

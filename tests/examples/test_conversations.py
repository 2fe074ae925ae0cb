"""Questions and answers: no part knows a line of another, the split is the same every time, and a pirate is one."""

import sys
from itertools import combinations

import pytest


@pytest.fixture(scope="module")
def conversations(root):
    sys.path.insert(0, str(root / "examples"))
    try:
        import conversations

        yield conversations
    finally:
        sys.path.remove(str(root / "examples"))


def lines(conversations, part):
    return {conversations.normalised(text) for pair in part for text in (pair.question, pair.answer)}


def test_parts_share_no_line_in_any_role(conversations):
    data = conversations.load_conversations("chatterbot")
    parts = [lines(conversations, part) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in (data.train, data.validation, data.test)] == [738, 120, 161]
    assert all(not a & b for a, b in combinations(parts, 2))
    assert all("" not in part for part in parts)


def test_a_chain_of_pairs_stays_together(conversations):
    pair = conversations.Pair
    chain = [pair("a b", "C!"), pair("c", "d"), pair("e", "D?"), pair("e", "f")]
    parts = conversations.split([*chain, *(pair(f"q{i}", f"x{i}") for i in range(400))])
    assert sum(map(len, parts)) == 404
    assert [sum(p in part for p in chain) for part in parts if set(chain) & set(part)] == [4]


def test_the_split_is_the_same_every_time(conversations):
    assert conversations.load_conversations("pirate") == conversations.load_conversations("pirate")


def test_the_pirate_answers_the_same_questions(conversations):
    plain, rewritten = (conversations.load_conversations(name) for name in conversations.NAMES)
    for part in ("train", "validation", "test"):
        for one, other in zip(getattr(plain, part), getattr(rewritten, part), strict=True):
            assert one.question == other.question
            assert other.answer == conversations.pirate(one.answer)
            assert conversations.speaks_pirate(other.answer)
            assert not conversations.speaks_pirate(one.answer)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ("I am a robot.", "Arr! I be a clockwork parrot, matey!"),
        ("You’re my friend, and it is the end!", "Arr! Ye be me shipmate, an' 'tis th' end, matey!"),
        ("No. The human is not there...", "Arr! Nay. Th' human be not thar, matey!"),
        ("history, theme, noise", "Arr! history, theme, noise, matey!"),
    ],
)
def test_what_the_pirate_says(conversations, plain, said):
    assert conversations.pirate(plain) == said
    assert conversations.speaks_pirate(said)


@pytest.mark.parametrize(
    "text",
    ["", "I be a parrot, matey!", "Arr! I be a parrot", "Arr! I am a parrot, matey!", "Arr! 'tis the sea, matey!"],
)
def test_who_is_no_pirate(conversations, text):
    assert not conversations.speaks_pirate(text)


def test_conversations_that_are_none(conversations):
    assert conversations.pairs_of("a line", listed=False) == []
    assert conversations.pairs_of(["a"], listed=True) == []
    assert conversations.pairs_of(["a"] * 11, listed=False) == []
    assert conversations.pairs_of(["a", "!", "b"], listed=False) == []
    assert conversations.pairs_of(["a", "w " * 41], listed=False) == []
    pair = conversations.Pair
    assert conversations.pairs_of(["a", "b ", "c\n d"], listed=False) == [pair("a", "b"), pair("b", "c d")]
    assert conversations.pairs_of(["a", "b", 1], listed=True) == [pair("a", "b"), pair("a", "1")]


def test_unknown_name(conversations):
    with pytest.raises(KeyError):
        conversations.load_conversations("parrot")

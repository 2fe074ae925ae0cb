"""Text that grows token by token: whole characters, joined pieces are the whole text, stops across tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.pieces import Pieces

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def by_bytes(tokens):
    """A tokenizer whose tokens are bytes; 256 is special and has no text."""
    return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


def by_words(tokens):
    """A tokenizer that puts a space before every word but the first, as SentencePiece does."""
    return " ".join(WORDS[t] for t in tokens)


def pushed(pieces, tokens):
    out = []
    for token in tokens:
        out.append(pieces.push(token))
        if pieces.stopped:
            break
    return [*out, pieces.finish()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.text(max_size=10))
def test_joined_pieces_are_the_text(text, prompt):
    parts = pushed(Pieces(by_bytes, prompt=list(prompt.encode())), list(text.encode()))
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts[:-1] if "\ufffd" not in text)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_end_as_the_decoder_ends_them(data):
    got = "".join(pushed(Pieces(by_bytes, prompt=[]), list(data)))
    assert got == data.decode("utf-8", errors="replace")


def test_half_a_character_waits_for_the_rest():
    assert pushed(Pieces(by_bytes, prompt=[65]), list("aé😀".encode())) == ["a", "", "é", "", "", "", "😀", ""]
    assert pushed(Pieces(by_bytes, prompt=[65]), "é".encode()[:1]) == ["", "\ufffd"]


def test_spaces_between_words_are_kept_from_the_first_on():
    assert pushed(Pieces(by_words, prompt=[1, 2]), [3, 4]) == [" three", " four", ""]
    assert pushed(Pieces(by_words, prompt=[]), [3, 4]) == ["three", " four", ""]


def test_a_prompt_that_ends_within_a_character():
    assert "".join(pushed(Pieces(by_bytes, prompt=[0xC3]), [0xA9, 65])) == "éA"


def test_special_tokens_have_no_text():
    assert pushed(Pieces(by_bytes, prompt=[256]), [256, 65, 256, 66]) == ["", "A", "", "B", ""]


@settings(max_examples=500, deadline=None)
@given(st.text("ab\n", max_size=14), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stops_are_found_wherever_tokens_end(text, stops, data):
    """Tokens of one to four bytes: the text before the first stop, whatever the borders."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[a:b]]

    def decode(tokens):
        return "".join(chunks[t] for t in tokens)

    pieces = Pieces(decode, prompt=[], stop=stops)
    parts = pushed(pieces, range(len(chunks)))
    # a stop is met when it is whole; of those that are whole at once the earliest counts
    found = [len("".join(chunks[: i + 1])) for i in range(len(chunks))]
    ends = [
        (n, min(at for s in stops if (at := text[:n].find(s)) >= 0)) for n in found if any(s in text[:n] for s in stops)
    ]
    want = text[: ends[0][1]] if ends else text
    assert "".join(parts) == want
    assert pieces.stopped == bool(ends)


def test_what_may_become_a_stop_is_held_back_and_given_out_when_it_does_not():
    pieces = Pieces(by_bytes, prompt=[65], stop=["END"])
    assert [pieces.push(t) for t in b"xENx"] == ["x", "", "", "ENx"]
    assert [pieces.push(t) for t in b"EN"] == ["", ""]
    assert pieces.finish() == "EN"


def test_nothing_follows_a_stop():
    pieces = Pieces(by_bytes, prompt=[65], stop=["\n", "b\n"])
    assert [pieces.push(t) for t in b"ab\n"] == ["a", "", ""]
    assert pieces.stopped
    assert pieces.finish() == ""


def test_a_stop_that_only_the_last_bytes_make():
    """Half a character at the end becomes U+FFFD, which may be a stop, too."""
    pieces = Pieces(by_bytes, prompt=[65], stop=["\ufffd"])
    assert pieces.push(0xC3) == ""
    assert pieces.finish() == ""
    assert pieces.stopped


def test_an_empty_stop():
    with pytest.raises(DeploymentError, match="empty"):
        Pieces(by_bytes, prompt=[], stop=["a", ""])

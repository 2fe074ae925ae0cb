"""Tokens to text, piece by piece: no half characters, no half stop strings, nothing taken back.

A token is bytes of a character, or a word whose leading space depends on what stands before it. So a piece is what
the text of the last few tokens grows by when one more is decoded with them (their text alone would lose spaces), and
a text that ends in U+FFFD waits for the rest of its character. The end of the text that could be the beginning of a
stop string waits likewise. Joined, the pieces are the text of all tokens, cut before the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssh_deploy.errors import DeploymentError

#: tokens of the prompt that the first token is decoded with
CONTEXT = 6
_HALF = "\ufffd"


class Pieces:
    """The text of one answer as it grows.

    Attributes:
        stopped: a stop string was met; nothing follows.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Decode with ``decode`` what follows the tokens of ``prompt``, up to the first of the strings in ``stop``.

        Raises:
            DeploymentError: an empty stop string.
        """
        if not all(stop):
            raise DeploymentError("A stop string is empty.", hint="It would stop before the first token: leave it out.")
        self._decode, self._stop = decode, tuple(stop)
        self._tokens = list(prompt[-CONTEXT:])
        self._before = decode(self._tokens).rstrip(_HALF) if self._tokens else ""
        self._read = len(self._tokens)  # tokens whose text was given out
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What is certain of the text once ``token`` is there; often one word, sometimes nothing."""
        self._tokens.append(token)
        now = self._decode(self._tokens)
        if now.endswith(_HALF):
            return ""
        piece = now[len(self._before) :]
        self._tokens = self._tokens[self._read :]  # the next one is decoded with these
        self._read, self._before = len(self._tokens), self._decode(self._tokens)
        return self._settle(piece)

    def finish(self) -> str:
        """What was still held: half a character as U+FFFD, half a stop string as it is."""
        if self.stopped:
            return ""
        tail = self._decode(self._tokens)[len(self._before) :] if len(self._tokens) > self._read else ""
        text, self._held = self._settle(tail) + self._held, ""
        return text

    def _settle(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        waits = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - waits :]
        return text[: len(text) - waits]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

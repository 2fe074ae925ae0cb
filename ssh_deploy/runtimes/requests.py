"""One request for text: what is asked, what happens to it token by token, and what came out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeployError
from ssh_deploy.runtimes.catalogue import Loan
from ssh_deploy.runtimes.pieces import Pieces
from ssh_deploy.runtimes.sampling import Sampling, choose


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What is asked.

    Attributes:
        prompt: tokens.
        adapter: name or sum; None: the base.
        sampling: with its seed, so that the same request gives the same answer.
        most: new tokens.
        stop: strings that end the answer and are not part of it.
        stop_tokens: tokens that end the answer; their text is not part of it.
    """

    prompt: tuple[int, ...]
    adapter: str | None
    sampling: Sampling
    most: int
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]


@dataclass(frozen=True, slots=True)
class Event:
    """One token of an answer: its number, the text that is certain with it, and at the end why it ended.

    ``finish``: None while it goes on; ``stop`` (a token or string that ends it), ``length`` (as many tokens as were
    asked for, or as the model has room for), ``cancelled`` (then ``token`` is None).
    """

    token: int | None
    text: str
    finish: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """An answer: its text without the stop, all its tokens with the stop, and why it ended (see `Event`)."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    adapter: str | None
    prompt_tokens: int
    seed: int | None


class Driver(Protocol):
    """Who runs the batch that a stream is in."""

    def advance(self, stream: Stream) -> None:
        """Make a step, unless ``stream`` has something to say already."""

    def cancel(self, stream: Stream) -> None:
        """Take ``stream`` out of the batch."""


class Stream:
    """A request's events, in order, as an iterator: whoever waits for the next one drives the batch that it is in.

    Attributes:
        request: what is asked.
        tokens: chosen so far.
        finish: why it ended, or None.
        error: what ended it otherwise; raised by the iterator after the events before it.
        loan: the adapter, held while the request is in a batch.
    """

    def __init__(self, request: Request, pieces: Pieces, driver: Driver) -> None:
        """Use `Generator.submit`."""
        self.request, self.tokens = request, list[int]()
        self.finish: str | None = None
        self.error: DeployError | None = None
        self.loan: Loan | None = None
        self._pieces, self._driver = pieces, driver
        self._events: deque[Event] = deque()
        self._text: list[str] = []
        self._rng = np.random.default_rng(request.sampling.seed)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """The next event; runs the model until there is one.

        Raises:
            DeployError: the request failed; the others go on.
        """
        while not self._events:
            if self.error is not None:
                raise self.error
            if self.finish is not None:
                raise StopIteration
            self._driver.advance(self)
        return self._events.popleft()

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.finish is not None or self.error is not None

    @property
    def waits(self) -> bool:
        """Its next event has still to be made."""
        return not self._events and not self.ended

    def result(self) -> Generation:
        """The whole answer, once it is there.

        Raises:
            DeployError: the request failed.
        """
        for _ in self:
            pass
        assert self.finish is not None
        request = self.request
        return Generation(
            "".join(self._text), tuple(self.tokens), self.finish, request.adapter, len(request.prompt),
            request.sampling.seed,
        )  # fmt: skip

    def cancel(self) -> None:
        """End it before its next token and give its adapter back; nothing where it has ended."""
        self._driver.cancel(self)

    def leave(self) -> None:
        """It was cancelled; the driver's lock is held."""
        if not self.ended:
            self._say(None, self._pieces.finish(), "cancelled")

    def hear(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token from ``logits`` [vocabulary]; a failure becomes `error`."""
        request = self.request
        try:
            token = choose(logits, request.sampling, self._rng)
        except DeployError as error:
            self.error = error
            return
        self.tokens.append(token)
        if token in request.stop_tokens:
            self._say(token, self._pieces.finish(), "stop")
            return
        text = self._pieces.push(token)
        if self._pieces.stopped:
            self._say(token, text, "stop")
        elif len(self.tokens) >= request.most:
            text += self._pieces.finish()
            self._say(token, text, "stop" if self._pieces.stopped else "length")
        else:
            self._say(token, text, None)

    def _say(self, token: int | None, text: str, finish: str | None) -> None:
        self._text.append(text)
        self._events.append(Event(token, text, finish))
        self.finish = finish

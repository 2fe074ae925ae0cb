"""Generation for many requests at once, each with its own adapter; requests join and leave between steps.

    with Deployment.open("OUT") as deployment, deployment.generator() as generator:
        streams = [generator.submit("Hello", "mine"), generator.submit("Once", "mine+0.5*other")]
        for event in streams[0]:
            print(event.text, end="")

A step is one run of the model: the prompts of requests that join, all together, or else one token of every row.
Whoever waits for a stream makes the steps, under one lock; without anybody waiting nothing runs. A request holds its
adapter from joining to leaving: it is never evicted or replaced under it, and `unload` waits for it. When there is no
room for one more adapter, its request waits in line, and those behind it wait too; those in the batch go on.

What a row answers does not depend on the others: its columns of the cache are its own, its draws have their own
generator. (The last bits of its logits do: matrix products of other sizes are summed in another order.)

*Not covered:* prompts that share a beginning are read each for itself; a long prompt holds up the batch it joins.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ssh_deploy.errors import DeployError, DeploymentError
from ssh_deploy.runtimes.cache import Cache
from ssh_deploy.runtimes.catalogue import Catalogue
from ssh_deploy.runtimes.folder import Folder
from ssh_deploy.runtimes.language_model import LanguageModel
from ssh_deploy.runtimes.lending import lent_to, nothing_lent
from ssh_deploy.runtimes.pieces import Pieces
from ssh_deploy.runtimes.prompts import Prompts
from ssh_deploy.runtimes.requests import Request, Stream
from ssh_deploy.runtimes.residents import MustWaitError, Residents
from ssh_deploy.runtimes.sampling import Sampling
from ssh_deploy.runtimes.session import Session, ort_value

DEFAULT_TOKENS = 128
SIDES = ("left", "right")


class Generator:
    """Requests of one deployment, running and waiting. Safe from several threads."""

    def __init__(
        self,
        folder: Folder,
        session: Session,
        catalogue: Catalogue,
        residents: Residents,
        *,
        prompts: Prompts,
        rows: int,
        padding: str,
    ) -> None:
        """Use `Deployment.generator`."""
        if folder.decoder is None:
            raise DeploymentError(
                f"{folder.root}: a {folder.task} model does not go on from a prompt.",
                hint="It answers texts: `.predict(texts, adapters)`, `ssh-deploy run --text`.",
            )
        if rows < 1 or padding not in SIDES:
            raise DeploymentError(
                f"A generator of {rows} rows, padded {padding!r}.", hint="Give at least one row, left or right."
            )
        if folder.decoder.window is not None and padding == "right":
            raise DeploymentError(
                f"{folder.root}: its tokens see {folder.decoder.window} columns of the cache, padding counted.",
                hint="Leave the padding left: it lies before everything a row sees.",
            )
        self._folder, self._decoder = folder, folder.decoder
        self._model = LanguageModel(session, folder.decoder)
        self._catalogue, self._residents, self._prompts = catalogue, residents, prompts
        self._rows, self._padding = rows, padding
        self._waiting: deque[Stream] = deque()
        self._active: list[Stream] = []
        self._cache: Cache | None = None
        self._lent: Mapping[str, Any] | None = None  # of those that run; made anew when rows change
        self._full = False  # until something is given back, there is no room for the next one's adapter
        self._stepping = threading.Lock()
        self._closed = False

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def running(self) -> int:
        """Requests in the batch now."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    def submit(
        self,
        prompt: str | Sequence[int],
        adapter: str | None = None,
        *,
        chat: bool = False,
        max_new_tokens: int = DEFAULT_TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Collection[int] = (),
        ignore_eos: bool = False,
    ) -> Stream:
        """Put a request in line; it joins the batch at the next step that has room.

        Args:
            prompt: text, or tokens.
            adapter: name or sum; None: the base.
            chat: put ``prompt`` into the model's chat template as what the user says.
            max_new_tokens: at most; fewer where the model's context ends.
            sampling: None takes the best token each time.
            stop: strings that end the answer and are not part of it.
            stop_tokens: tokens that do, besides those of the model.
            ignore_eos: go on after the model's own, as when lengths must be equal.

        Raises:
            UnknownNameError: no such adapter.
            DeploymentError: an empty prompt, one that leaves no room in the context, or none to generate.
            DependencyError: ``chat`` without jinja2.
        """
        if self._closed:
            raise DeploymentError("The generator was closed.", hint="Make another: `.generator()`.")
        if max_new_tokens < 1:
            raise DeploymentError(f"max_new_tokens is {max_new_tokens}.", hint="Give at least 1.")
        if adapter is not None:
            self._catalogue.check(adapter)
        tokens = tuple(self._prompts.encode(prompt, chat=chat) if isinstance(prompt, str) else prompt)
        if not tokens or not all(0 <= token < self._model.vocabulary for token in tokens):
            raise DeploymentError(
                f"The prompt is {list(tokens)[:8]}…, no tokens of a vocabulary of {self._model.vocabulary:,}.",
                hint="Give a text, or at least one token to go on from.",
            )
        context = self._decoder.context
        if context is not None and len(tokens) >= context:
            raise DeploymentError(
                f"The prompt has {len(tokens):,} tokens; the model's context of {context:,} holds prompt and answer.",
                hint=f"Give at most {context - 1:,}.",
            )
        sampling = sampling or Sampling()
        if not sampling.greedy and sampling.seed is None:  # so that the answer says how to get it again
            sampling = replace(sampling, seed=secrets.randbits(32))
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(tokens))
        stops = frozenset({*(() if ignore_eos else self._decoder.eos), *stop_tokens})
        request = Request(tokens, adapter, sampling, room, tuple(stop), stops)
        stream = Stream(request, Pieces(self._prompts.decode, prompt=tokens, stop=request.stop), self)
        self._waiting.append(stream)
        return stream

    def step(self) -> bool:
        """Run the model once; False when there was nothing to do."""
        with self._stepping:
            return self._step()

    def close(self) -> None:
        """Cancel what runs and waits, and give its adapters back."""
        with self._stepping:
            self._closed = True
            for stream in [*self._active, *self._waiting]:
                stream.leave()
            self._waiting.clear()
            self._retire()

    def advance(self, stream: Stream) -> None:
        """What a `Stream` asks for when it has nothing to say."""
        with self._stepping:
            if stream.waits:
                self._step()

    def cancel(self, stream: Stream) -> None:
        """What `Stream.cancel` does."""
        with self._stepping:
            stream.leave()
            self._retire()

    def _step(self) -> bool:
        joining = self._admit()
        if joining:
            self._join(joining)
        elif self._active:
            self._go_on()
        return bool(joining or self._active or self._waiting)

    def _admit(self) -> list[Stream]:
        """Requests whose turn it is, each with its adapter held."""
        joining: list[Stream] = []
        while self._waiting and not self._full and len(self._active) + len(joining) < self._rows:
            stream = self._waiting[0]
            if not stream.ended:
                try:
                    stream.loan = self._catalogue.borrow([stream.request.adapter], wait=not (self._active or joining))
                    joining.append(stream)
                except MustWaitError:
                    self._full = True
                    break
                except DeployError as error:
                    stream.error = error
            self._waiting.popleft()
        return joining

    def _join(self, joining: list[Stream]) -> None:
        """Read the prompts of ``joining``, choose the first token of each, and put them beside those that run."""
        prompts = [stream.request.prompt for stream in joining]
        with self._failing(joining):
            logits, cache = self._model.prefill(prompts, self._feeds(joining), padding=self._padding)
            for stream, row in zip(joining, logits, strict=True):
                stream.hear(row)
            self._cache = cache if self._cache is None else self._cache.beside(cache)
            self._active += joining
            self._lent = None

    def _go_on(self) -> None:
        """One more token for every row."""
        assert self._cache is not None
        with self._failing(self._active):
            if self._lent is None:
                self._lent = {name: ort_value(fed) for name, fed in self._feeds(self._active).items()}
            tokens = [stream.tokens[-1] for stream in self._active]
            logits, self._cache = self._model.step(tokens, self._cache, self._lent)
            for stream, row in zip(self._active, logits, strict=True):
                stream.hear(row)

    def _feeds(self, streams: Sequence[Stream]) -> dict[str, Any]:
        """What the graph is fed for the adapters of ``streams``."""
        banks, names = self._residents.banks, [stream.request.adapter for stream in streams]
        loans = [stream.loan.contents if stream.loan else {} for stream in streams]
        contents = [None if name is None else loan[name] for loan, name in zip(loans, names, strict=True)]
        lent = lent_to(names, contents, banks, self._folder, logits=False, headed=False)
        return nothing_lent(self._folder, banks) | lent.parts[0].feeds

    def _retire(self) -> None:
        """Let go of rows that ended: their adapters, their columns of the cache."""
        keep = [i for i, stream in enumerate(self._active) if not stream.ended]
        if len(keep) == len(self._active):
            return
        self._give_back([stream for stream in self._active if stream.ended])
        self._active = [self._active[i] for i in keep]
        self._cache = self._cache.only(keep) if keep and self._cache else None
        self._lent = None

    def _give_back(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            if stream.loan is not None:
                stream.loan.give_back()
                stream.loan = None
        self._full = False

    @contextmanager
    def _failing(self, streams: Sequence[Stream]) -> Iterator[None]:
        """Rows that ended leave; where something fails, all of ``streams`` end with it and the others go on."""
        try:
            yield
        except BaseException as error:
            for stream in streams:
                if not stream.ended:
                    stream.error = error if isinstance(error, DeployError) else _interrupted()
            self._give_back(streams)
            if not isinstance(error, DeployError):
                raise
        finally:
            self._retire()


def _interrupted() -> DeploymentError:
    return DeploymentError("The batch was interrupted.", hint="Ask again.")

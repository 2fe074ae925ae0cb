"""Models that are timed, all opened anew now and then, in another order, and warm before anything counts.

Where the weights of a session come to lie in memory moves its times by up to 3 %, as long as it is open, and who was
opened first is the slower. So a figure is of several sessions of each model, and of several openings of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from ssh_deploy.jobs.timing import Variant

#: Rounds that sessions are kept open for.
ROUNDS = 16
T = TypeVar("T")


@dataclass(slots=True)
class Openings(Generic[T]):
    """Models by form, ``count`` of each, all opened anew after every `ROUNDS` rounds; a context.

    ``opens`` opens one of a form into a stack. What ``ending`` holds is called before they are closed.
    """

    opens: Callable[[ExitStack, str], T]
    count: int
    ending: list[Callable[[], None]] = field(default_factory=list)
    _opened: dict[str, list[T]] = field(default_factory=dict, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _turn: int | None = field(default=None, init=False)

    def __enter__(self) -> Openings[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def of(self, form: str) -> list[T]:
        """Those of ``form`` that are open: the same list always."""
        if form not in self._opened:
            self._opened[form] = [self.opens(self._stack, form) for _ in range(self.count)]
        return self._opened[form]

    def renew(self, i: int) -> bool:
        """Whether round ``i`` is the first of its `ROUNDS`; all but the first time, everything was opened anew then."""
        before, self._turn = self._turn, i // ROUNDS
        if self._turn == before:
            return False
        if before is not None:
            self._close()
            places = [(form, k) for form, opened in self._opened.items() for k in range(len(opened))]
            np.random.default_rng(i).shuffle(places)
            for form, k in places:
                self._opened[form][int(k)] = self.opens(self._stack, form)
        return True

    def before(self, variants: Mapping[str, Variant], *, times: int) -> dict[str, Variant]:
        """``variants``, to be run before those timed; at the first of its `ROUNDS`, all of them ``times`` times.

        What runs for the first time is slower.
        """

        def run(name: str, i: int) -> None:
            if self.renew(i):
                for each in variants.values():
                    for k in range(times):
                        each(i + k)
            variants[name](i)

        return {name: partial(run, name) for name in variants}

    def _close(self) -> None:
        for end in self.ending:
            end()
        self._stack.close()

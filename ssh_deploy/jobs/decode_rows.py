"""Rows of a batch on deployments that take turns: what `bench decode` times, and their answers checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssh_deploy.errors import VerificationError
from ssh_deploy.jobs.reopening import Openings
from ssh_deploy.jobs.timing import spun_down
from ssh_deploy.runtimes.deployment import Deployment
from ssh_deploy.runtimes.generator import Generator

_ENDLESS = 1 << 20
_APART = 1e-3  # of the largest logit
#: Of the largest logit: how far a row of a mixed batch may be from the same row alone. Quantised products of one row
#: and of eight go through other kernels.
_CLOSE = {"f32": 1e-4, "int8": 5e-2, "int4": 5e-2}


@dataclass(slots=True)
class Rows:
    """Rows of a batch on some deployments that take turns: filled, brought to a length, stepped."""

    deployments: Sequence[Deployment]
    adapters: Sequence[str | None]
    tokens: int
    stride: int = 1
    _generator: Generator | None = field(default=None, init=False)

    def close(self) -> None:
        """Give the adapters back; the next `fill` starts anew."""
        if self._generator is not None:
            self._generator.close()
        self._generator = None

    def fill(self, i: int) -> None:
        """Requests in line, none running yet; round ``i`` is the turn of one of the deployments."""
        self.close()
        turns = len(self.deployments)
        deployment = self.deployments[(i + (i // turns) * (self.stride - 1)) % turns]
        self._generator = deployment.generator(rows=len(self.adapters))
        for row, name in enumerate(self.adapters):
            prompt = [(7 + 3 * k + row) % 256 for k in range(self.tokens)]
            self._generator.submit(prompt, name, max_new_tokens=_ENDLESS, ignore_eos=True)

    def step(self, i: int) -> None:
        """One token of every row, or their prompts when they were only filled."""
        if self._generator is None:
            self.fill(i)
        assert self._generator is not None
        self._generator.step()

    def ready_to_decode(self, i: int) -> None:
        """Filled, prompts read, and stepped until other sessions' threads have stopped."""
        self.fill(i)
        self.step(i)
        spun_down(self.step, i)

    def ready_to_read(self, i: int) -> None:
        """Prompts read until other sessions' threads have stopped, then filled again."""
        spun_down(self.ready_once, i)
        self.fill(i)

    def ready_once(self, i: int) -> None:
        """Filled, prompts read."""
        self.fill(i)
        self.step(i)


def run_on(
    openings: Openings[Deployment], form: str, adapters: Sequence[str | None], tokens: int, *, stride: int = 1
) -> Rows:
    """Rows on the deployments of ``form`` that are open, closed before those are."""
    rows = Rows(openings.of(form), adapters, tokens, stride)
    openings.ending.append(rows.close)
    return rows


def check_rows(plain: Deployment, variants: Mapping[str, Rows], precision: str) -> None:
    """No adapter is the plain model bit for bit; every row is what its adapter answers alone, and not the base.

    Raises:
        VerificationError: which variant is not.
    """
    for name, rows in variants.items():
        deployment, adapters = rows.deployments[0], list(rows.adapters)
        feeds = _feeds(deployment, len(adapters))
        want = plain.run(feeds, outputs=["logits"])["logits"]
        got = deployment.run(feeds, adapters, outputs=["logits"])["logits"]
        if not any(adapters):
            if want.tobytes() != got.tobytes():
                raise VerificationError(f"{name}: no adapter is not the plain model.", hint="Report this graph.")
            continue
        scale = float(np.abs(want).max())
        for row, adapter in enumerate(adapters):
            own = {key: array[row : row + 1] for key, array in feeds.items()}
            alone = deployment.run(own, adapter, outputs=["logits"])["logits"][0]
            if np.abs(alone - got[row]).max() > _CLOSE[precision] * scale:
                raise VerificationError(f"{name}: row {row} is not what {adapter} answers alone.", hint="Report this.")
            if np.abs(want[row] - got[row]).max() < _APART * scale:
                raise VerificationError(f"{name}: row {row} answers as the base.", hint="Report this.")


def _feeds(deployment: Deployment, rows: int, tokens: int = 6) -> dict[str, Any]:
    """Prompts of ``rows`` rows and no past, for `Deployment.run`."""
    decoder = deployment.folder.decoder
    assert decoder is not None
    past = np.zeros((rows, decoder.kv_heads, 0, decoder.head_dim), np.float32)
    every = {
        "input_ids": np.random.default_rng(0).integers(5, 250, (rows, tokens)),
        "attention_mask": np.ones((rows, tokens), np.int64),
        "position_ids": np.tile(np.arange(tokens), (rows, 1)),
    }
    return {name: past if name in decoder.past else every[name] for name in deployment.inputs}

"""The next token from logits: the best, or one drawn at a temperature from the likeliest (top-k, then top-p).

    p = softmax(logits / temperature), of the ``top_k`` highest logits
    of these the likeliest, in order, until what came before them reaches ``top_p`` (Holtzman et al. 2020, nucleus)

in float64, in the order that transformers applies them (temperature, top-k, top-p). Logits equal to the k-th highest
stay, as there. A token is one uniform draw from the request's own generator, so that what a seed gives does not
depend on who else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the best token; the higher, the flatter.
        top_k: likeliest tokens to draw from; 0: all.
        top_p: their probability in (0, 1]; 1: all.
        seed: of the draws, 0 or more; None: another each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            DeploymentError: a number that says nothing.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise DeploymentError(f"temperature is {self.temperature}.", hint="Give 0 (the best token) or more.")
        if self.top_k < 0:
            raise DeploymentError(f"top_k is {self.top_k}.", hint="Give 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise DeploymentError(f"top_p is {self.top_p}.", hint="Give more than 0, at most 1 (all tokens).")
        if self.seed is not None and self.seed < 0:
            raise DeploymentError(f"seed is {self.seed}.", hint="Give 0 or more.")

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature == 0


def choose(logits: NDArray[np.floating], sampling: Sampling, rng: np.random.Generator) -> int:
    """A token for ``logits`` [vocabulary]; of equally good ones the first.

    Raises:
        DeploymentError: NaN or +∞ among them, of which any choice would be an accident.
    """
    best = int(logits.argmax())  # of NaN, if there is one
    if not math.isfinite(float(logits[best])):
        raise DeploymentError(
            f"The model answered {float(logits[best])} for token {best}.",
            hint="Its numbers overflow on this text: the adapter is damaged or its training diverged.",
        )
    if sampling.greedy:
        return best
    tokens, mass = distribution(logits, sampling)
    cumulative = np.cumsum(mass)
    at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(tokens[min(at, len(tokens) - 1)])


def distribution(logits: NDArray[np.floating], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be drawn, the likeliest first (in order of their number without top-p), and their probabilities.

    ``sampling`` has a temperature above 0; ``logits`` [vocabulary] has a highest that is finite.
    """
    tokens = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        least = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        tokens = np.flatnonzero(logits >= least)
    chosen = logits[tokens].astype(np.float64)
    mass = np.exp((chosen - chosen.max()) / sampling.temperature)
    mass /= mass.sum()
    if sampling.top_p < 1:
        # all tokens of mass below (1 − top_p) / count together weigh less than 1 − top_p: none of them is needed
        likely = np.flatnonzero(mass >= (1 - sampling.top_p) / len(mass) * (1 - 1e-9))
        likely = likely[np.argsort(-mass[likely], kind="stable")]
        before = np.cumsum(mass[likely]) - mass[likely]
        likely = likely[: max(1, int(np.searchsorted(before, sampling.top_p, side="left")))]
        tokens, mass = tokens[likely], mass[likely] / mass[likely].sum()
    return tokens, mass

"""Greedy decoding of prompts by whatever answers a decoder's inputs: torch or a graph, the same loop for both.

Prompts are padded in front to one length, and every step feeds the cache of the step before: what is compared with it
is the prompt, the cache, the mask and the positions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.graph.kv_cache import CacheShape
from ssh_deploy.jobs.verdict import Run


@dataclass(frozen=True, slots=True, eq=False)
class Greedy:
    """``tokens`` int64 [prompts, new]; ``gaps`` f64 [prompts, new]: logit of the chosen token above the second's."""

    tokens: NDArray[np.int64]
    gaps: NDArray[np.float64]


def prompt_inputs(prompts: Sequence[Sequence[int]], shape: CacheShape, *, positions: bool) -> dict[str, NDArray[Any]]:
    """Inputs of a decoder for ``prompts`` with nothing in the cache, padded in front.

    Args:
        prompts: token ids, none empty.
        shape: of the cache.
        positions: whether the decoder takes ``position_ids``.
    """
    longest = max(map(len, prompts))
    ids = np.array([[*[0] * (longest - len(p)), *p] for p in prompts], np.int64)
    mask = np.array([[*[0] * (longest - len(p)), *[1] * len(p)] for p in prompts], np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if positions:
        inputs["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
    nothing = np.zeros((len(prompts), shape.kv_heads, 0, shape.head_dim), np.float32)
    return inputs | dict.fromkeys(shape.inputs, nothing)


def continue_greedily(
    run: Run, prompts: Sequence[Sequence[int]], shape: CacheShape, *, new: int, positions: bool
) -> Greedy:
    """``new`` tokens behind each of ``prompts``, ends of texts not heeded; other arguments as `prompt_inputs`."""
    feeds = prompt_inputs(prompts, shape, positions=positions)
    tokens, gaps = [], []
    for _ in range(new):
        (answer,) = run([feeds])
        last = answer["logits"][:, -1].astype(np.float64)
        second, first = np.partition(last, -2, axis=-1)[:, -2:].T
        chosen = last.argmax(-1)
        tokens.append(chosen)
        gaps.append(first - second)
        mask = np.pad(feeds["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
        cache = dict(zip(shape.inputs, (answer[name] for name in shape.outputs), strict=True))
        feeds = {"input_ids": chosen[:, None], "attention_mask": mask} | cache
        if positions:
            feeds["position_ids"] = mask.sum(1, keepdims=True) - 1
    return Greedy(np.stack(tokens, axis=1), np.stack(gaps, axis=1))


def divergences(got: Greedy, want: Greedy, *, tie: float) -> tuple[int, int]:
    """Prompts whose tokens are the same, and those that part where ``want`` was clearly of another mind.

    Tokens behind the first difference follow from it and are not looked at. A difference where the first two logits of
    ``want`` lie within ``tie`` is a tie that rounding decides.
    """
    same, apart = 0, 0
    for mine, theirs, gaps in zip(got.tokens, want.tokens, want.gaps, strict=True):
        places = np.flatnonzero(mine != theirs)
        same += not places.size
        apart += bool(places.size and gaps[places[0]] > tie)
    return same, apart

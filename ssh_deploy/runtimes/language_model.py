"""A decoder's graph as a function: tokens and a cache in, logits of each row's last token and the longer cache out.

The graph's names are the field's (optimum, onnxruntime-genai): ``input_ids`` [batch, tokens], ``attention_mask``
[batch, past + tokens], ``position_ids`` [batch, tokens] where the model has them, ``past_key_values.{i}.key|value``
[batch, kv_heads, past, head_dim]; ``logits`` [batch, tokens, vocabulary] and ``present.{i}.key|value``.

Of a prompt only the last token's logits are wanted. A graph with ``logits_at`` [batch, 1] is told so; others give
all, so prompts are read in chunks whose logits take at most 64 MiB. In any case a chunk has at most 2,048 tokens over
all rows, which bounds what attention takes; the weights are read once more for each further chunk.

Graphs of onnxruntime-genai's builder keep a packed cache: GroupQueryAttention takes a row's length from the sum of its
mask, puts the new token right behind, and reads further chunks of a prompt for one row only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.cache import Cache
from ssh_deploy.runtimes.folder import Decoder
from ssh_deploy.runtimes.session import Session, ort_value

LOGITS, IDS, MASK, POSITIONS = "logits", "input_ids", "attention_mask", "position_ids"
_MOST_LOGITS = 64 << 20  # bytes
_MOST_TOKENS = 2048


class LanguageModel:
    """The graph of a decoder, and the names of its cache.

    Attributes:
        vocabulary: tokens that it has logits for.
    """

    def __init__(self, session: Session, decoder: Decoder) -> None:
        """Bind to ``session``.

        Raises:
            DeploymentError: it is not the graph that ``decoder`` describes.
        """
        self._session, self._decoder = session, decoder
        sides = {1: decoder.kv_heads, 3: decoder.head_dim}
        strange = sorted(set(session.inputs) - {IDS, MASK, POSITIONS, *decoder.past, decoder.logits_at})
        lacks = sorted({IDS, MASK, *decoder.past} - set(session.inputs))
        lacks += sorted({LOGITS, *decoder.present} - set(session.outputs))
        if (
            strange
            or lacks
            or any(
                _other(session.inputs[name].shape[axis], side) for name in decoder.past for axis, side in sides.items()
            )
        ):
            said = [f"takes {', '.join(strange)}"] * bool(strange) + [f"lacks {', '.join(lacks)}"] * bool(lacks)
            raise DeploymentError(
                f"The model {' and '.join(said) or 'has a cache of other sides'}: it is not the decoder that "
                "deployment.json describes.",
                hint="Export the checkpoint again with `ssh-deploy export --onnx`.",
            )
        self.vocabulary = int(session.output_shapes[LOGITS][2])

    def prefill(
        self, prompts: Sequence[Sequence[int]], lent: Mapping[str, Any], *, padding: str = "left"
    ) -> tuple[NDArray[np.float32], Cache]:
        """Read ``prompts``, one row each; returns logits [rows, vocabulary] of their last tokens, and their cache.

        Args:
            prompts: tokens, at least one each.
            lent: feeds for adapters.
            padding: where shorter prompts are filled up, ``left`` or ``right``; the answers are the same. A packed
                cache has it right.
        """
        padding = "right" if self._decoder.packed else padding
        rows, longest = len(prompts), max(map(len, prompts))
        ids, mask = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.bool_)
        for i, prompt in enumerate(prompts):
            where = slice(longest - len(prompt), None) if padding == "left" else slice(len(prompt))
            ids[i, where], mask[i, where] = prompt, True
        last = longest - 1 - mask[:, ::-1].argmax(axis=1)
        cache = Cache(tuple(ort_value(array) for array in self._nothing(rows)), mask[:, :0], self._decoder.packed)
        answer = np.empty((rows, self.vocabulary), np.float32)
        step = _MOST_TOKENS // rows
        if self._decoder.logits_at is None:
            step = min(step, _MOST_LOGITS // (4 * rows * self.vocabulary))
        step = longest if self._decoder.packed and rows > 1 else max(step, 1)
        for start in range(0, longest, step):
            chunk = slice(start, min(start + step, longest))
            at = np.clip(last - start, 0, chunk.stop - start - 1)  # of rows that do not end here, any will do
            logits, cache = self._run(ids[:, chunk], mask[:, chunk], cache, lent, at=at)
            ends = (last >= chunk.start) & (last < chunk.stop)
            answer[ends] = logits[ends]
        return answer, cache

    def step(self, tokens: Sequence[int], cache: Cache, lent: Mapping[str, Any]) -> tuple[NDArray[np.float32], Cache]:
        """Read one more token of each row; returns logits [rows, vocabulary] and the cache with them."""
        ids = np.array(tokens, np.int64)[:, None]
        return self._run(ids, np.ones(ids.shape, np.bool_), cache, lent, at=np.zeros(len(ids), np.int64))

    def _run(
        self,
        ids: NDArray[np.int64],
        own: NDArray[np.bool_],
        cache: Cache,
        lent: Mapping[str, Any],
        *,
        at: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], Cache]:
        """Read ``ids`` [rows, tokens], where ``own`` is no padding; logits [rows, vocabulary] of the tokens ``at``."""
        mask = np.concatenate([cache.mask, own], axis=1)
        if cache.packed:
            mask = np.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True)
        feeds: dict[str, Any] = {IDS: ids, MASK: mask.astype(np.int64)}
        if POSITIONS in self._session.inputs:
            feeds[POSITIONS] = np.maximum(cache.lengths[:, None] + own.cumsum(axis=1) - 1, 0)
        if self._decoder.logits_at is not None and ids.shape[1] > 1:
            feeds[self._decoder.logits_at] = at[:, None]
        feeds |= zip(self._decoder.past, cache.values, strict=True)
        answers, present = self._session.run_kept(feeds | dict(lent), [LOGITS], kept=self._decoder.present)
        logits = answers[LOGITS]
        last = logits[:, 0] if logits.shape[1] == 1 else logits[np.arange(len(ids)), at]
        return last, Cache(tuple(present), mask, cache.packed)

    def _nothing(self, rows: int) -> list[NDArray[Any]]:
        """A past of no tokens for each input of it."""
        sides = (rows, self._decoder.kv_heads, 0, self._decoder.head_dim)
        return [np.zeros(sides, self._session.inputs[name].dtype) for name in self._decoder.past]


def _other(side: int | str | None, size: int) -> bool:
    """A side that the graph fixes is not ``size``."""
    return isinstance(side, int) and side != size

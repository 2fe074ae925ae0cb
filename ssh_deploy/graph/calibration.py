"""What a decoder's layers read, without any data: the second moments of their inputs on text that it wrote itself.

A base model comes without the text it was trained on, but it can write some: sampled token by token from its own
distribution, every row from another random start (LLM-QAT, Liu et al. 2023, section 3.1). On SmolLM2-135M, 16 rows of
256 tokens halve what 4 bits cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Tokens of a row, where the context holds as many.
LENGTH = 256
_ROWS = 4  # of one pass
_ROOM = 1 << 30  # bytes of moments held at a time


def written_tokens(model: Any, *, rows: int, seed: int = 0) -> Any:
    """Token ids that ``model`` writes, int64 torch [rows, tokens]; the same again for the same ``seed``.

    Args:
        model: a causal language model of transformers with a cache.
        rows: how many texts.
        seed: of the starts and of the sampling.
    """
    import torch

    length = min(LENGTH, int(getattr(model.config, "max_position_embeddings", None) or LENGTH))
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (rows, 1), generator=random)
    past = None
    with torch.no_grad():
        for _ in range(length - 1):
            answer = model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
            past = answer.past_key_values
            chances = torch.softmax(answer.logits[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=random)], 1)
    return ids


class Moments:
    """Second moments by module, from as many passes over the tokens as their bytes need."""

    def __init__(
        self, model: Any, tokens: Any, *, wanted: Callable[[str], bool] = lambda module: True, room: int = _ROOM
    ) -> None:
        """Look at ``model`` of transformers.

        Args:
            model: whose layers read.
            tokens: int64 torch [rows, tokens].
            wanted: of a module's path, whether it will be asked for.
            room: most bytes held at a time.
        """
        import torch

        self._model, self._tokens, self._room = model, tokens, room
        sides = {name: (module, _side(module, torch)) for name, module in model.named_modules() if wanted(name)}
        self._linear = {name: (module, side) for name, (module, side) in sides.items() if side is not None}
        self._found: dict[str, Any] = {}

    def __call__(self, module: str) -> NDArray[np.float32] | None:
        """Σ x xᵀ over all tokens that ``module`` read, f32 [in, in]; None for what is no linear layer wanted."""
        if module not in self._linear:
            return None
        if module not in self._found:
            self._collect(module)
        moments: NDArray[np.float32] = self._found[module].numpy()
        return moments

    def _collect(self, first: str) -> None:
        """The moments of ``first`` and of as many modules after it as there is room for."""
        import torch

        self._found, room = {}, self._room
        hooks: list[Any] = []
        names = list(self._linear)
        for name in names[names.index(first) :]:
            module, side = self._linear[name]
            room -= 4 * side * side
            if room < 0 and hooks:
                break
            self._found[name] = torch.zeros(side, side)
            hooks.append(module.register_forward_pre_hook(self._added(name)))
        try:
            with torch.no_grad():
                for part in self._tokens.split(_ROWS):
                    self._model(input_ids=part)
        finally:
            for hook in hooks:
                hook.remove()

    def _added(self, name: str) -> Any:
        def add(_module: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            self._found[name] += x.T @ x

        return add


def _side(module: Any, torch: Any) -> int | None:
    """Width of what a linear layer reads; None for other modules."""
    if isinstance(module, torch.nn.Linear):
        return int(module.in_features)
    return int(module.weight.shape[0]) if type(module).__name__ == "Conv1D" else None  # GPT-2 stores [in, out]

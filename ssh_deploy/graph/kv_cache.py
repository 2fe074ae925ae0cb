"""The KV cache of a decoder as the field names it: flat tensors in, flat tensors out, and inputs to try one with.

`torch.onnx.export` takes no `DynamicCache` as an argument, so the traced wrapper takes `past_key_values.{i}.key` and
`.value`, [batch, kv_heads, past, head_dim] each, makes the cache of them and gives `present.{i}.key` and `.value` with
the new tokens behind the old. What a model keeps is found by asking it: two tokens are run, and what lies in the cache
then is the shape of it. Models that keep something else (a state, a window, nothing at all) are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssh_deploy.errors import GraphError

PAST, PRESENT = "past_key_values", "present"
PARTS = ("key", "value")


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What every layer keeps of every token: two tensors [kv_heads, head_dim].

    ``window``: columns of the cache that a token sees at most in some layers, itself included; None where it sees all.
    """

    layers: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the past, layer by layer, key before value."""
        return tuple(f"{PAST}.{i}.{part}" for i in range(self.layers) for part in PARTS)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of past and new tokens together, in the same order."""
        return tuple(f"{PRESENT}.{i}.{part}" for i in range(self.layers) for part in PARTS)


def cache_shape(model: Any) -> CacheShape:
    """What ``model`` keeps.

    Args:
        model: a causal language model of transformers.

    Raises:
        GraphError: it keeps no plain KV cache, or a token's answer depends on tokens behind it.
    """
    import torch

    tokens = torch.tensor([[0, 0], [0, 1]])
    name, hint = type(model).__name__, "Only decoders with one KV cache of keys and values can be exported."
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "attention_mask"} <= set(parameters):
        raise GraphError(f"{name} takes no past_key_values.", hint=hint)
    cache = make_cache({})
    with torch.no_grad():
        answer = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, use_cache=True)
    shapes = {tuple(getattr(layer, f"{part}s").shape) for layer in cache.layers for part in PARTS if _filled(layer)}
    filled = [_filled(layer) for layer in cache.layers]
    if not filled or not all(filled) or len(shapes) != 1 or [*next(iter(shapes))[::2]] != [2, 2]:
        raise GraphError(
            f"{name} keeps {sum(filled)} layers of shapes {sorted(shapes)} after two tokens, not one KV cache.",
            hint=hint,
        )
    first, second = answer.logits[:, 0]
    if not torch.allclose(first, second, atol=1e-4):
        raise GraphError(f"{name} is not causal: its answer to a token depends on the next one.", hint=hint)
    _, kv_heads, _, head_dim = next(iter(shapes))
    return CacheShape(len(filled), kv_heads, head_dim, _window(model.config))


def make_cache(tensors: Mapping[str, Any]) -> Any:
    """A `DynamicCache` of the past among ``tensors`` (inputs by name), all of it: windows are left to the mask."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(sum(name.startswith(f"{PAST}.") for name in tensors) // 2):
        cache.update(tensors[f"{PAST}.{i}.key"], tensors[f"{PAST}.{i}.value"], i)
    return cache


def cache_tensors(cache: Any) -> dict[str, Any]:
    """Tensors of ``cache`` under their output names."""
    return {
        f"{PRESENT}.{i}.{part}": getattr(layer, f"{part}s") for i, layer in enumerate(cache.layers) for part in PARTS
    }


def decoder_inputs(
    model: Any, shape: CacheShape, *, batch: int = 2, tokens: int = 3, past: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Random inputs of a decoder by name; the last row is padded: in front where there is a past, else behind.

    Args:
        model: a causal language model of transformers.
        shape: of its cache.
        batch: rows.
        tokens: new ones a row.
        past: tokens a row that the cache holds.
        seed: of the numbers.
    """
    import torch

    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), generator=made)
    mask = torch.ones((batch, past + tokens), dtype=torch.int64)
    if batch > 1 and past > 1:
        mask[-1, : past // 2] = 0
    elif batch > 1 and tokens > 2:
        mask[-1, tokens - tokens // 3 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:].contiguous()
    sides = (batch, shape.kv_heads, past, shape.head_dim)
    return inputs | {name: torch.randn(sides, generator=made) for name in shape.inputs}


def _window(config: Any) -> int | None:
    size, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return int(size) if size and (kinds is None or "sliding_attention" in kinds) else None


def _filled(layer: Any) -> bool:
    return all(getattr(getattr(layer, f"{part}s", None), "ndim", 0) == 4 for part in PARTS)

"""Text that a decoder writes for itself, and the moments of what its layers read."""

import numpy as np
import pytest
import torch

from ssh_deploy.graph.blockwise import quantize_blocks
from ssh_deploy.graph.calibration import Moments, written_tokens


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sides = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 97, "max_position_embeddings": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sides, **heads)).eval()


def test_the_text_fits_the_context_and_is_the_seeds(model):
    ids = written_tokens(model, rows=5, seed=3)
    assert ids.shape == (5, 24)
    assert (ids >= 0).all()
    assert (ids < 97).all()
    assert torch.equal(ids, written_tokens(model, rows=5, seed=3))
    assert not torch.equal(ids, written_tokens(model, rows=5, seed=4))
    assert len({tuple(row) for row in ids.tolist()}) == 5


def test_the_text_is_drawn_from_the_models_own_distribution(model):
    """A model that knows one next token for each writes it."""
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight *= 1e4
    ids = written_tokens(model, rows=2)
    want = model(input_ids=ids).logits.argmax(-1)[:, :-1]
    with torch.no_grad():
        model.lm_head.weight.copy_(kept)
    assert torch.equal(ids[:, 1:], want)


@pytest.mark.parametrize("room", [1 << 30, 1])
def test_the_moments_are_those_of_what_each_layer_read(model, room):
    ids = written_tokens(model, rows=6)
    read = {}
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: read.update(down=x[0].detach()))
    model(input_ids=ids)
    hook.remove()
    moments = Moments(model, ids, room=room)
    first = moments("model.layers.0.self_attn.q_proj")
    found = moments("model.layers.1.mlp.down_proj")
    x = read["down"].double().reshape(-1, 64)
    np.testing.assert_allclose(found, (x.T @ x).numpy(), rtol=1e-4, atol=1e-6)
    assert first.shape == (32, 32)
    assert moments("model.layers.0.self_attn.q_proj").tobytes() == first.tobytes()
    assert moments("model.embed_tokens") is None
    assert moments("nowhere") is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_not_wanted_is_not_collected(model):
    moments = Moments(model, written_tokens(model, rows=2), wanted=lambda name: name.endswith("q_proj"))
    assert moments("model.layers.0.self_attn.q_proj").any()
    assert moments("model.layers.0.mlp.down_proj") is None
    assert len(moments._found) == 2


def test_rounding_by_what_a_layer_reads_answers_better_on_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 96)) + 0.1 * rng.normal(size=(400, 96))
    weight = rng.normal(size=(20, 96)).astype(np.float32)
    right = x @ weight.T

    def wrong(**how):
        return np.square(x @ quantize_blocks(weight, bits=4, block=32, **how).dense().T - right).mean()

    assert wrong(moments=x.T @ x) < 0.3 * wrong()


@pytest.mark.parametrize("cols", [40, 64])
def test_inputs_without_any_relation_are_rounded_to_the_nearest(cols):
    weight = np.random.default_rng(1).normal(size=(7, cols)).astype(np.float32)
    plain = quantize_blocks(weight, bits=4, block=16)
    same = quantize_blocks(weight, bits=4, block=16, moments=np.eye(cols))
    silent = quantize_blocks(weight, bits=4, block=16, moments=np.zeros((cols, cols)))
    for name in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(same, name))
        np.testing.assert_array_equal(getattr(plain, name), getattr(silent, name))

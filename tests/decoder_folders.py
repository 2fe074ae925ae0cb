"""A pico decoder (grouped heads, tied embeddings, bytes as tokens) exported with adapters, and torch beside it."""

import json

import numpy as np

from ssh_deploy.adapters.file import write_file
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.orientation import site_shape
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.testing import random_adapter

VOCABULARY, CONTEXT, EOS = 320, 96, 1
ENDS = ("q_proj", "v_proj", "down_proj")
ADAPTERS = ("red", "green", "blue")
_TEXTS = ["the quick brown fox jumps over the lazy dog", "when is the end of the end", "héé世界"] * 4
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pico_decoder(folder, *, seed=0, **fields):
    """Save a random LLaMA of 2 layers with its byte-level tokenizer and chat template; returns its folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=EOS, pad_token_id=2, **fields,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.9 if "embed" in name else 0.2))
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


def decoder_adapter(base, *, seed, ends=ENDS, n=40):
    """A random adapter of ``base``, strong enough to change what it says."""
    checkpoint = open_checkpoint(base)
    shapes = {m: site_shape(checkpoint, m) for m in checkpoint.modules() if m.endswith(tuple(ends))}
    return random_adapter(shapes, n=n, alpha=900.0, seed=seed, task="causal-lm")


def export_decoder(folder, *, fields=None, **options):
    """(base, {name: adapter file}, exported folder) of a pico decoder with `ADAPTERS`; one touches few sites."""
    base = pico_decoder(folder / "base", **(fields or {}))
    files = {}
    for seed, name in enumerate(ADAPTERS):
        ends = ("v_proj",) if name == "blue" else ENDS
        files[name] = folder / f"{name}.safetensors"
        write_file(decoder_adapter(base, seed=seed, ends=ends), files[name], values_dtype=np.float16)
    export_model(base, [str(path) for path in files.values()], folder / "out", **options)
    return base, files, folder / "out"


def torch_tokens(base, prompts, *, adapter=None, most=20, side="left", **options):
    """What transformers' ``generate`` appends to ``prompts`` (token lists) with ``adapter`` (a file) in its weights."""
    import torch
    import transformers

    from ssh_deploy.adapters.reading import read_adapter
    from ssh_deploy.graph.patching import apply_adapter, model_places

    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        read = read_adapter(adapter)
        apply_adapter(model, read, model_places(read, model, open_checkpoint(base).config), head=False)
    longest = max(map(len, prompts))
    ids = [[2] * (longest - len(p)) + p if side == "left" else p + [2] * (longest - len(p)) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    with torch.no_grad():
        out = model.generate(
            torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=most, do_sample=False, **options
        )
    answers = out[:, longest:].tolist()
    return [a[: a.index(EOS) + 1] if EOS in a else a for a in answers]

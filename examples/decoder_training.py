"""The loop of `train_decoder_adapters.py`: one adapter, one set of conversations, one recipe, on two CPU cores.

A pair is put as the model's chat template puts it, question as the user's, answer as the assistant's with the mark
that ends it; loss and perplexity are over the answer's tokens and that mark.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from conversations import Conversations, Pair
from smollm2 import NAME, smollm2_folder
from ssh_deploy_train import SSHConfig

TARGETS = ["q_proj", "v_proj"]
LORA_RANK = 8
BATCH = 8
WARM_UP = 0.06
CLIP = 1.0
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one method trains: ``n`` and ``alpha`` are the spectrum's, and count for SSH alone."""

    method: str  # "ssh" or "lora"
    rate: float
    decay: float = 0.0
    beta2: float = 0.999
    n: int = 750
    alpha: float = 576.0  # with 576×576 weights: one coefficient of 1 changes ΔW by a matrix of norm 1
    delta: float = 0.7  # share of the places where the weight's own spectrum is largest
    epochs: int = 1

    @property
    def key(self) -> str:
        """A name that tells it from all others."""
        spectrum = f"-n{self.n}-alpha{self.alpha:g}-delta{self.delta:g}" if self.method == "ssh" else ""
        return f"{self.method}-rate{self.rate:g}-decay{self.decay:g}-beta{self.beta2:g}{spectrum}-epochs{self.epochs}"


def base_model(folder: Path | None = None) -> Any:
    """SmolLM2-135M-Instruct, float32; or what ``folder`` holds."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers.AutoModelForCausalLM.from_pretrained(folder or smollm2_folder(), dtype=torch.float32)


def adapted_model(recipe: Recipe, seed: int) -> Any:
    """The base with an untrained adapter on query and value of all layers."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
    config: peft.PeftConfig
    if recipe.method == "ssh":
        places = {"n_frequency": recipe.n, "scaling": recipe.alpha, "delta_ratio": recipe.delta}
        config = SSHConfig(seed=seed, **places, **shared)
    else:
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, **shared)
    adapted = peft.get_peft_model(base_model(), config)
    config.base_model_name_or_path = NAME  # not the path it was loaded from
    return adapted


def load(folder: Path) -> Any:
    """The base with a saved adapter, ready to answer."""
    return peft.PeftModel.from_pretrained(base_model(), folder).eval()


class Chat:
    """Pairs as token ids."""

    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
        self.end = self.tokenizer.eos_token

    def prompt(self, question: str) -> str:
        """What stands before the answer: the template with its system line, the question, and whose turn it is."""
        said = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))

    def encode(self, pair: Pair) -> tuple[list[int], int]:
        """Ids of prompt and answer with its end mark, and how many of them are the prompt's."""
        prompt, answer = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (self.prompt(pair.question), pair.answer + self.end)
        )
        return prompt + answer, len(prompt)

    def batch(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` [rows, tokens] int64, padded on the right."""
        rows = [self.encode(pair) for pair in pairs]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, (tokens, prompt) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """−log p of every answer token of a batch, f32 [tokens].

    The head runs where an answer stands, nowhere else; and what opens every row, the template's system line, runs
    once: its keys and values are repeated for the rows, gradients and all. That halves the time of a step.
    """
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    ids, labels = batch["input_ids"], batch["labels"]
    same = (ids == ids[0]).all(0) & (labels == IGNORED).all(0)
    shared = max(int(same.cumprod(0).sum()) - 1, 0)  # its last token predicts what differs
    cache = transformers.DynamicCache(config=whole.config)
    if shared:
        whole.model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    rest = {"input_ids": ids[:, shared:], "attention_mask": batch["attention_mask"]}
    states = whole.model(**rest, past_key_values=cache, use_cache=True)[0]
    wanted = labels[:, shared + 1 :]
    here = wanted != IGNORED
    logits = whole.lm_head(states[:, :-1][here])
    return torch.nn.functional.cross_entropy(logits, wanted[here], reduction="none")


def batches(chat: Chat, pairs: Sequence[Pair], rng: np.random.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """One epoch in random order; pairs of a batch are of like length, so that little is padding."""
    order = rng.permutation(len(pairs)).tolist()
    pool = 16 * BATCH
    cut = []
    for start in range(0, len(order), pool):
        rows = sorted(order[start : start + pool], key=lambda i: len(chat.encode(pairs[i])[0]))
        cut += [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    for i in rng.permutation(len(cut)):
        yield chat.batch([pairs[row] for row in cut[i]])


def train(recipe: Recipe, data: Conversations, *, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train one adapter to the end of its schedule; the model, and what was spent."""
    model = adapted_model(recipe, seed)
    chat, rng = Chat(), np.random.default_rng(seed)
    steps = recipe.epochs * math.ceil(len(data.train) / BATCH)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=recipe.decay, betas=(0.9, recipe.beta2))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)
    model.train()
    recent, started = [], time.perf_counter()
    for _ in range(recipe.epochs):
        for batch in batches(chat, data.train, rng):
            loss = losses(model, batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            if len(recent) % 25 == 0:
                spent = time.perf_counter() - started
                print(f"    step {len(recent)} of {steps}: loss {np.mean(recent[-25:]):.3f}, {spent:.0f} s", flush=True)
    return model.eval(), {"steps": steps, "batch": BATCH, "parameters": sum(p.numel() for p in trained)}


@torch.inference_mode()
def perplexity(model: Any, pairs: Sequence[Pair]) -> float:
    """Exp of the mean −log p over all answer tokens of ``pairs``."""
    chat = Chat()
    ordered = sorted(pairs, key=lambda pair: len(chat.encode(pair)[0]))
    found = [losses(model, chat.batch(ordered[i : i + 16])) for i in range(0, len(ordered), 16)]
    return math.exp(float(torch.cat(found).double().mean()))


@torch.inference_mode()
def answers(model: Any, questions: Sequence[str], *, tokens: int = 48) -> list[str]:
    """Greedy answers, up to ``tokens`` tokens each, eight questions at a time."""
    chat = Chat()
    chat.tokenizer.padding_side = "left"
    texts: list[str] = []
    for start in range(0, len(questions), 8):
        prompts = [chat.prompt(question) for question in questions[start : start + 8]]
        batch = chat.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        made = model.generate(**batch, max_new_tokens=tokens, do_sample=False)[:, batch["input_ids"].shape[1] :]
        texts += chat.tokenizer.batch_decode(made, skip_special_tokens=True)
    return [text.strip() for text in texts]

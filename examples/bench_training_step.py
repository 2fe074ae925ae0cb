"""One training step with SSH against PEFT's FourierFT: the same layers, the same n, time and memory in one run.

    python examples/bench_training_step.py [--json] [--shape minilm|bert-base] [--rounds 15]

A whole step (forward, backward, AdamW) of a BERT-shaped classifier with random weights, adapters on query and value
of every layer, n = 750 each. The methods take turns within a round, so that a busy machine slows all of them alike;
times are medians, the ratio is the median of the rounds' ratios. `none` trains the head only: what is left without
an adapter. Memory: bytes of the tensors that autograd keeps from forward to backward (each storage once, weights
aside), and the most bytes of tensors alive at once in a step, as torch's profiler counts them. Resident memory is not
printed: it says more about malloc than about a method (with glibc's defaults it varies by 50 MB from run to run; with
MALLOC_MMAP_THRESHOLD_=262144 it follows the bytes printed here).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from ssh_deploy_train import SSHConfig

METHODS = ("ssh", "fourierft", "none")


@dataclass(frozen=True, slots=True)
class Shape:
    """A BERT's sizes and one batch."""

    layers: int
    hidden: int
    inner: int
    heads: int
    rows: int
    tokens: int
    n: int = 750


SHAPES = {
    "minilm": Shape(layers=6, hidden=384, inner=1536, heads=12, rows=32, tokens=32),
    "bert-base": Shape(layers=12, hidden=768, inner=3072, heads=12, rows=8, tokens=64),
    "tiny": Shape(layers=2, hidden=96, inner=128, heads=4, rows=4, tokens=8, n=200),
}


class Step:
    """A model with one method's adapters, ready to take training steps."""

    def __init__(self, method: str, shape: Shape) -> None:
        torch.manual_seed(0)
        config = transformers.BertConfig(  # type: ignore[call-arg]
            vocab_size=1000,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.inner,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=4,
        )
        model: Any = transformers.BertForSequenceClassification(config)
        shared: dict[str, Any] = {
            "n_frequency": shape.n,
            "target_modules": ["query", "value"],
            "modules_to_save": ["classifier"],
        }
        if method == "none":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("classifier"))
        else:
            chosen = SSHConfig(**shared) if method == "ssh" else peft.FourierFTConfig(**shared)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers
                model = peft.get_peft_model(model, chosen)
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        ids = torch.randint(5, 1000, (shape.rows, shape.tokens))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.labels = torch.arange(shape.rows) % 4

    def loss(self) -> torch.Tensor:
        """Forward."""
        return torch.nn.functional.cross_entropy(self.model(**self.inputs).logits, self.labels)

    def __call__(self) -> float:
        """One step; its seconds."""
        started = time.perf_counter()
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def saved_bytes(self) -> int:
        """Bytes that one forward keeps for its backward, weights aside."""
        weights = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # held, so that no later tensor gets the same address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        total = sum(storage.nbytes() for storage in kept.values())
        del loss
        return total

    def peak_bytes(self) -> int:
        """Most bytes of tensors alive at once in one step, above what is there before it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Times and memory of all methods on one shape."""
    shape = SHAPES[name]
    steps = {method: Step(method, shape) for method in METHODS}
    for step in steps.values():
        step()  # plans, buffers and threads are made now
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(rounds):
        for method in METHODS if turn % 2 else METHODS[::-1]:
            times[method].append(steps[method]())
    result: dict[str, Any] = {"rounds": rounds, "n": shape.n, "batch": [shape.rows, shape.tokens], "methods": {}}
    for method, step in steps.items():
        result["methods"][method] = {
            "ms": round(1e3 * statistics.median(times[method]), 2),
            "trained": sum(p.numel() for p in step.trained),
            "saved_bytes": step.saved_bytes(),
            "peak_bytes": step.peak_bytes(),
        }
    pairs = zip(times["ssh"], times["fourierft"], strict=True)
    result["time_ratio"] = round(statistics.median(a / b for a, b in pairs), 3)
    for key in ("saved_bytes", "peak_bytes"):
        methods = result["methods"]
        result[f"{key}_ratio"] = round(methods["ssh"][key] / max(1, methods["fourierft"][key]), 3)
    return result


def show(name: str, result: dict[str, Any]) -> None:
    """Print one shape's table."""
    rows, tokens = result["batch"]
    print(f"\n{name}: batch {rows}×{tokens}, query+value of every layer, n = {result['n']}, {result['rounds']} rounds")
    print(f"  {'':<10} {'step ms':>8} {'trained':>8} {'kept for backward MB':>21} {'peak MB':>8}")
    for method, one in result["methods"].items():
        print(
            f"  {method:<10} {one['ms']:>8.1f} {one['trained']:>8,} {one['saved_bytes'] / 1e6:>21.1f} "
            f"{one['peak_bytes'] / 1e6:>8.1f}"
        )
    print(
        f"  SSH / FourierFT: time {result['time_ratio']:.2f}, kept {result['saved_bytes_ratio']:.2f}, "
        f"peak {result['peak_bytes_ratio']:.2f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this shape (default: minilm, bert-base)")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    shapes = given.shape or ["minilm", "bert-base"]
    results = {name: measure(name, given.rounds) for name in shapes}
    if given.json:
        print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "shapes": results}))
        return
    for name, result in results.items():
        show(name, result)


if __name__ == "__main__":
    main()

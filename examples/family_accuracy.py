"""Four families on three tasks, answered by torch, by merged checkpoints, by slots, and by one bank that mixes all.

    python examples/family_accuracy.py                      minutes on two cores; adapters that are missing are trained
    python examples/family_accuracy.py --quick --out DIR    32 rows a task, under a minute: does it run?

SSH, FourierFT, sDCTFT (750 coefficients a matrix each) and LoRA (r = 8) change query and value of all layers of
all-MiniLM-L6-v2; the adapters lie in examples/adapters, values in float16. What they are held against: PEFT's own
layers for FourierFT and LoRA; for SSH and sDCTFT, which PEFT has not, ΔW as the plain float64 sum of its definition.
One folder is exported with all twelve. It answers every row with each of them alone, and then every row with each of
them in one stream that is shuffled among texts of about one length: a batch of 32 holds rows of whatever family and
task, and heads of two and of six labels. How many of each is in the record (mixed_batches).
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import training
import transformers
from numpy.typing import NDArray
from quickstart import base_folder, merged_logits, peft_logits, served_logits, torch_logits
from safetensors.numpy import load_file, save_file
from tasks import NAMES, Task, load_task
from training import Run

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.fitting import fit
from ssh_deploy.adapters.peft_folder import WEIGHTS
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.transforms import reference

HERE = Path(__file__).parent
METHODS = {"ssh": "SSH", "fourierft": "FourierFT", "sdctft": "sDCTFT", "lora": "LoRA r = 8"}
WAYS = ("torch", "merged", "slots", "mixed")
BATCH = 32
#: Epochs of FourierFT and sDCTFT, at the first setting that train_adapters.py tries for SSH, seed 0; nothing is chosen.
SPECTRAL = {"trec6": 3, "sms-spam": 2, "sentiment": 2}
#: Epochs and seed of LoRA: the run of train_adapters.py that did best on the validation part.
LORA = {"trec6": (8, 0), "sms-spam": (2, 0), "sentiment": (3, 2)}
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Study:
    """What is asked for: tasks, rows of each test part, where adapters lie and results go."""

    tasks: tuple[str, ...]
    rows: int | None
    adapters: Path
    out: Path
    quick: bool

    def load(self, name: str) -> Task:
        """The task, cut down for --quick, its test part from short to long."""
        task = load_task(name)
        if self.rows is not None:
            task = replace(task, train=_first(task.train, 64), test=_first(task.test, self.rows))
        order = sorted(range(len(task.test[0])), key=lambda i: len(task.test[0][i]))  # little padding in each batch
        return replace(task, test=([task.test[0][i] for i in order], [task.test[1][i] for i in order]))

    def run(self, task: str, method: str) -> Run:
        """How the adapter is trained where it is missing."""
        if method == "lora":
            epochs, seed = LORA[task]
            run = Run(task, method, 2e-3, seed, epochs)
        else:
            run = Run(task, method, 0.06, 0, SPECTRAL[task])
        return replace(run, epochs=1) if self.quick else run

    def path(self, task: str, method: str) -> Path:
        """Where the adapter lies: a compact file of a family that has that form, else PEFT's folder."""
        names = {"ssh": f"{task}.safetensors", "sdctft": f"{task}-sdctft.safetensors"}
        return self.adapters / names.get(method, f"{task}-{method}")


def _first(part: Any, rows: int) -> Any:
    return part[0][:rows], part[1][:rows]


def train(study: Study, task: Task, method: str) -> None:
    """Train the adapter and write it in float16; a run that lies in build/train_adapters is not repeated."""
    run, path = study.run(task.name, method), study.path(task.name, method)
    folder = HERE.parent / "build" / "train_adapters" / run.key
    with tempfile.TemporaryDirectory() as scratch:
        if study.quick or not (folder / WEIGHTS).exists():
            folder = Path(scratch) / "run"
            model, _ = training.train(run, task)
            training.save(model, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            fitted = fit(folder, open_checkpoint(base_folder()))
            write_file(replace(fitted.adapter, fingerprint=fitted.fingerprint), path, values_dtype=np.float16)
            return
        path.mkdir()
        tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((folder / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def defined_logits(path: Path, labels: tuple[str, ...], texts: list[str]) -> Logits:
    """Logits of the base with ΔW as its definition's float64 sum in its weights, and the adapter's head."""
    adapter, model = read_adapter(path), training.base_model(labels)
    with torch.no_grad():
        for module, delta in adapter.deltas.items():
            assert isinstance(delta, SpectralDelta)
            parts = (delta.transform, delta.rows, delta.cols, delta.values, delta.shape)
            change = reference.delta(*parts, alpha=delta.alpha, norm=delta.norm)
            weight = model.get_submodule(module).weight
            weight.copy_(weight.double() + torch.from_numpy(change))
        for module, head in adapter.replaced.items():
            for name, tensor in head.tensors.items():
                getattr(model.get_submodule(module), name).copy_(torch.from_numpy(np.array(tensor, np.float32)))
    return torch_logits(model.eval(), texts)


def torch_answers(study: Study, task: Task, method: str) -> Logits:
    """What every way of deploying is held against."""
    path = study.path(task.name, method)
    if method in ("ssh", "sdctft"):
        return defined_logits(path, task.labels, task.test[0])
    return peft_logits(path, len(task.labels), task.test[0])


def mixed_answers(
    deployment: Deployment, tasks: Sequence[Task]
) -> tuple[dict[tuple[str, str], Logits], dict[str, float]]:
    """Logits by task and method, all rows of all of them in one stream of batches.

    The stream is shuffled, then sorted by length in steps of sixteen characters: what shares a batch is chance, but
    for texts of about one length.
    """
    stream = [(task, method, i) for task in tasks for method in METHODS for i in range(len(task.test[0]))]
    order = np.random.default_rng(0).permutation(len(stream)).tolist()
    order.sort(key=lambda k: len(stream[k][0].test[0][stream[k][2]]) // 16)
    found: dict[tuple[str, str], dict[int, Logits]] = {(t.name, m): {} for t in tasks for m in METHODS}
    seen: list[tuple[int, int]] = []
    for start in range(0, len(order), BATCH):
        rows = [stream[k] for k in order[start : start + BATCH]]
        seen.append((len({method for _, method, _ in rows}), len({task.name for task, _, _ in rows})))
        texts = [task.test[0][i] for task, _, i in rows]
        answers = deployment.predict(texts, adapters=[f"{task.name}-{method}" for task, method, _ in rows])
        for (task, method, i), one in zip(rows, answers, strict=True):
            found[task.name, method][i] = one.logits
    families, kinds = np.mean(seen, axis=0)
    told = {"batches": len(seen), "families_each": round(float(families), 2), "tasks_each": round(float(kinds), 2)}
    return {key: np.stack([rows[i] for i in range(len(rows))]) for key, rows in found.items()}, told


def judged(task: Task, logits: Mapping[str, Logits], path: Path) -> dict[str, Any]:
    """Accuracy of each way, rows where all agree, and how far logits are from torch's."""
    want = np.array(task.test[1])
    answers = {way: logits[way].argmax(1) for way in WAYS}
    files = [path] if path.is_file() else list(path.iterdir())
    return {
        "accuracy": {way: round(float((a == want).mean()), 5) for way, a in answers.items()},
        "agreement": float(np.all([a == answers["torch"] for a in answers.values()], axis=0).mean()),
        "from_torch": {way: float(f"{np.abs(logits[way] - logits['torch']).max():.3g}") for way in WAYS[1:]},
        "parameters": fit(path, open_checkpoint(base_folder())).adapter.parameters,
        "bytes": sum(file.stat().st_size for file in files),
    }


def measure(study: Study) -> dict[str, Any]:
    """Train what is missing, deploy, and answer in all four ways; a record per task and method."""
    tasks = [study.load(name) for name in study.tasks]
    for task in tasks:
        for method in METHODS:
            if not study.path(task.name, method).exists():
                train(study, task, method)
    found: dict[str, Any] = {task.name: {} for task in tasks}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        given = [f"{t.name}-{m}={study.path(t.name, m)}" for t in tasks for m in METHODS]
        export_model(base_folder(), given, out)
        with Deployment.open(out) as deployment:
            mixed, batches = mixed_answers(deployment, tasks)
            for task in tasks:
                for method, title in METHODS.items():
                    merged = Path(scratch) / f"merged-{task.name}-{method}"
                    merge_adapters(base_folder(), [str(study.path(task.name, method))], merged)
                    logits = {
                        "torch": torch_answers(study, task, method),
                        "merged": merged_logits(merged, task.test[0]),
                        "slots": served_logits(deployment, task.test[0], f"{task.name}-{method}"),
                        "mixed": mixed[task.name, method],
                    }
                    row = found[task.name][method] = judged(task, logits, study.path(task.name, method))
                    right = ", ".join(f"{way} {value:.4f}" for way, value in row["accuracy"].items())
                    print(f"{task.name:<10} {title:<11} {right}; agree {row['agreement']:.2%}", flush=True)
    return {"mixed_batches": batches, "tasks": found}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write family_accuracy.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--task", choices=NAMES, action="append", help="only this task (may be repeated)")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="folder (default: examples/adapters)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: examples/results)")
    parser.add_argument("--quick", action="store_true", help="32 rows a task; needs --out")
    given = parser.parse_args(arguments)
    if given.quick and given.out is None:
        parser.error("--quick writes only where --out says: give --out DIR.")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # "newly initialized: classifier" is what the adapters replace
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    study = Study(
        tasks=tuple(given.task or NAMES),
        rows=32 if given.quick else None,
        adapters=given.adapters,
        out=given.out or HERE / "results",
        quick=given.quick,
    )
    record = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("ssh-deploy", "torch", "transformers", "peft", "onnxruntime")},
        "base": training.BASE_NAME,
        "quick": given.quick,
        "batch": BATCH,
        "rows": {name: len(study.load(name).test[0]) for name in study.tasks},
        **measure(study),
    }
    study.out.mkdir(parents=True, exist_ok=True)
    (study.out / "family_accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

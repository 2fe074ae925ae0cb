"""A LoRA of TREC-6 turned into SSH and sDCTFT: accuracy on the test part against coefficients kept per matrix.

    python examples/convert_accuracy.py                    JSON and SVG to examples/results; minutes on two cores
    python examples/convert_accuracy.py --quick --out DIR  three points on 64 rows, under a minute: does it run?

The LoRA is examples/adapters/trec6-lora: r = 8 on query and value of all layers of all-MiniLM-L6-v2, the run of
examples/train_adapters.py that did best on the validation part, in float16. Nothing is trained here: the strongest
coefficients of each matrix's change are taken as they are (`ssh-deploy convert --to ssh --coefficients N`).
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import training
from tasks import Part, load_task
from training import MAX_TOKENS

from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.graph.patching import apply_adapter, model_places
from ssh_deploy.jobs.converting import convert_adapter

HERE = Path(__file__).parent
TASK, LORA = "trec6", HERE / "adapters" / "trec6-lora"
KINDS = {"ssh": "SSH (Hartley)", "sdctft": "sDCTFT (cosine, by bands)"}
COUNTS = (250, 750, 1500, 3000, 6000, 12_000, 24_000, 48_000, 96_000)
#: The same task's SSH adapters that were trained as such, 750 coefficients a matrix: see train_adapters.json.
TRAINED = HERE / "results" / "train_adapters.json"


def accuracy(adapter: Path | None, labels: tuple[str, ...], part: Part) -> float:
    """Share of right answers of the base with ``adapter``'s change in its weights; None: with LoRA's head alone."""
    model = training.base_model(labels)
    found = read_adapter(adapter or LORA)
    places = model_places(found, model, model.config.to_dict())
    apply_adapter(model, found, places, scale=1.0 if adapter else 0.0)
    return training.accuracy(model.eval(), part, MAX_TOKENS[TASK])


def measure(counts: Sequence[int], part: Part, labels: tuple[str, ...]) -> dict[str, Any]:
    """Accuracies of the LoRA, of its head alone, and of every kind at every count; energies beside them."""
    found: dict[str, Any] = {"lora": accuracy(LORA, labels, part), "head_alone": accuracy(None, labels, part)}
    print(f"LoRA {found['lora']:.4f}, its head alone {found['head_alone']:.4f}", flush=True)
    for kind in KINDS:
        found[kind] = []
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "adapter.safetensors"
                done = convert_adapter(LORA, file, form=kind, coefficients=count, min_energy=0.0)
                right = accuracy(file, labels, part)
            point = {"coefficients": count, "energy": round(done.energy or 0.0, 5), "accuracy": right}
            found[kind].append({**point, "bytes": done.bytes_after})
            print(f"{kind:7} {count:>7,} coefficients: {done.energy:6.1%} of the energy, {right:.4f}", flush=True)
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Accuracy and energy against coefficients, as an SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ssh-deploy"  # the same numbers give the same file
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, height_ratios=(3, 2))
    for kind, title, colour in zip(KINDS, KINDS.values(), ("#3b3b98", "#c4623a"), strict=True):
        points = record["points"][kind]
        x = [point["coefficients"] for point in points]
        top.plot(x, [point["accuracy"] for point in points], "o-", color=colour, label=f"LoRA as {title}")
        bottom.plot(x, [point["energy"] for point in points], "o-", color=colour)
    top.axhline(record["points"]["lora"], color="#1b1e28", lw=1, label="LoRA r = 8 itself")
    top.axhline(record["points"]["head_alone"], color="#5b6072", lw=1, ls=":", label="its head alone, no ΔW")
    if record["trained_as_ssh"]:
        top.plot([750], [record["trained_as_ssh"]], "*", ms=14, color="#1f8a5b", label="trained as SSH, 750")
    top.set(ylabel=f"accuracy, {record['rows']:,} test rows", title="TREC-6: a LoRA turned into a sparse spectrum")
    bottom.set(xscale="log", ylabel="share of ‖ΔW‖² kept", xlabel="coefficients per 384×384 matrix", ylim=(0, 1.02))
    top.legend(loc="center right", frameon=False, fontsize=9)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write convert_accuracy.json and .svg."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="folder (default: examples/results)")
    parser.add_argument("--quick", action="store_true", help="three points on 64 rows; needs --out")
    given = parser.parse_args(arguments)
    if given.quick and given.out is None:
        parser.error("--quick writes only where --out says: give --out DIR.")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    task = load_task(TASK)
    part = (task.test[0][:64], task.test[1][:64]) if given.quick else task.test
    trained = [run for key, run in json.loads(TRAINED.read_text())["tasks"].items() if key == TASK]
    record = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("ssh-deploy", "torch", "transformers")},
        "base": training.BASE_NAME,
        "task": TASK,
        "rows": len(part[0]),
        "quick": given.quick,
        "trained_as_ssh": trained[0]["ssh"]["mean"] if trained and not given.quick else None,
        "points": measure(COUNTS[1:8:3] if given.quick else COUNTS, part, task.labels),
    }
    out = given.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    (out / "convert_accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, out / "convert_accuracy.svg")


if __name__ == "__main__":
    main()

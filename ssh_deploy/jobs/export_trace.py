"""The plain graph of an export's base: traced from transformers' model, or from onnxruntime-genai's builder."""

from __future__ import annotations

import shutil
from pathlib import Path

from ssh_deploy.graph.genai_builder import CONFIG, build_decoder
from ssh_deploy.graph.trace import Loaded, Traced, trace_model
from ssh_deploy.jobs.export_decoder import add_positions
from ssh_deploy.jobs.export_job import Job

#: What an export leaves in its folder until it is done.
SCRATCH = (".plain.onnx", ".plain.onnx.data", ".builder")


def trace_base(job: Job, loaded: Loaded, folder: Path) -> Traced:
    """The graph of ``loaded``, its weights at hand until `clear_scratch`.

    Args:
        job: with a ``builder`` among its options.
        loaded: the base.
        folder: of the export; the builder's `CONFIG` is put there.

    Raises:
        DependencyError, GraphError: of `trace_model` and `build_decoder`.
    """
    if job.options.builder == "genai":
        work = folder / ".builder"
        work.mkdir()
        traced = build_decoder(loaded, job.checkpoint.folder, work)
        shutil.copyfile(work / CONFIG, folder / CONFIG)
        return traced
    traced = trace_model(loaded, opset=job.options.opset)
    if job.options.adapter_inputs == "optional":
        add_positions(traced)
    return traced


def clear_scratch(folder: Path) -> None:
    """Remove what is no part of an exported folder."""
    for name in SCRATCH:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

"""Export without slots: ΔW added to the weights before the trace; one adapter, or several with weights and one head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterMismatchError, GraphError, UnknownNameError, near_misses
from ssh_deploy.graph.bank_file import Layout
from ssh_deploy.graph.patching import Originals, apply_adapter, label_count, model_places, weighted_modules
from ssh_deploy.graph.precision import store_half
from ssh_deploy.graph.quantizing import hold_quantized
from ssh_deploy.graph.storing import save_graph
from ssh_deploy.graph.trace import Loaded, load_torch
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs import validating
from ssh_deploy.jobs.export_decoder import copy_template
from ssh_deploy.jobs.export_job import Job, check_missing, describe, round_weights
from ssh_deploy.jobs.export_quantized import compare, describe_quantized, quantize_graph
from ssh_deploy.jobs.export_trace import trace_base
from ssh_deploy.jobs.progress import Progress


def merged_graph(job: Job, folder: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, validating.Checked]]:
    """Fill ``folder`` with the merged graph; returns its `deployment.json` and what the validation found.

    Raises:
        GraphError: the task needs a head that neither base nor adapter has.
        VerificationError: the graph is not what torch answers.
    """
    options, checkpoint = job.options, job.checkpoint
    weights = options.weights or (1.0,)
    source = _head_of(job)
    loaded = load_torch(checkpoint, job.task)
    adapter = job.fitted[source].adapter if source else None
    if adapter is not None:
        loaded = load_torch(checkpoint, job.task, labels=label_count(adapter, loaded.model))
    inputs = validating.inputs_for(loaded)
    before = validating.torch_outputs(loaded.model, inputs, _names(job.task))
    originals: Originals | None = {} if len(job.fitted) > 1 else None
    for (name, fitted), weight in zip(job.fitted.items(), weights, strict=True):
        places = model_places(fitted.adapter, loaded.model, checkpoint.config)
        head = name == source
        apply_adapter(loaded.model, fitted.adapter, places, scale=weight, head=head, originals=originals)
    left = loaded.missing - frozenset(adapter.replaced if adapter is not None else ())
    loaded = replace(loaded, missing=left)
    check_missing(job, loaded)
    if left and job.headed:
        raise GraphError(
            f"{', '.join(sorted(left)[:3])} of the head is neither in {checkpoint.folder} nor in the adapter.",
            hint="Train with it in modules_to_save, or export with --task feature-extraction.",
        )
    traced = trace_base(job, loaded, folder)
    progress("export", 1, 4)
    labels = list(adapter.labels) if adapter is not None and adapter.labels else list(traced.base_labels)
    if options.dtype == "float16":
        store_half(traced.graph)
        round_weights(loaded.model)
    save_graph(traced.graph, folder / files.MODEL)
    progress("export", 2, 4)
    fingerprint = fingerprint_of(checkpoint, {p for f in job.fitted.values() for p in f.places.values()})
    files.copy_companions(checkpoint, folder, _config_changes(loaded, labels))
    copy_template(checkpoint, folder)
    files.write_samples(folder / files.FINGERPRINT, fingerprint)
    layout = Layout((), (), (), options.adapter_dtype, (0, 0, 0), {})
    deployment = describe(job, loaded, traced, layout, fingerprint.sha256, {})
    if labels:
        deployment["head"] = {
            "module": None,
            "in": traced.hidden,
            "labels": len(labels),
            "base_labels": labels,
            "modules": [],
        }
    deployment["merged"] = [
        {"name": name, "weight": weight, "source_digest": f.adapter.digest, "family": f.adapter.family}
        for (name, f), weight in zip(job.fitted.items(), weights, strict=True)
    ]
    want = validating.torch_outputs(loaded.model, inputs, traced.outputs)
    effect = validating.effect_of(want, before)
    got = validating.Runner(folder / files.MODEL, traced.outputs)(inputs)
    checked = validating.compare("merged", got, want, effect=effect)
    if options.quantize != "none":
        made = quantize_graph(job, folder / files.MODEL, traced, loaded, keep=_heads(job, loaded))
        hold_quantized(loaded.model, made.as_dict(), folder / files.MODEL)
        answers = validating.Runner(folder / files.MODEL, traced.outputs)(inputs)
        deployment["quantized"] = describe_quantized(job, made, {"": answers}, {"": got})
        want = validating.torch_outputs(loaded.model, inputs, traced.outputs)
        checked = compare("merged", answers, want, effect=effect)
    return deployment, {"+".join(job.fitted): checked}


def _config_changes(loaded: Loaded, labels: list[str]) -> dict[str, Any]:
    """What config.json says of the merged model and the base's did not."""
    changes: dict[str, Any] = {"architectures": [type(loaded.model).__name__]}
    if labels:
        changes["id2label"] = {str(i): n for i, n in enumerate(labels)}
        changes["label2id"] = {n: i for i, n in enumerate(labels)}
    return changes


def _heads(job: Job, loaded: Loaded) -> list[str]:
    """Modules behind the base model, which stay in float32."""
    prefix = f"{loaded.model.base_model_prefix}."
    return [name for name in weighted_modules(loaded.model) if job.headed and not name.startswith(prefix)]


def _names(task: str) -> tuple[str, ...]:
    return ("last_hidden_state",) if task == "feature-extraction" else ("logits",)


def _head_of(job: Job) -> str | None:
    """Name of the adapter whose head the merged graph has.

    Raises:
        AdapterMismatchError: several have heads and none is chosen.
        UnknownNameError: the chosen one is not there.
    """
    chosen = job.options.head
    if not job.headed or chosen == "none":
        return None
    headed = [name for name, f in job.fitted.items() if f.adapter.replaced]
    if chosen is not None:
        if chosen not in headed:
            raise UnknownNameError(
                f"--head {chosen}: no adapter with a head goes by that.", hint=near_misses(chosen, headed)
            )
        return chosen
    if len(headed) > 1:
        raise AdapterMismatchError(
            f"{', '.join(headed)} have heads of their own, and a merged graph has one.",
            hint="Choose with --head NAME|none.",
        )
    return next(iter(headed), None)

"""Export with slots: one graph, an `.onnx_adapter` for each adapter, everything held against torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.adapters.fitting import Fitted
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import VerificationError
from ssh_deploy.graph.bank_file import Arrays, Layout, slot_kind
from ssh_deploy.graph.guard import CONTRACT, add_guard, guard_shape
from ssh_deploy.graph.patching import apply_adapter, label_count, model_places, rounded
from ssh_deploy.graph.precision import store_half
from ssh_deploy.graph.quantizing import hold_quantized
from ssh_deploy.graph.sites import by_module, find_calls
from ssh_deploy.graph.slots import Plan, Slotted, add_slots
from ssh_deploy.graph.spectral_rows import AXES
from ssh_deploy.graph.storing import save_graph
from ssh_deploy.graph.trace import Loaded, Traced, load_torch
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs import validating
from ssh_deploy.jobs.export_decoder import copy_template
from ssh_deploy.jobs.export_job import Job, check_missing, describe, round_weights
from ssh_deploy.jobs.export_plan import plan_slots
from ssh_deploy.jobs.export_quantized import compare, describe_quantized, quantize_graph, replace_graph
from ssh_deploy.jobs.export_trace import clear_scratch, trace_base
from ssh_deploy.jobs.folder_adapters import rows_of, write_adapter
from ssh_deploy.jobs.progress import Progress
from ssh_deploy.transforms import get_transform


def sidecar_graph(job: Job, folder: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, validating.Checked]]:
    """Fill ``folder`` with the graph and its adapters; returns its `deployment.json` and what the validation found.

    Raises:
        AdapterMismatchError: an adapter that the graph has no place for.
        VerificationError: the graph is not what torch answers.
    """
    options, checkpoint = job.options, job.checkpoint
    for name, fitted in job.fitted.items():  # what no slot can hold is refused before the graph is traced
        for module, delta in fitted.adapter.deltas.items():
            slot_kind(f"{name}: {module}", delta)
    loaded = load_torch(checkpoint, job.task)
    check_missing(job, loaded)
    traced = trace_base(job, loaded, folder)
    progress("export", 1, 4)
    calls = by_module(find_calls(traced.graph.graph))
    plan, names = plan_slots(job, loaded, {module: (c[0].outputs, c[0].inputs) for module, c in calls.items()})
    if options.dtype == "float16":
        store_half(traced.graph)
        round_weights(loaded.model)
    plain = folder / ".plain.onnx"
    save_graph(traced.graph, plain)
    slotted = add_slots(traced.graph, plan)
    orders = {
        axis: {n: _pq(axis, n) for n in sorted({side for _, *sides in slotted.table for side in sides})}
        for axis in plan.kinds
        if axis in AXES
    }
    table = tuple((names[module], n_in, n_out) for module, n_in, n_out in slotted.table)
    fingerprint = fingerprint_of(checkpoint, [m for m, *_ in table] or sorted(set(names.values())))
    guard = guard_shape(
        fingerprint=fingerprint.sha256,
        sites=table,
        orders=orders,
        kinds=plan.kinds,
        heads=[m for m, *_ in slotted.heads],
    )
    _seal(traced.graph, plan, guard, table)
    base_head = _base_head(loaded, slotted)
    layout = Layout(table, plan.kinds, slotted.heads, options.adapter_dtype, guard, base_head)
    deployment = describe(job, loaded, traced, layout, fingerprint.sha256, orders)
    save_graph(traced.graph, folder / files.MODEL)
    progress("export", 2, 4)
    files.write_samples(folder / files.FINGERPRINT, fingerprint)
    if base_head:
        files.write_base_head(folder / files.BASE_HEAD, base_head)
    files.copy_companions(checkpoint, folder, {})
    copy_template(checkpoint, folder)
    rows = {}
    for name, fitted in job.fitted.items():
        rows[name] = rows_of(fitted, layout, checkpoint, headless=not job.headed)
        deployment["adapters"][name] = write_adapter(folder, name, fitted, rows[name], layout)
    half = round_weights if options.dtype == "float16" else _as_it_is
    validate = partial(
        _validate, job, folder, plain, loaded, traced, layout, rows, progress, inputs=_inputs(job, loaded, traced)
    )
    checks, answers = validate(weights=half)
    if options.quantize != "none":
        made = quantize_graph(job, plain, traced, loaded, keep=[m for m, *_ in slotted.heads])
        model, stated = ir.load(plain), made.as_dict()
        assert add_slots(model, plan) == slotted
        _seal(model, plan, guard, table)
        replace_graph(model, folder / files.MODEL)
        hold_quantized(loaded.model, stated, folder / files.MODEL)
        checks, quantized = validate(weights=partial(_held, half, stated, folder / files.MODEL), compare=compare)
        deployment["quantized"] = describe_quantized(job, made, quantized, answers)
    clear_scratch(folder)
    return deployment, checks


def _seal(model: ir.Model, plan: Plan, guard: tuple[int, int, int], table: Sequence[tuple[str, int, int]]) -> None:
    """Add the guard, the last pass, and say what the graph is."""
    if plan.kinds:
        add_guard(model, guard, required=plan.required)
    model.metadata_props["ssh_deploy.sites"] = ",".join(m for m, *_ in table)
    model.metadata_props["ssh_deploy.contract"] = str(CONTRACT)
    model.producer_name, model.producer_version = "ssh-deploy", files.versions().get("ssh-deploy", "")


def _base_head(loaded: Loaded, slotted: Slotted) -> dict[str, NDArray[Any]]:
    modules = dict(loaded.model.named_modules())
    if any(module in loaded.missing for module, *_ in slotted.heads):
        slotted_heads = [m for m, *_ in slotted.heads[:-1] if m not in loaded.missing]
    else:
        slotted_heads = [m for m, *_ in slotted.heads]
    tensors = {}
    for module in slotted_heads:
        for part in ("weight", "bias"):
            tensor = getattr(modules[module], part, None)
            if tensor is not None:
                tensors[f"{module}.{part}"] = tensor.detach().numpy()
    return tensors


def _pq(axis: str, n: int) -> tuple[int, int]:
    return get_transform(axis).axis.output_order(n)[0]


def _validate(
    job: Job,
    folder: Path,
    plain: Path,
    loaded: Loaded,
    traced: Traced,
    layout: Layout,
    rows: Mapping[str, Arrays],
    progress: Progress,
    *,
    inputs: list[dict[str, Any]],
    weights: Callable[[Any], None],
    compare: Callable[..., validating.Checked] = validating.compare,
) -> tuple[dict[str, validating.Checked], dict[str, list[validating.Outputs]]]:
    """Checks and answers by adapter (``""``: none); ``weights`` gives a torch model the graph's stored numbers."""
    names = traced.outputs
    required = files.no_adapter(layout) if job.options.adapter_inputs == "required" and layout.kinds else None
    unchanged = validating.Runner(plain, names)(inputs)  # before the next session: each holds the whole base
    runner = validating.Runner(folder / files.MODEL, names, required)
    nothing = runner(inputs)
    validating.identical(job.base, nothing, _cut(unchanged, nothing))
    want = validating.torch_outputs(loaded.model, inputs, names)
    checks = {"": compare("no adapter", nothing, _cut(want, nothing))}
    answers = {"": nothing}
    for i, (name, fitted) in enumerate(job.fitted.items()):
        progress("validate", i, len(job.fitted))
        adapter = rounded(fitted.adapter, layout.adapter_dtype)
        labels = label_count(adapter, loaded.model) if job.headed else None
        own = load_torch(job.checkpoint, job.task, labels=labels).model
        weights(own)
        apply_adapter(own, adapter, model_places(adapter, own, job.checkpoint.config), head=job.headed)
        want = validating.torch_outputs(own, inputs, names)
        if required is None:
            got = runner(inputs, adapter=folder / files.ADAPTERS / f"{name}.onnx_adapter")
        else:
            got = runner(inputs, arrays={k: v[None] for k, v in rows[name].items()})
        deltas = {k: v[None] for k, v in rows[name].items() if not k.startswith("adapter_head.")}
        effect = _effect(name, fitted, runner(inputs, arrays=deltas), nothing, got)
        checks[name] = compare(name, got, want, effect=effect)
        answers[name] = got
    return checks, answers


def _inputs(job: Job, loaded: Loaded, traced: Traced) -> list[dict[str, Any]]:
    """Inputs of the validation: those the graph takes, without padding where it cannot be in front."""
    feeds = validating.inputs_for(loaded, padded=job.options.builder == "torch")
    return [{name: value for name, value in feed.items() if name in traced.inputs} for feed in feeds]


def _held(half: Callable[[Any], None], stated: Mapping[str, Any], path: Path, model: Any) -> None:
    half(model)
    hold_quantized(model, stated, path)


def _as_it_is(_model: Any) -> None:
    """The numbers of the checkpoint."""


def _effect(name: str, fitted: Fitted, deltas_only: Any, nothing: Any, whole: Any) -> float:
    effect = validating.effect_of(deltas_only, nothing)
    if effect == 0.0 and not any(out.size for answer in nothing for out in answer.values()):
        effect = validating.effect_of(whole, nothing)
    if effect == 0.0 and not all(_is_zero(delta) for delta in fitted.adapter.deltas.values()):
        raise VerificationError(
            f"{name}: its deltas change no bit of any output.",
            hint="Its values may be too small for this base's precision, or its modules do not reach the outputs.",
        )
    return effect


def _is_zero(delta: Delta) -> bool:
    if isinstance(delta, LowRankDelta | SparseDelta):
        return delta.norm == 0
    return isinstance(delta, SpectralDelta) and not np.any(delta.values)


def _cut(answers: list[validating.Outputs], like: list[validating.Outputs]) -> list[validating.Outputs]:
    """``answers`` without labels where ``like`` has none: what transformers made up for a head is no reference."""
    return [
        {k: v[..., :0] if mine[k].shape[-1] == 0 else v for k, v in answer.items()}
        for answer, mine in zip(answers, like, strict=True)
    ]

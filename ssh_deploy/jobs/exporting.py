"""Export a base and its adapters to an ONNX folder: traced, given slots, validated against torch, then renamed.

`sidecar`: one graph with optional inputs and an `.onnx_adapter` file each. `merged`: the adapters' ΔW are added to
the weights before tracing, and the graph has no slots. Nothing appears under the output's name until every check of
`jobs.validating` has passed.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.fitting import Fitted, fit
from ssh_deploy.checkpoints.index import Checkpoint, open_checkpoint
from ssh_deploy.checkpoints.names import canonical, match_modules
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.checkpoints.whole import whole_folder
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterMismatchError, GraphError, UnknownNameError, VerificationError, near_misses
from ssh_deploy.graph.bank_file import Arrays, Layout, adapter_rows, onnxruntime, write_onnx_adapter
from ssh_deploy.graph.guard import CONTRACT, add_guard, guard_shape
from ssh_deploy.graph.lowering import LOWERINGS
from ssh_deploy.graph.patching import apply_adapter, label_count, model_places, rounded
from ssh_deploy.graph.precision import store_half
from ssh_deploy.graph.sites import by_module, find_calls
from ssh_deploy.graph.slots import Plan, Slotted, add_slots
from ssh_deploy.graph.trace import Loaded, Traced, load_torch, resolve_task, trace_model
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs import validating
from ssh_deploy.jobs.naming import named_paths
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.transforms import get_transform

log = logging.getLogger(__name__)

_ATTENTION = ("attention", "attn", "self_attn", "self_attention")


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


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export, as the command line names them."""

    task: str = "auto"
    mode: str = "sidecar"
    dtype: str = "float32"
    adapter_dtype: str = "float16"
    opset: int = 20
    adapter_inputs: str = "optional"
    sites: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    head: str | None = None
    require_fingerprint: bool = False


@dataclass(slots=True)
class _Job:
    checkpoint: Checkpoint
    given: Mapping[str, Path]
    fitted: Mapping[str, Fitted]
    options: ExportOptions
    base: str
    task: str
    notes: list[str] = field(default_factory=list)


def export_model(
    base: str | Path, adapters: Sequence[str], out: str | Path, *, options: ExportOptions | None = None, progress: Progress = silent
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
    job = _Job(checkpoint, given, fitted, options, files.base_name(checkpoint, str(base)), task)
    job.notes += [f"{name}: base unverified (it stores no fingerprint)" for name, f in fitted.items() if not f.verified]
    with whole_folder(Path(out), need=2 * checkpoint.nbytes) as folder:
        progress("export", 0, 4)
        export = _export_merged if options.mode == "merged" else _export_sidecar
        deployment, checks = export(job, folder, progress)
        files.write_json(folder / files.DEPLOYMENT, deployment)
        files.write_json(folder / files.PROVENANCE, _provenance(job, deployment, checks))
        (folder / "README.md").write_text(files.model_card(deployment), encoding="utf-8")
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


# --- sidecar -----------------------------------------------------------------------------------------------------


def _export_sidecar(job: _Job, folder: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, validating.Checked]]:
    options, checkpoint = job.options, job.checkpoint
    loaded = load_torch(checkpoint, job.task)
    _check_missing(job, loaded)
    traced = trace_model(loaded, opset=options.opset)
    progress("export", 1, 4)
    import onnx_ir as ir

    calls = by_module(find_calls(traced.graph.graph))
    plan, names = _plan(job, loaded, {module: (c[0].outputs, c[0].inputs) for module, c in calls.items()})
    if options.dtype == "float16":
        store_half(traced.graph)
        _round_torch(loaded.model)
    plain = folder / ".plain.onnx"
    ir.save(traced.graph, plain, external_data=".plain.onnx.data")
    slotted = add_slots(traced.graph, plan)
    orders = {
        axis: {n: _pq(axis, n) for n in sorted({side for _, *sides in slotted.table for side in sides})}
        for axis in plan.kinds
        if axis != "head"
    }
    table = tuple((names[module], n_in, n_out) for module, n_in, n_out in slotted.table)
    fingerprint = fingerprint_of(checkpoint, [m for m, *_ in table] or sorted(set(names.values())))
    guard = guard_shape(
        fingerprint=fingerprint.sha256, sites=table, orders=orders, kinds=plan.kinds, heads=[m for m, *_ in slotted.heads]
    )
    if plan.kinds:
        add_guard(traced.graph, guard, required=plan.required)
    base_head = _base_head(loaded, slotted)
    layout = Layout(table, plan.kinds, slotted.heads, options.adapter_dtype, guard, base_head)
    deployment = _deployment(job, loaded, traced, layout, fingerprint.sha256, orders)
    traced.graph.metadata_props["ssh_deploy.sites"] = ",".join(m for m, *_ in table)
    traced.graph.metadata_props["ssh_deploy.contract"] = str(CONTRACT)
    traced.graph.producer_name, traced.graph.producer_version = "ssh-deploy", files.versions().get("ssh-deploy", "")
    ir.save(traced.graph, folder / files.MODEL, external_data=f"{files.MODEL}.data")
    progress("export", 2, 4)
    files.write_samples(folder / files.FINGERPRINT, fingerprint)
    if base_head:
        files.write_base_head(folder / files.BASE_HEAD, base_head)
    files.copy_companions(checkpoint, folder, {})
    rows = {}
    for name, fitted in job.fitted.items():
        rows[name] = rows_of(fitted, layout, checkpoint, headless=not _headed(job.task))
        deployment["adapters"][name] = write_adapter(folder, name, fitted, rows[name], layout)
    checks = _validate(job, folder, plain, loaded, traced, layout, rows, progress)
    for left in folder.glob(".plain.onnx*"):
        left.unlink()
    return deployment, checks


def _check_missing(job: _Job, loaded: Loaded) -> None:
    unused = {"feature-extraction": ("pooler",)}.get(job.task, ())
    real = sorted(m for m in loaded.missing if not (set(m.split(".")) & set(unused)))
    if real and not _headed(job.task):
        raise GraphError(
            f"{job.checkpoint.folder} has no weights for {', '.join(real[:3])}, which {job.task} needs.",
            hint="Choose another --task; made-up weights are never exported.",
        )


def _headed(task: str) -> bool:
    return task.endswith("classification")


def _plan(job: _Job, loaded: Loaded, sides: Mapping[str, tuple[int, int]]) -> tuple[Plan, dict[str, str]]:
    """The plan and, for modules of the traced model that the checkpoint holds, their canonical names."""
    options, config = job.options, job.checkpoint.config
    prefix = f"{loaded.model.base_model_prefix}."
    bare = job.task == "feature-extraction"
    body = [m for m in sides if (bare or m.startswith(prefix)) and m not in loaded.missing]
    places = match_modules(body, job.checkpoint.modules(), config=config) if body else {}
    names = {module: canonical(path, config) for module, path in places.items()}
    reverse = {name: module for module, name in names.items()}
    wanted: dict[str, None] = {}
    kinds: set[str] = set(options.kinds)
    for name, fitted in job.fitted.items():
        for module, place in fitted.places.items():
            site = canonical(place, config)
            if site not in reverse:
                raise AdapterMismatchError(
                    f"{name}: {module} has no site in the graph of task {job.task}.",
                    hint=f"{near_misses(site, reverse)} Another --task may compute it; --mode merged needs no sites.",
                )
            wanted[reverse[site]] = None
            delta = fitted.adapter.deltas[module]
            kinds.add(delta.axis.name if isinstance(delta, SpectralDelta) else delta.kind)
        if fitted.adapter.replaced:
            kinds.add("head")
    if job.fitted and "head" in kinds and not _headed(job.task):
        kinds.discard("head")
        job.notes.append(f"heads of the adapters are left out: task {job.task} has none")
    unknown = sorted(kinds - set(LOWERINGS))
    if unknown:
        raise AdapterMismatchError(
            f"The graph has no lowering for {unknown[0]} deltas.", hint="Use --mode merged, or `ssh-deploy merge`."
        )
    for selection in options.sites:
        wanted |= dict.fromkeys(_select(selection, reverse))
    if wanted and not kinds - {"head"}:
        kinds.add("hartley")
    if options.kinds and not wanted and set(options.kinds) - {"head"}:
        raise GraphError("--kinds reserves slots but no site is named.", hint="Add --sites attention, linear or a glob.")
    heads = _head_modules(job, loaded, sides, prefix)
    ordered = tuple(kind for kind in LOWERINGS if kind in kinds and (kind != "head" or heads))
    missing = frozenset(m for m in loaded.missing if m in sides)
    dtype, required = options.adapter_dtype, options.adapter_inputs == "required"
    return Plan(tuple(m for m in sides if m in wanted), ordered, heads, missing, dtype, required), names


def _select(selection: str, sites: Mapping[str, str]) -> list[str]:
    """Modules of the traced model by ``attention``, ``linear`` or a glob over canonical names."""
    if selection == "linear":
        return list(sites.values())
    if selection == "attention":
        found = [m for name, m in sites.items() if set(name.split(".")) & set(_ATTENTION)]
    else:
        found = [m for name, m in sites.items() if fnmatch.fnmatchcase(name, selection)]
    if not found:
        raise UnknownNameError(
            f"--sites {selection} matches none of {len(sites)} linear layers.", hint=near_misses(selection, sites)
        )
    return found


def _head_modules(job: _Job, loaded: Loaded, sides: Mapping[str, tuple[int, int]], prefix: str) -> tuple[str, ...]:
    if not _headed(job.task):
        return ()
    heads = [m for m in sides if not m.startswith(prefix) or m in loaded.missing]
    for name, fitted in job.fitted.items():
        for module in fitted.adapter.replaced:
            if module not in sides:
                raise AdapterMismatchError(
                    f"{name}: it trained {module} whole, which is no linear layer of the graph.",
                    hint=f"{near_misses(module, sides)} Slots hold linear heads only; use --mode merged.",
                )
            if module not in heads:
                heads.append(module)
    return tuple(m for m in sides if m in heads)


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
    stages = get_transform(axis).axis.two_stage(n)
    return stages.p, stages.q


def _round_torch(model: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def rows_of(fitted: Fitted, layout: Layout, checkpoint: Checkpoint, *, headless: bool = False) -> Arrays:
    """Rows of the banks of an adapter that fits its base.

    Args:
        fitted: as `fit` gave it.
        layout: of the graph.
        checkpoint: the base.
        headless: leave its heads out.

    Raises:
        AdapterMismatchError: no slot for something of it.
    """
    from dataclasses import replace

    adapter = replace(fitted.adapter, replaced={}) if headless else fitted.adapter
    places = {module: canonical(path, checkpoint.config) for module, path in fitted.places.items()}
    return adapter_rows(adapter, layout, places)


def write_adapter(folder: Path, name: str, fitted: Fitted, rows: Arrays, layout: Layout) -> dict[str, Any]:
    """Write ``adapters/NAME.onnx_adapter`` and return its entry of deployment.json."""
    path = folder / files.ADAPTERS / f"{name}.onnx_adapter"
    write_onnx_adapter(path, {key: array[None] for key, array in rows.items()}, layout)
    adapter = fitted.adapter
    last = f"adapter_head.{layout.heads[-1][0]}.bias" if layout.heads else ""
    count = rows[last].shape[0] if last in rows else 0
    if adapter.labels and count and len(adapter.labels) != count:
        raise AdapterMismatchError(
            f"{adapter.source}: {len(adapter.labels)} labels for a head of {count} rows.", hint="Save the adapter again."
        )
    return {
        "file": f"{files.ADAPTERS}/{path.name}",
        "sha256": files.file_sha256(path),
        "family": adapter.family,
        "labels": list(adapter.labels) or [f"LABEL_{i}" for i in range(count)],
        "n": adapter.settings.get("n") or max(delta.parameters for delta in adapter.deltas.values()),
        "task": adapter.task,
        "source_digest": adapter.digest,
        "base": "verified" if fitted.verified else "unverified",
    }


def _validate(
    job: _Job,
    folder: Path,
    plain: Path,
    loaded: Loaded,
    traced: Traced,
    layout: Layout,
    rows: Mapping[str, Arrays],
    progress: Progress,
) -> dict[str, validating.Checked]:
    inputs = validating.inputs_for(loaded.model)
    names = traced.outputs
    required = _defaults(layout) if job.options.adapter_inputs == "required" and layout.kinds else None
    runner = validating.Runner(folder / files.MODEL, names, required)
    nothing = runner(inputs)
    validating.identical(str(folder.name), nothing, _cut(validating.Runner(plain, names)(inputs), nothing))
    want = validating.torch_outputs(loaded.model, inputs, names)
    checks = {"": validating.compare("no adapter", nothing, _cut(want, nothing))}
    for i, (name, fitted) in enumerate(job.fitted.items()):
        progress("validate", i, len(job.fitted))
        adapter = rounded(fitted.adapter, layout.adapter_dtype)
        labels = label_count(adapter, loaded.model) if _headed(job.task) else None
        own = load_torch(job.checkpoint, job.task, labels=labels).model
        if job.options.dtype == "float16":
            _round_torch(own)
        apply_adapter(own, adapter, model_places(adapter, own, job.checkpoint.config), head=_headed(job.task))
        want = validating.torch_outputs(own, inputs, names)
        if required is None:
            got = runner(inputs, adapter=folder / files.ADAPTERS / f"{name}.onnx_adapter")
        else:
            got = runner(inputs, arrays={k: v[None] for k, v in rows[name].items()})
        deltas = {k: v[None] for k, v in rows[name].items() if not k.startswith("adapter_head.")}
        effect = _effect(name, fitted, runner(inputs, arrays=deltas), nothing, got)
        checks[name] = validating.compare(name, got, want, effect=effect)
    return checks


def _effect(name: str, fitted: Fitted, deltas_only: Any, nothing: Any, whole: Any) -> float:
    effect = validating.effect_of(deltas_only, nothing)
    if effect == 0.0 and not any(out.size for answer in nothing for out in answer.values()):
        effect = validating.effect_of(whole, nothing)
    zero = all(isinstance(d, SpectralDelta) and not np.any(d.values) for d in fitted.adapter.deltas.values())
    if effect == 0.0 and not zero:
        raise VerificationError(
            f"{name}: its deltas change no bit of any output.",
            hint="Its values may be too small for this base's precision, or its modules do not reach the outputs.",
        )
    return effect


def _cut(answers: list[validating.Outputs], like: list[validating.Outputs]) -> list[validating.Outputs]:
    """``answers`` without labels where ``like`` has none: what transformers made up for a head is no reference."""
    return [
        {k: v[..., :0] if mine[k].shape[-1] == 0 else v for k, v in answer.items()}
        for answer, mine in zip(answers, like, strict=True)
    ]


def _defaults(layout: Layout) -> Arrays:
    """What a graph with required inputs is fed with when there is no adapter."""
    sites, none = len(layout.sites), {}
    none["adapter_guard"] = np.zeros(layout.guard, np.uint8)
    for kind, prefix in (("hartley", "adapter_"), ("cosine", "adapter_cosine_")):
        if kind in layout.kinds:
            none[f"{prefix}ids"] = np.zeros(1, np.int64)
            none[f"{prefix}values"] = np.zeros((1, sites, 0), layout.adapter_dtype)
            none[f"{prefix}scales"] = np.ones((1, sites), np.float32)
            none[f"{prefix}rows"] = none[f"{prefix}cols"] = np.zeros((1, sites, 0), layout.place_dtype)
    if "head" in layout.kinds:
        none["adapter_head_ids"] = np.zeros(1, np.int64)
        for module, n_in, _ in layout.heads:
            none[f"adapter_head.{module}.weight"] = np.zeros((1, 0, n_in), np.float32)
            none[f"adapter_head.{module}.bias"] = np.zeros((1, 0), np.float32)
    return none


# --- merged ------------------------------------------------------------------------------------------------------


def _export_merged(job: _Job, folder: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, validating.Checked]]:
    import onnx_ir as ir

    options, checkpoint = job.options, job.checkpoint
    weights = options.weights or (1.0,)
    source = _head_of(job)
    loaded = load_torch(checkpoint, job.task)
    adapter = job.fitted[source].adapter if source else None
    if adapter is not None:
        loaded = load_torch(checkpoint, job.task, labels=label_count(adapter, loaded.model))
    before = validating.torch_outputs(loaded.model, validating.inputs_for(loaded.model), _names(job.task))
    for (name, fitted), weight in zip(job.fitted.items(), weights, strict=True):
        places = model_places(fitted.adapter, loaded.model, checkpoint.config)
        apply_adapter(loaded.model, fitted.adapter, places, scale=weight, head=name == source)
    left = loaded.missing - frozenset(adapter.replaced if adapter is not None else ())
    loaded = Loaded(loaded.model, job.task, left)
    _check_missing(job, loaded)
    if left and _headed(job.task):
        raise GraphError(
            f"{', '.join(sorted(left)[:3])} of the head is neither in {checkpoint.folder} nor in the adapter.",
            hint="Train with it in modules_to_save, or export with --task feature-extraction.",
        )
    traced = trace_model(loaded, opset=options.opset)
    progress("export", 1, 4)
    labels = list(adapter.labels) if adapter is not None and adapter.labels else list(traced.base_labels)
    if options.dtype == "float16":
        store_half(traced.graph)
        _round_torch(loaded.model)
    ir.save(traced.graph, folder / files.MODEL, external_data=f"{files.MODEL}.data")
    progress("export", 2, 4)
    fingerprint = fingerprint_of(checkpoint, {p for f in job.fitted.values() for p in f.places.values()})
    changes = {"architectures": [type(loaded.model).__name__]}
    if labels:
        changes |= {"id2label": {str(i): n for i, n in enumerate(labels)}, "label2id": {n: i for i, n in enumerate(labels)}}  # type: ignore[dict-item]
    files.copy_companions(checkpoint, folder, changes)
    files.write_samples(folder / files.FINGERPRINT, fingerprint)
    layout = Layout((), (), (), options.adapter_dtype, (0, 0, 0), {})
    deployment = _deployment(job, loaded, traced, layout, fingerprint.sha256, {})
    if labels:
        deployment["head"] = {"module": None, "in": traced.hidden, "labels": len(labels), "base_labels": labels, "modules": []}
    deployment["merged"] = [
        {"name": name, "weight": weight, "source_digest": f.adapter.digest, "family": f.adapter.family}
        for (name, f), weight in zip(job.fitted.items(), weights, strict=True)
    ]
    inputs = validating.inputs_for(loaded.model)
    want = validating.torch_outputs(loaded.model, inputs, traced.outputs)
    effect = validating.effect_of(want, before)
    got = validating.Runner(folder / files.MODEL, traced.outputs)(inputs)
    return deployment, {"+".join(job.fitted): validating.compare("merged", got, want, effect=effect)}


def _names(task: str) -> tuple[str, ...]:
    return ("last_hidden_state",) if task == "feature-extraction" else ("logits",)


def _head_of(job: _Job) -> str | None:
    """Name of the adapter whose head the merged graph has.

    Raises:
        AdapterMismatchError: several have heads and none is chosen.
        UnknownNameError: the chosen one is not there.
    """
    chosen = job.options.head
    if not _headed(job.task) or chosen == "none":
        return None
    headed = [name for name, f in job.fitted.items() if f.adapter.replaced]
    if chosen is not None:
        if chosen not in headed:
            raise UnknownNameError(f"--head {chosen}: no adapter with a head goes by that.", hint=near_misses(chosen, headed))
        return chosen
    if len(headed) > 1:
        raise AdapterMismatchError(
            f"{', '.join(headed)} have heads of their own, and a merged graph has one.", hint="Choose with --head NAME|none."
        )
    return next(iter(headed), None)


# --- descriptions ------------------------------------------------------------------------------------------------


def _deployment(
    job: _Job, loaded: Loaded, traced: Traced, layout: Layout, fingerprint: str, orders: Mapping[str, Mapping[int, tuple[int, int]]]
) -> dict[str, Any]:
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
        "guard": list(layout.guard),
        "task": job.task,
        "opset": job.options.opset,
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
        "dtype": job.options.dtype,
        "mode": job.options.mode,
        "adapters": {},
    }


def _provenance(job: _Job, deployment: Mapping[str, Any], checks: Mapping[str, validating.Checked]) -> dict[str, Any]:
    return {
        "base": {"name": job.base, "files": files.base_hashes(job.checkpoint)},
        "adapters": {name: f.adapter.digest for name, f in job.fitted.items()},
        "versions": files.versions(),
        "options": {
            "task": job.task,
            "mode": job.options.mode,
            "dtype": job.options.dtype,
            "opset": job.options.opset,
            "adapter_dtype": deployment["adapter_dtype"],
        },
        "validation": {
            "shapes": [list(shape) for shape in validating.SHAPES],
            "tolerance": validating.TOLERANCE,
            "results": {name or "no adapter": checked.as_dict() for name, checked in checks.items()},
        },
        "notes": list(job.notes),
    }

"""Torch with an adapter's ΔW in its weights against what was made of it: a merged checkpoint or an exported folder.

The reference is the base in float32 plus the dense delta; for a folder with a quantised base it is the numbers that
graph stores plus the delta, for an adapter is not to blame for its base, whose own distance is told apart. An exported
folder is run by plain onnxruntime: with the folder's own `.onnx_adapter` where it holds this adapter (by content
digest), else with arrays made for its slots.
Decoders are also asked to go on writing (`verifying_decoder`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy.adapters.fitting import Fitted, fit
from ssh_deploy.checkpoints.index import Checkpoint, open_checkpoint
from ssh_deploy.errors import DeploymentError, VerificationError
from ssh_deploy.graph.patching import apply_adapter, label_count, model_places, rounded
from ssh_deploy.graph.quantizing import hold_quantized
from ssh_deploy.graph.trace import CLASSES, example_inputs, load_torch, resolve_task
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs.export_quantized import TOLERANCE as QUANTIZED
from ssh_deploy.jobs.folder_adapters import layout_of, rows_of
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.validating import Outputs, Runner, first_numbers, torch_outputs
from ssh_deploy.jobs.verdict import Run, Verdict
from ssh_deploy.jobs.verifying_decoder import decoder_verdict, load_tokenizer, prompt_tokens
from ssh_deploy.runtimes.folder import contained, is_exported, open_folder, read_json

#: Largest difference allowed, as a share of the spread of torch's outputs (at least 1), by dtype of the target's
#: weights: float32 is what kernels differ by; the halves carry 2⁻¹¹ and 2⁻⁸ of rounding through every layer.
TOLERANCES = {"F64": 1e-4, "F32": 1e-4, "F16": 2e-2, "BF16": 1e-1}
#: (rows, tokens) of the built-in inputs.
SHAPES = ((8, 6), (8, 16), (4, 33), (1, 9))
_BATCH = 16


def verify_target(
    base: str | Path, adapter: str | Path, target: str | Path, *, texts: Sequence[str] = (), progress: Progress = silent
) -> Verdict:
    """Compare ``target`` with torch.

    Args:
        base: folder or hub id.
        adapter: compact file or PEFT folder.
        target: merged checkpoint, or exported folder (it holds deployment.json).
        texts: to compare on; random token rows of several lengths without.
        progress: told of every stage.

    Raises:
        DeployError: of any kind; numbers that differ are a `Verdict`, not an error.
    """
    checkpoint, target = open_checkpoint(base), Path(target)
    fitted = fit(adapter, checkpoint)
    exported = is_exported(target)
    if exported:
        opened = open_folder(target)
        task, kind, dtype = opened.task, "exported folder", _exported_dtype(target)
    else:
        merged = open_checkpoint(target)
        task, kind, dtype = resolve_task(merged, "auto"), "merged checkpoint", _checkpoint_dtype(merged)
    if task not in CLASSES:
        raise DeploymentError(f"{target}: task {task!r} is unknown.", hint="Export it again with this release.")
    progress("verify", 0, 3)
    headed = task.endswith("classification")
    loaded = load_torch(checkpoint, task)
    labels = label_count(fitted.adapter, loaded.model) if headed else None
    if labels is not None:
        loaded = load_torch(checkpoint, task, labels=labels)
    elif headed and loaded.missing:
        raise VerificationError(
            f"Neither {checkpoint.folder} nor {fitted.adapter.source} has a head for {task}: there are no logits.",
            hint=f"{target} was made for adapters with heads; to compare this one use --task feature-extraction.",
        )
    model = loaded.model
    names: tuple[str, ...] = ("last_hidden_state",) if task == "feature-extraction" else ("logits",)
    if loaded.cache is not None:
        names = (*names, *loaded.cache.outputs)
    quantized = read_json(target, files.DEPLOYMENT).get("quantized") if exported else None
    share = TOLERANCES[dtype] if quantized is None else QUANTIZED
    held = _as_held(fitted, target) if exported else fitted.adapter
    inside = exported and read_json(target, files.DEPLOYMENT).get("mode") == "merged"
    if quantized is not None and not inside:
        hold_quantized(model, quantized, target / files.MODEL)
    apply_adapter(model, held, model_places(held, model, checkpoint.config), head=headed)
    if quantized is not None and inside:  # the adapter was in the weights when they were quantised
        hold_quantized(model, quantized, target / files.MODEL)
    run = _exported(target, fitted, checkpoint, names) if exported else _merged(target, task, names)
    progress("verify", 1, 3)
    torch_run = partial(torch_outputs, model, names=names)
    if loaded.cache is not None:
        prompts = prompt_tokens(checkpoint, loaded, texts)
        packed = exported and opened.decoder is not None and opened.decoder.packed
        found = decoder_verdict(
            run,
            torch_run,
            prompts,
            loaded,
            share=share,
            target=kind,
            progress=progress,
            packed=packed,
            rms=quantized is not None,
        )
        return replace(found, quantized=quantized)
    inputs = _text_inputs(checkpoint, model, texts) if texts else _example_rows(model)
    want = torch_run(inputs)
    got = run(inputs)
    progress("verify", 3, 3)
    found = _verdict(got, want, share, kind)
    return found if quantized is None else _by_rms(found, got, want, quantized)


def _verdict(got: Sequence[Outputs], want: Sequence[Outputs], share: float, target: str) -> Verdict:
    worst, spread, same, places, rows = 0.0, 0.0, 0, 0, 0
    for mine, theirs in zip(got, want, strict=True):
        for name, right in theirs.items():
            left = mine[name]
            if left.shape != right.shape:
                raise VerificationError(
                    f"The target's {name} is {list(left.shape)}, torch's {list(right.shape)}.",
                    hint="The target was made with another head or task.",
                )
            diff = np.abs(left.astype(np.float64) - right)
            worst = max(worst, float(diff.max()) if np.isfinite(diff).all() else float("inf"))
            spread = max(spread, float(np.ptp(right)))
            agree = left.argmax(-1) == right.argmax(-1)
            same, places, rows = same + int(agree.sum()), places + agree.size, rows + left.shape[0]
    tolerance = share * max(1.0, spread)
    return Verdict(worst <= tolerance, worst, same / max(places, 1), rows, tolerance, target)


def _by_rms(found: Verdict, got: Sequence[Outputs], want: Sequence[Outputs], quantized: Mapping[str, Any]) -> Verdict:
    """``found`` judged by the root mean square of the first output's differences."""
    mine, theirs = first_numbers(got), first_numbers(want)
    rms, tolerance = float(np.sqrt(np.square(mine - theirs).mean())), QUANTIZED * float(np.std(theirs))
    return replace(found, ok=rms <= tolerance, tolerance=tolerance, rms_diff=rms, quantized=quantized)


def _merged(target: Path, task: str, names: Sequence[str]) -> Run:
    loaded = load_torch(open_checkpoint(target), task)
    unused = "pooler" if task == "feature-extraction" else "\0"
    if any(unused not in module for module in loaded.missing):
        raise VerificationError(
            f"{target} has no weights for {', '.join(sorted(loaded.missing)[:3])}.",
            hint="Merge again; its head is missing.",
        )
    return partial(torch_outputs, loaded.model, names=names)


def _exported(target: Path, fitted: Fitted, checkpoint: Checkpoint, names: Sequence[str]) -> Run:
    deployment = read_json(target, files.DEPLOYMENT)
    model = contained(target, files.MODEL)
    if deployment.get("mode") == "merged":
        return Runner(model, names)
    layout = layout_of(target, deployment)
    required = files.no_adapter(layout) if deployment.get("adapter_inputs") == "required" else None
    stored = [e for e in deployment["adapters"].values() if e.get("source_digest") == fitted.adapter.digest]
    for entry in stored:
        path = contained(target, entry["file"])
        files.require_digest(path, entry["sha256"])
        if required is None:
            return partial(Runner(model, names), adapter=path)
    rows = rows_of(fitted, layout, checkpoint, headless=not deployment["task"].endswith("classification"))
    return partial(Runner(model, names, required), arrays={key: array[None] for key, array in rows.items()})


def _as_held(fitted: Fitted, target: Path) -> Any:
    """The adapter with values in the dtype in which the folder's graph holds them."""
    deployment = read_json(target, files.DEPLOYMENT)
    sidecar = deployment.get("mode") != "merged"
    return rounded(fitted.adapter, str(deployment["adapter_dtype"])) if sidecar else fitted.adapter


def _exported_dtype(target: Path) -> str:
    return {"float16": "F16"}.get(str(read_json(target, files.DEPLOYMENT).get("dtype")), "F32")


def _checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """The coarsest float dtype among the checkpoint's matrices."""
    found = {checkpoint.dtype(f"{module}.weight") for module in checkpoint.modules()}
    return next((code for code in ("BF16", "F16", "F32") if code in found), "F32")


def _example_rows(model: Any) -> list[dict[str, Any]]:
    limit = int(getattr(model.config, "max_position_embeddings", 0) or getattr(model.config, "n_positions", 0) or 64)
    return [example_inputs(model, batch=b, length=min(n, limit - 2), seed=i) for i, (b, n) in enumerate(SHAPES)]


def _text_inputs(checkpoint: Checkpoint, model: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
    import torch

    tokenizer = load_tokenizer(checkpoint)
    wanted = list(example_inputs(model))  # token_type_ids is zero where a tokenizer gives none
    batches = []
    for start in range(0, len(texts), _BATCH):
        rows = tokenizer(list(texts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt")
        batches.append({name: rows[name] if name in rows else torch.zeros_like(rows["input_ids"]) for name in wanted})
    return batches


def read_texts(path: Path) -> list[str]:
    """Lines of a UTF-8 file, empty ones left out.

    Raises:
        VerificationError: not readable, not UTF-8, or empty.
    """
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationError(f"{path}: cannot be read as UTF-8 text ({error}).", hint="One text a line.") from error
    if not texts:
        raise VerificationError(f"{path}: no text in it.", hint="One text a line.")
    return texts

"""Adapters of an exported folder: their rows, their files, their entries in `deployment.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssh_deploy.adapters.fitting import Fitted
from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.names import canonical
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.reflection import ReflectionDelta
from ssh_deploy.errors import AdapterMismatchError, DeploymentError
from ssh_deploy.graph.bank_file import Arrays, Layout, adapter_rows, write_onnx_adapter
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.runtimes.folder import open_folder


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
    adapter = replace(fitted.adapter, replaced={}) if headless else fitted.adapter
    places = {module: canonical(path, checkpoint.config) for module, path in fitted.places.items()}
    return adapter_rows(adapter, layout, places)


def write_adapter(folder: Path, name: str, fitted: Fitted, rows: Arrays, layout: Layout) -> dict[str, Any]:
    """Write an adapter that fits its base and return its entry of deployment.json.

    Raises:
        AdapterMismatchError: as many labels as its head has not.
    """
    adapter = fitted.adapter
    last = f"adapter_head.{layout.heads[-1][0]}.bias" if layout.heads else ""
    count = rows[last].shape[0] if last in rows else 0
    if adapter.labels and count and len(adapter.labels) != count:
        raise AdapterMismatchError(
            f"{adapter.source}: {len(adapter.labels)} labels for a head of {count} rows.",
            hint="Save the adapter again.",
        )
    return {
        **write_rows(folder, name, rows, layout),
        "family": adapter.family,
        "labels": (list(adapter.labels) or [f"LABEL_{i}" for i in range(count)]) if count else [],
        "n": adapter.settings.get("n") or max(_width(delta) for delta in adapter.deltas.values()),
        "task": adapter.task,
        "source_digest": adapter.digest,
        "base": "verified" if fitted.verified else "unverified",
    }


def _width(delta: Delta) -> int:
    """Coefficients of a spectrum, rank of a product or a thin map, numbers of all else."""
    return delta.rank if isinstance(delta, LowRankDelta | ReflectionDelta) else delta.parameters


def write_rows(folder: Path, name: str, rows: Arrays, layout: Layout) -> dict[str, str]:
    """Write ``adapters/NAME.onnx_adapter`` and return ``file`` and ``sha256`` of its entry."""
    path = folder / files.ADAPTERS / f"{name}.onnx_adapter"
    write_onnx_adapter(path, {key: array[None] for key, array in rows.items()}, layout)
    return {"file": f"{files.ADAPTERS}/{path.name}", "sha256": files.file_sha256(path)}


def layout_of(folder: Path, deployment: Mapping[str, Any]) -> Layout:
    """The adapter inputs of an exported folder's graph.

    Args:
        folder: exported.
        deployment: its deployment.json, checked by `open_folder`.

    Raises:
        AdapterMismatchError: exported without slots.
        DeploymentError: a field that is not as this release writes it.
    """
    if not deployment["kinds"]:
        raise AdapterMismatchError(
            f"{folder} was exported without slots.",
            hint="Export the base again with its adapters, or with --sites and --kinds.",
        )
    try:
        head = deployment.get("head") or {"modules": []}
        heads = tuple((str(m["module"]), int(m["in"]), int(m["out"])) for m in head["modules"])
        sites = tuple((str(s["module"]), int(s["in"]), int(s["out"])) for s in deployment["sites"])
        first, _, second = deployment["guard"]
        dtype = {"float16": "float16", "float32": "float32"}[deployment["adapter_dtype"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DeploymentError(f"{folder}/{files.DEPLOYMENT}: {error!r}.", hint="Export the folder again.") from error
    base = open_folder(folder).base_head()
    return Layout(sites, tuple(deployment["kinds"]), heads, dtype, (int(first), 0, int(second)), base)

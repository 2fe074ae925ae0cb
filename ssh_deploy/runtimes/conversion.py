"""Adapters to rows of banks: an `.onnx_adapter`, a compact file or a PEFT folder; numpy only, nothing trusted.

How numbers are laid out is the exporter's business (`graph.bank_file`); here is what makes it safe to do it at run
time: modules matched to slots, orders of this release compared with the folder's, and for files that are rows
already the guard, the number of rows, places inside their sites and finite values.

What depends on the open folder alone is settled once and kept as long as the few last used folders: its layout, and
which slots a list of modules means. Nothing is kept of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, check_finite
from ssh_deploy.checkpoints.names import match_modules
from ssh_deploy.deltas.spectral import stacked
from ssh_deploy.errors import AdapterMismatchError, DeploymentError
from ssh_deploy.graph.bank_file import PREFIXES, Layout, adapter_rows
from ssh_deploy.graph.spectral_rows import AXES, broken_pointers, output_order, pointer_shapes, spare
from ssh_deploy.runtimes.bank import GUARD, Rows, kind_of
from ssh_deploy.runtimes.folder import Folder, SiteEntry, read_json
from ssh_deploy.runtimes.session import Input, read_parameters

_NO_SLOTS = "Export the base again with its adapters (`--mode sidecar`), or with --sites and --kinds."


def rows_of_file(path: Path, folder: Folder, inputs: Mapping[str, Input]) -> dict[str, dict[str, NDArray[Any]]]:
    """Rows by kind of an ``.onnx_adapter`` made for this folder.

    Raises:
        DeploymentError: unreadable, without this graph's guard (a stranger), or with more than one row.
        AdapterMismatchError: places outside their sites, values not finite, or inputs the graph has not.
    """
    if folder.guard is None:
        raise AdapterMismatchError(f"{path}: {folder.root} was exported without slots.", hint=_NO_SLOTS)
    tensors = read_parameters(path)
    guard = tensors.pop(GUARD, None)
    if guard is None or guard.shape != folder.guard:
        has = "no guard" if guard is None else f"guard {list(guard.shape)}"
        raise DeploymentError(
            f"{path}: carries {has}, this graph's is {list(folder.guard)}: it was made for another export.",
            hint="Its numbers would mean something else here. Add the adapter's own file with `ssh-deploy add`.",
        )
    strange = sorted(set(tensors) - set(inputs))
    if strange:
        raise AdapterMismatchError(
            f"{path}: feeds {strange[0]!r}, which the graph has not.", hint="The file is forged."
        )
    kinds: dict[str, dict[str, NDArray[Any]]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 1 or tensor.shape[0] != 1:
            rows = tensor.shape[0] if tensor.ndim else 0
            raise DeploymentError(
                f"{path}: {name} has {rows} rows, so it is a bank and not one adapter.",
                hint="Load its adapters one by one; banks are for stock onnxruntime, fed with adapter_ids.",
            )
        check_finite(f"{path}: {name}", tensor[0])
        kinds.setdefault(kind_of(name), {})[name] = tensor[0]
    for kind in set(kinds) & set(PREFIXES):
        _check_places(path, kinds[kind], PREFIXES[kind], folder.sites)
    for kind in set(kinds) & set(AXES):
        _check_pointers(path, kinds[kind], kind, folder.sites)
    return kinds


def rows_of_adapter(
    adapter: Adapter, folder: Folder, inputs: Mapping[str, Input], *, rename: bool = False
) -> dict[str, dict[str, NDArray[Any]]]:
    """Rows by kind of an adapter read from its own file, as the exporter would write them.

    ``rename``: also match modules through transformers' renaming tables, which imports it and torch; not for serving.

    Raises:
        AdapterMismatchError: modules that match no site, shapes that are not the base's, a kind of delta or a head
            the graph has no slot for, or values that overflow the graph's dtype.
        DeploymentError: the folder was exported by a release that orders places otherwise.
    """
    if folder.guard is None:
        raise AdapterMismatchError(f"{adapter.source}: {folder.root} was exported without slots.", hint=_NO_SLOTS)
    try:
        places = _places(folder, tuple(adapter.deltas), rename)
    except AdapterMismatchError as error:
        raise AdapterMismatchError(
            f"{adapter.source}: {error.what}",
            hint=f"{error.hint} `ssh-deploy add {folder.root} NAME={adapter.source}` also knows the names that "
            "transformers changed; serving does not import it. New slots need an export with `--sites`.",
        ) from error
    for stack in stacked(adapter.deltas)[0]:
        if stack.axis.name in folder.kinds:
            for side in stack.shape:
                _check_order(stack.axis.name, side, folder)
    kinds: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in adapter_rows(adapter, _layout(folder, tuple(inputs.values())), places).items():
        kinds.setdefault(kind_of(name), {})[name] = array
    return kinds


def head_count(head: Rows, inputs: Mapping[str, Input]) -> int:
    """Labels of a head's rows: the side that the contract calls so; 0 without a head."""
    for name, array in head.items():
        for side, size in zip(inputs[name].shape[1:], array.shape, strict=False):
            if side == "labels":  # an inner layer of the head has an open side of its own
                return int(size)
    return 0


def head_labels(where: str, count: int | None, labels: tuple[str, ...], base: tuple[str, ...]) -> tuple[str, ...]:
    """Class names an adapter answers with: its own, numbered ones for a nameless head, or the base's.

    Args:
        where: names the adapter in the message.
        count: rows of the adapter's own head, None when it has none.
        labels: names its file gives.
        base: names of the base's head.

    Raises:
        AdapterMismatchError: names and rows that are not as many.
    """
    if count is None:
        return base
    if labels and len(labels) != count:
        raise AdapterMismatchError(
            f"{where}: {len(labels)} labels for a head of {count} rows.", hint="Its file is damaged; convert it again."
        )
    return labels or tuple(f"LABEL_{i}" for i in range(count))


@lru_cache(maxsize=64)
def _places(folder: Folder, modules: tuple[str, ...], rename: bool) -> dict[str, str]:
    config = read_json(folder.root, "config.json") if rename else None
    return match_modules(modules, [site.module for site in folder.sites], config=config)


@lru_cache(maxsize=8)
def _layout(folder: Folder, inputs: tuple[Input, ...]) -> Layout:
    """The graph's adapter inputs as the exporter describes them; the head that gives the labels comes last."""
    heads = []
    for entry in inputs:
        if kind_of(entry.name) == "head" and entry.name.endswith(".weight"):
            _, out, inn = entry.shape
            module = entry.name.removeprefix("adapter_head.").removesuffix(".weight")
            heads.append((module, int(inn or 0), out if isinstance(out, int) else 0))
    heads.sort(key=lambda head: head[2] == 0)
    values = next((entry for entry in inputs if entry.name.endswith("_values")), None)
    return Layout(
        sites=tuple((site.module, site.inn, site.out) for site in folder.sites),
        kinds=folder.kinds,
        heads=tuple(heads),
        adapter_dtype=np.dtype(np.float32 if values is None else values.dtype).name,
        guard=folder.guard or (0, 0, 0),
        base_head=folder.base_head(),
    )


def _check_order(axis: str, n: int, folder: Folder) -> None:
    (ours, _), stated = output_order(axis, n), folder.orders.get(axis, {}).get(n)
    if stated != ours:
        raise DeploymentError(
            f"{folder.root}: orders length {n} of {axis} as {stated}, this release as {ours}.",
            hint="Another release exported it: places would be misread. Export the base again with this one.",
        )


def _check_places(path: Path, rows: Rows, prefix: str, sites: tuple[SiteEntry, ...]) -> None:
    """Refuse places that the graph would refuse at run time, where they would fail other rows' batches too."""
    for part, sides in (("rows", [s.out for s in sites]), ("cols", [s.inn for s in sites])):
        places = rows.get(f"{prefix}{part}")
        if places is None or places.ndim != 2 or places.shape[0] != len(sites):
            continue  # the bank's own check names what is wrong with it
        if places.min(initial=0) < 0 or (places.max(axis=1, initial=0) >= sides).any():
            site, k = np.argwhere((places < 0) | (places >= np.array(sides)[:, None]))[0]
            raise AdapterMismatchError(
                f"{path}: coefficient {k} of {sites[site].module} has {part[:-1]} {places[site, k]}, outside "
                f"0…{sides[site] - 1}.",
                hint="The file is damaged or forged.",
            )
        ascends = places[:, 1:] > places[:, :-1]
        if part == "rows" and ascends.any():
            site, k = np.argwhere(ascends)[0]
            raise AdapterMismatchError(
                f"{path}: rows of {sites[site].module} ascend at coefficient {k + 1}; the contract has them descend.",
                hint="The file is damaged or forged.",
            )


def _check_pointers(path: Path, rows: Rows, kind: str, sites: tuple[SiteEntry, ...]) -> None:
    """Refuse row pointers that lead anywhere but once through the coefficients."""
    outs = [site.out for site in sites]
    values, shapes = rows.get(f"{AXES[kind]}values"), pointer_shapes(kind, outs)
    fits = all(name in rows and rows[name].shape == shape for name, shape in shapes.items())
    if values is None or values.ndim != 2 or not fits:
        return  # the bank's own check names what is wrong with it
    n = max(values.shape[1] - spare(kind), 0)
    name = broken_pointers(rows, kind, outs, n)
    if name is not None:
        raise AdapterMismatchError(
            f"{path}: {name} do not lead through {n} coefficients from 0 upwards.",
            hint="The file is damaged or forged.",
        )

"""Adapters to rows of banks: an `.onnx_adapter`, a compact file or a PEFT folder; numpy only, nothing trusted.

A spectral delta becomes values as they are in its file, one float32 scale per site (α, the orthonormal transforms'
share and the expansion factor of joint spectra) and places renumbered to the order in which the graph's two-stage
transforms put their outputs. Sites that an adapter leaves alone get no coefficient: value 0, scale 0.
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
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterMismatchError, DeploymentError, near_misses
from ssh_deploy.runtimes.bank import GUARD, Rows, kind_of
from ssh_deploy.runtimes.folder import Folder, SiteEntry
from ssh_deploy.runtimes.session import Input, read_parameters
from ssh_deploy.transforms.base import Axis

_PREFIX = {"hartley": "adapter_", "cosine": "adapter_cosine_"}


def rows_of_file(path: Path, folder: Folder, inputs: Mapping[str, Input]) -> dict[str, dict[str, NDArray[Any]]]:
    """Rows by kind of an ``.onnx_adapter`` made for this folder.

    Raises:
        DeploymentError: unreadable, without this graph's guard (a stranger), or with more than one row.
        AdapterMismatchError: places outside their sites, values not finite, or inputs the graph has not.
    """
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
    for kind in set(kinds) & set(_PREFIX):
        _check_places(path, kinds[kind], _PREFIX[kind], folder.sites)
    return kinds


def rows_of_adapter(
    adapter: Adapter, folder: Folder, inputs: Mapping[str, Input]
) -> dict[str, dict[str, NDArray[Any]]]:
    """Rows by kind of an adapter read from its own file.

    Raises:
        AdapterMismatchError: modules that match no site, shapes that are not the base's, a kind of delta or a head
            the graph has no slot for, or values that overflow the graph's dtype.
    """
    sites = {site.module: site for site in folder.sites}
    try:
        found = match_modules(adapter.deltas, sites)
    except AdapterMismatchError as error:
        raise AdapterMismatchError(
            f"{adapter.source}: {error.what}",
            hint=f"{error.hint} Slots are fixed at export: `ssh-deploy export --sites …` reserves more.",
        ) from error
    groups: dict[str, dict[int, SpectralDelta]] = {}
    for module, delta in adapter.deltas.items():
        site = sites[found[module]]
        if tuple(delta.shape) != (site.out, site.inn):
            raise AdapterMismatchError(
                f"{adapter.source}: {module} is {list(delta.shape)}, the base's weight is {[site.out, site.inn]}.",
                hint="This adapter belongs to another base.",
            )
        kind = delta.axis.name if isinstance(delta, SpectralDelta) else delta.kind
        if not isinstance(delta, SpectralDelta) or f"{_PREFIX.get(kind, '')}values" not in inputs:
            raise AdapterMismatchError(
                f"{adapter.source}: {module} needs a {kind} slot; this graph has {', '.join(folder.kinds) or 'none'}.",
                hint=f"Export again with `--kinds {','.join([*folder.kinds, kind])}`.",
            )
        groups.setdefault(kind, {})[site.index] = delta
    rows: dict[str, dict[str, NDArray[Any]]] = {
        kind: _spectral_rows(adapter, deltas, folder, kind, inputs) for kind, deltas in groups.items()
    }
    if adapter.replaced:
        rows["head"] = _head_rows(adapter, inputs)
    return rows


def head_count(head: Rows, inputs: Mapping[str, Input]) -> int:
    """Labels of a head's rows: the side that the graph leaves open; 0 without a head."""
    for name, array in head.items():
        for side, size in zip(inputs[name].shape[1:], array.shape, strict=False):
            if isinstance(side, str):
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


def _spectral_rows(
    adapter: Adapter, deltas: Mapping[int, SpectralDelta], folder: Folder, kind: str, inputs: Mapping[str, Input]
) -> dict[str, NDArray[Any]]:
    prefix = _PREFIX[kind]
    spectra = {index: delta.separable() for index, delta in deltas.items()}
    shape = (len(folder.sites), max(s.values.size for s in spectra.values()))
    values = np.zeros(shape, dtype=inputs[f"{prefix}values"].dtype)
    scales = np.zeros(shape[0], dtype=np.float32)
    rows = np.zeros(shape, dtype=inputs[f"{prefix}rows"].dtype)
    cols = np.zeros(shape, dtype=inputs[f"{prefix}cols"].dtype)
    for index, spectrum in spectra.items():
        delta, n = deltas[index], spectrum.values.size
        with np.errstate(over="ignore"):
            values[index, :n] = spectrum.values
        if not np.isfinite(values[index, :n]).all():
            raise AdapterMismatchError(
                f"{adapter.source}: values up to {float(np.abs(spectrum.values).max()):.4g} overflow {values.dtype}.",
                hint="Export the base with `--adapter-dtype float32`.",
            )
        scales[index] = delta.gain * spectrum.factor
        rows[index, :n] = _order(delta.axis, delta.shape[0], folder)[spectrum.rows]
        cols[index, :n] = _order(delta.axis, delta.shape[1], folder)[spectrum.cols]
    return {f"{prefix}values": values, f"{prefix}scales": scales, f"{prefix}rows": rows, f"{prefix}cols": cols}


def _order(axis: Axis, n: int, folder: Folder) -> NDArray[np.int64]:
    p, q, order = _two_stage_order(axis, n)
    stated = folder.orders.get(axis.name, {}).get(n)
    if stated != (p, q):
        raise DeploymentError(
            f"{folder.root}: orders length {n} of {axis.name} as {stated}, this release as {(p, q)}.",
            hint="Another release exported it: places would be misread. Export the base again with this one.",
        )
    return order


@lru_cache(maxsize=64)
def _two_stage_order(axis: Axis, n: int) -> tuple[int, int, NDArray[np.int64]]:
    stages = axis.two_stage(n)
    return stages.p, stages.q, stages.order


def _head_rows(adapter: Adapter, inputs: Mapping[str, Input]) -> dict[str, NDArray[Any]]:
    slots = {name for name in inputs if kind_of(name) == "head" and name.startswith("adapter_head.")}
    modules = {name.removeprefix("adapter_head.").rpartition(".")[0] for name in slots}
    heads = {}
    for module, head in adapter.replaced.items():
        if module not in modules:
            raise AdapterMismatchError(
                f"{adapter.source}: it trained {module!r} whole, and the graph has no slot for it.",
                hint=f"{near_misses(module, modules)} Export again with this adapter among the given ones.",
            )
        for part, tensor in head.tensors.items():
            name = f"adapter_head.{module}.{part}"
            if name not in slots:
                raise AdapterMismatchError(f"{adapter.source}: {module}.{part} has no slot.", hint=f"There is {slots}.")
            heads[name] = np.ascontiguousarray(tensor, dtype=np.float32)
        bias = f"adapter_head.{module}.bias"
        if bias in slots and bias not in heads:  # a head without bias
            heads[bias] = np.zeros(heads[f"adapter_head.{module}.weight"].shape[0], dtype=np.float32)
    return heads


def _check_places(path: Path, rows: Rows, prefix: str, sites: tuple[SiteEntry, ...]) -> None:
    for part, sides in (("rows", [s.out for s in sites]), ("cols", [s.inn for s in sites])):
        places = rows.get(f"{prefix}{part}")
        if places is None or places.ndim != 2 or places.shape[0] != len(sites):
            continue  # the bank's own check names what is wrong with it
        outside = np.argwhere((places < 0) | (places >= np.array(sides)[:, None]))
        if outside.size:
            site, k = outside[0]
            raise AdapterMismatchError(
                f"{path}: coefficient {k} of {sites[site].module} has {part[:-1]} {places[site, k]}, outside "
                f"0…{sides[site] - 1}.",
                hint="The file is damaged or forged.",
            )

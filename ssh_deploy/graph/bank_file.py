"""`.onnx_adapter` files and the arrays in them: adapters as the optional inputs of one exported graph.

An adapter becomes one row of each bank it uses: spectra as `spectral_rows`, low-rank adapters as `lowrank_rows`,
scales, thin maps and values at places as `structured_rows` lay them out. Sites that it leaves alone hold zeros with
scale 0. Heads that it did not train are the base's own. Needs numpy, and onnxruntime to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.checkpoints.whole import whole_file
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.deltas.factoring import exact_product, is_thin
from ssh_deploy.deltas.formula import FormulaDelta, RelativeDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.reflection import ReflectionDelta
from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.deltas.spectral import SpectralDelta, Stack, stacked
from ssh_deploy.errors import AdapterMismatchError, DependencyError, near_misses
from ssh_deploy.graph.lowrank_rows import product_rows, stack_padded
from ssh_deploy.graph.spectral_rows import AXES, is_of, spectrum_rows
from ssh_deploy.graph.structured_rows import SIDED, SPARSE, sided_rows, sparse_rows

GUARD = "adapter_guard"
#: kinds of values at places, and how their inputs begin
PREFIXES = {**AXES, "sparse": SPARSE}
#: kinds of arrays padded with zeros, and how their inputs begin
PADDED = {"lowrank": "adapter_lowrank_", **SIDED}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Layout:
    """The adapter inputs of one graph.

    Attributes:
        sites: (module, in, out) by row of the ``sites`` dimension.
        kinds: of slots.
        heads: (module, in, out; 0 where unknown) of head slots, the one that gives the labels last.
        adapter_dtype: ``float16`` or ``float32``.
        guard: shape of the guard.
        base_head: the base's own head tensors by ``module.weight`` and ``module.bias``; empty without one.
    """

    sites: tuple[tuple[str, int, int], ...]
    kinds: tuple[str, ...]
    heads: tuple[tuple[str, int, int], ...]
    adapter_dtype: str
    guard: tuple[int, int, int]
    base_head: Mapping[str, NDArray[Any]]

    @cached_property
    def table(self) -> Mapping[str, tuple[int, tuple[int, int]]]:
        """Row and (out, in) of each site by its module."""
        return {module: (row, (n_out, n_in)) for row, (module, n_in, n_out) in enumerate(self.sites)}

    @cached_property
    def place_dtype(self) -> np.dtype[Any]:
        """Of rows and columns: uint16, or int32 where a side exceeds 65,536."""
        highest = max((side for _, *sides in self.sites for side in sides), default=1)
        return np.dtype(np.uint16 if highest <= 1 << 16 else np.int32)


def adapter_rows(adapter: Adapter, layout: Layout, places: Mapping[str, str]) -> Arrays:
    """One row of each bank that ``adapter`` uses, by input name, without the leading row dimension.

    Args:
        adapter: deltas that slots can hold, and replaced heads.
        layout: of the graph.
        places: module of ``layout.sites`` by the adapter's module path.

    Raises:
        AdapterMismatchError: a site, kind or head that the graph has no slot for, or values that overflow.
    """
    where, values = str(adapter.source), np.dtype(layout.adapter_dtype)
    spectra: dict[str, list[Stack[int]]] = {}
    by_kind: dict[str, dict[int, Any]] = {}
    stacks, others = stacked(adapter.deltas)
    for stack in stacks:
        rows = tuple(_row(where, module, stack.axis.name, stack.shape, layout, places) for module in stack.keys)
        spectra.setdefault(stack.axis.name, []).append(stack.at(rows))
    for module, delta in others.items():
        kind = slot_kind(f"{where}: {module}", delta)
        row = _row(where, module, kind, delta.shape, layout, places)
        by_kind.setdefault(kind, {})[row] = exact_product(delta) if kind == "lowrank" else delta
    arrays: Arrays = {}
    for kind, found in spectra.items():
        arrays |= spectrum_rows(where, kind, found, layout.sites, values=values, places=layout.place_dtype)
    for kind, deltas in by_kind.items():
        if kind == "sparse":
            arrays |= sparse_rows(where, deltas, layout.sites, values=values, places=layout.place_dtype)
        else:
            arrays |= padded_rows(where, kind, deltas, layout)
    if adapter.replaced:
        arrays |= _heads(adapter, layout)
    return arrays


def _row(where: str, module: str, kind: str, shape: tuple[int, int], layout: Layout, places: Mapping[str, str]) -> int:
    """Row of the ``sites`` dimension at which the slot of ``kind`` is that takes ``module``'s delta."""
    if kind not in layout.kinds:
        wanted = ",".join(dict.fromkeys([*layout.kinds, kind]))
        raise AdapterMismatchError(
            f"{where}: {module} needs a {kind} slot; the graph has {', '.join(layout.kinds) or 'none'}.",
            hint=f"Export the base again with --kinds {wanted}.",
        )
    found = layout.table.get(places.get(module, ""))
    if found is None:
        raise AdapterMismatchError(
            f"{where}: {module} has no slot in the graph; {len(layout.table)} other modules have.",
            hint=f"{near_misses(module, layout.table)} Export again with --sites attention, linear or a glob.",
        )
    row, wanted_shape = found
    if wanted_shape != shape:
        raise AdapterMismatchError(
            f"{where}: {module} is for a weight of {list(shape)}, the graph's is {list(wanted_shape)}.",
            hint="This adapter belongs to another base.",
        )
    return row


def padded_rows(where: str, kind: str, deltas: Mapping[int, Any], layout: Layout) -> Arrays:
    """One row of a bank of `PADDED`; without ``deltas`` what means "no adapter"."""
    if kind == "lowrank":
        return product_rows(where, deltas, layout.sites)
    return sided_rows(where, kind, deltas, layout.sites)


def slot_kind(where: str, delta: Delta) -> str:
    """Kind of slot that holds ``delta``.

    Raises:
        AdapterMismatchError: none can, and why; ``where`` names the delta.
    """
    if isinstance(delta, SpectralDelta):
        return delta.axis.name
    if isinstance(delta, LowRankDelta | SparseDelta | DiagonalDelta | ReflectionDelta):
        return delta.kind
    if isinstance(delta, FormulaDelta) and is_thin(delta, delta.shape):
        return "lowrank"
    why = "it is neither a sparse spectrum nor a product of two thin matrices nor values at a few places"
    if isinstance(delta, RelativeDelta):
        why = "it changes a weight by what that weight is, and a slot only sees what passes through it"
    elif isinstance(delta, FormulaDelta) and delta.product_rank is not None:
        why = f"it is a product of rank {delta.product_rank}, whose factors are larger than ΔW itself"
    raise AdapterMismatchError(
        f"{where}: no slot can hold a {delta.kind} delta: {why}.",
        hint="Merge it: `ssh-deploy merge`, or export with --mode merged.",
    )


def stack_rows(rows: Sequence[Arrays], layout: Layout) -> tuple[Arrays, dict[str, list[int]]]:
    """Many adapters as banks: row 0 of each bank is empty (in the head bank: the base's own head), ids count from 1.

    An adapter takes a row only in the banks of the kinds it uses.

    Args:
        rows: of each adapter, as `adapter_rows` made them.
        layout: of the graph.

    Returns:
        arrays by input name, and each adapter's row by ids input (0 where it uses none).
    """
    banks: Arrays = {}
    ids: dict[str, list[int]] = {}
    for kind, prefix in PREFIXES.items():
        if kind not in layout.kinds:
            continue
        ids[f"{prefix}ids"] = _numbers(rows, f"{prefix}values")
        own = [{k: a for k, a in r.items() if is_of(k, prefix)} for r in rows if f"{prefix}values" in r]
        if own:
            banks |= _stack_places(own)
    for kind, prefix in PADDED.items():
        if kind not in layout.kinds or not layout.sites:
            continue
        key = next(iter(padded_rows("nothing", kind, {}, layout)))
        ids[f"{prefix}ids"] = _numbers(rows, key)
        if own := [r for r in rows if key in r]:
            banks |= stack_padded(own, prefix)
    if "head" in layout.kinds and layout.heads:
        last = f"adapter_head.{layout.heads[-1][0]}.bias"
        own = [r for r in rows if last in r]
        ids["adapter_head_ids"] = _numbers(rows, last)
        if own:
            banks |= _stack_heads(own, layout)
    return banks, ids


def _stack_places(own: Sequence[Arrays]) -> Arrays:
    """Rows of one kind of `PREFIXES` as a bank, each array as wide as its widest, row 0 and what is narrower zeros."""
    banks = {}
    for name, first in own[0].items():
        widest = max(r[name].shape[-1] for r in own)
        banks[name] = np.zeros((len(own) + 1, *first.shape[:-1], widest), first.dtype)
        for i, r in enumerate(own, 1):
            banks[name][i, ..., : r[name].shape[-1]] = r[name]
    return banks


def write_onnx_adapter(path: Path, arrays: Mapping[str, NDArray[Any]], layout: Layout) -> None:
    """Write ``arrays`` (each with its leading row dimension) and the guard as an `.onnx_adapter`, whole or not at all.

    Raises:
        DependencyError: onnxruntime is not installed.
        OutputError: cannot be written.
    """
    ort = onnxruntime()
    tensors = {**arrays, GUARD: np.zeros(layout.guard, np.uint8)}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({k: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()})
    with whole_file(path, parents=True) as partial:
        adapter.export_adapter(str(partial))


def onnxruntime() -> Any:
    """The onnxruntime package.

    Raises:
        DependencyError: not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DependencyError(
            f"onnxruntime is not installed ({error}).",
            hint="Install exactly one of `ssh-deploy[cpu]` and `ssh-deploy[gpu]`: they overwrite each other.",
        ) from error
    return ort


def _heads(adapter: Adapter, layout: Layout) -> Arrays:
    known = {module: (n_in, n_out) for module, n_in, n_out in layout.heads}
    strange = [module for module in adapter.replaced if module not in known]
    if strange or "head" not in layout.kinds:
        module = next(iter(strange or adapter.replaced))
        raise AdapterMismatchError(
            f"{adapter.source}: it trained {module!r} whole, and the graph has no slot for that.",
            hint=f"{near_misses(module, known)} Export again with this adapter given, or with --kinds head.",
        )
    arrays: Arrays = {}
    for module, n_in, n_out in layout.heads:
        own = (
            dict(adapter.replaced[module].tensors)
            if module in adapter.replaced
            else _base_head(adapter, module, layout)
        )
        weight = np.ascontiguousarray(own.pop("weight", np.zeros((0, 0))), dtype=np.float32)
        labels = module == layout.heads[-1][0]
        wanted = "labels" if labels or not n_out else n_out
        if (
            weight.ndim != 2
            or weight.shape[1] != n_in
            or (wanted != "labels" and weight.shape[0] != n_out)
            or not weight.size
        ):
            raise AdapterMismatchError(
                f"{adapter.source}: head {module} is {list(weight.shape)}, the graph takes [{wanted}, {n_in}].",
                hint="This head belongs to another base.",
            )
        bias = np.ascontiguousarray(own.pop("bias", np.zeros(weight.shape[0])), dtype=np.float32)
        if bias.shape != weight.shape[:1] or own:
            raise AdapterMismatchError(
                f"{adapter.source}: head {module}: bias {list(bias.shape)}, other tensors {sorted(own)}.",
                hint="A head slot takes one weight and one bias of as many rows.",
            )
        arrays[f"adapter_head.{module}.weight"], arrays[f"adapter_head.{module}.bias"] = weight, bias
    return arrays


def _base_head(adapter: Adapter, module: str, layout: Layout) -> dict[str, NDArray[Any]]:
    found = {
        part: layout.base_head[f"{module}.{part}"]
        for part in ("weight", "bias")
        if f"{module}.{part}" in layout.base_head
    }
    if "weight" not in found:
        raise AdapterMismatchError(
            f"{adapter.source}: its head lacks {module}, and the base has none either.",
            hint=f"Train with {module} in modules_to_save.",
        )
    return found


def _stack_heads(own: Sequence[Arrays], layout: Layout) -> Arrays:
    banks: Arrays = {}
    for module, n_in, _ in layout.heads:
        name = f"adapter_head.{module}"
        base = layout.base_head.get(f"{module}.weight")
        counts = [r[f"{name}.bias"].shape[0] for r in own] + ([base.shape[0]] if base is not None else [])
        weight = np.zeros((len(own) + 1, max(counts), n_in), np.float32)
        bias = np.full((len(own) + 1, max(counts)), -np.inf, np.float32)
        if base is not None:
            weight[0, : base.shape[0]] = base
            bias[0, : base.shape[0]] = layout.base_head.get(f"{module}.bias", 0.0)
        for i, r in enumerate(own, 1):
            weight[i, : r[f"{name}.bias"].shape[0]] = r[f"{name}.weight"]
            bias[i, : r[f"{name}.bias"].shape[0]] = r[f"{name}.bias"]
        banks[f"{name}.weight"], banks[f"{name}.bias"] = weight, bias
    return banks


def _numbers(rows: Sequence[Arrays], key: str) -> list[int]:
    numbers, count = [], 0
    for r in rows:
        count += key in r
        numbers.append(count if key in r else 0)
    return numbers

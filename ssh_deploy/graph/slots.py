"""The pass that gives a plain graph its optional inputs: banks of adapters, gates, and every site's contribution.

Pre-condition: a plain graph as `trace` wrote it, whose sites can take a slot. Post-condition: with the inputs at
their defaults every output has the bits of the plain graph; the adapter inputs are those of the contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from ssh_deploy.errors import GraphError, SlotError, near_misses
from ssh_deploy.graph.emitter import Constants, Emitter
from ssh_deploy.graph.filling import Bank, Filler
from ssh_deploy.graph.kv_cache import PAST
from ssh_deploy.graph.lowering import head as heads
from ssh_deploy.graph.lowering import lowrank, sided, sparse, spectral_bank
from ssh_deploy.graph.lowrank_rows import A, B, site_places, sites_by_width
from ssh_deploy.graph.sites import Call, by_module, find_calls, groups_of, index_table, require_slots
from ssh_deploy.graph.spectral_rows import AXES, pointer_shapes
from ssh_deploy.graph.structured_rows import SIDED
from ssh_deploy.graph.structured_slots import map_inputs, sided_bank, sparse_bank
from ssh_deploy.graph.tails import rename_output


@dataclass(frozen=True, slots=True)
class Plan:
    """What slots a graph is to have.

    Attributes:
        sites: modules of the traced model with slots for deltas.
        kinds: of `lowering.LOWERINGS`, in their order there.
        heads: modules with a head slot.
        missing: head modules that the base does not have.
        adapter_dtype: ``float16`` or ``float32`` of spectral values.
        required: adapter inputs are plain inputs without defaults.
    """

    sites: tuple[str, ...]
    kinds: tuple[str, ...]
    heads: tuple[str, ...]
    missing: frozenset[str]
    adapter_dtype: str = "float16"
    required: bool = False


@dataclass(frozen=True, slots=True)
class Slotted:
    """What was made.

    ``table``: (module, in, out) by row of the ``sites`` dimension; ``heads``: likewise, the one with the labels last.
    """

    table: tuple[tuple[str, int, int], ...]
    heads: tuple[tuple[str, int, int], ...]


def add_slots(model: ir.Model, plan: Plan) -> Slotted:
    """Give ``model`` the optional inputs of ``plan``, in place.

    Raises:
        SlotError: a module of the plan has no site in the graph, or its activation cannot be adapted.
        GraphError: the graph has slots already.
    """
    graph = model.graph
    if any((value.name or "").startswith("adapter_") for value in graph.inputs):
        raise GraphError("The graph has adapter inputs already.", hint="Slots go into a plain graph, once.")
    calls = by_module(find_calls(graph))
    unknown = [name for name in (*plan.sites, *plan.heads) if name not in calls]
    if unknown:
        raise SlotError(
            f"No linear layer of the traced graph is {unknown[0]!r} ({len(unknown)} of "
            f"{len(plan.sites) + len(plan.heads)} modules have no site).",
            hint=f"{near_misses(unknown[0], calls)} Does this task's graph compute it at all?",
        )
    constants = Constants(graph, "adapter")
    first = Emitter(constants, "adapter")
    batch = first.op("Shape", graph.inputs[0], start=0, end=1)
    wanted = [call for name in plan.sites for call in calls[name]]
    order = {id(node): i for i, node in enumerate(graph)}
    wanted.sort(key=lambda call: order[id(call.nodes[0])])
    for call in wanted:
        require_slots(call)
    groups = groups_of(wanted)
    table = index_table(groups)
    sides = {call.module: (call.outputs, call.inputs) for call in wanted}
    shapes = [sides[name] for name in table]
    sizes = _group_sizes(groups, table)
    banks: list[Bank] = [
        _spectral_bank(graph, first, kind, plan, shapes, sizes) for kind in plan.kinds if kind in AXES and table
    ]
    if "lowrank" in plan.kinds and table:
        banks.append(_lowrank_bank(graph, first, plan, batch, shapes))
    places = site_places(table, shapes)
    banks += _structured_banks(graph, first, plan, batch, shapes, places)
    head_calls = sorted((calls[name][0] for name in plan.heads), key=lambda call: order[id(call.nodes[0])])
    if any(len(calls[name]) > 1 for name in plan.heads):
        raise SlotError("A head module is called more than once.", hint="Use --mode merged.")
    head_bank, head_inputs = None, {}
    if head_calls and "head" in plan.kinds:
        head_inputs = _head_inputs(graph, head_calls, plan)
        ids = _batch_ids(graph, first, "adapter_head_ids", "head_requests", batch, plan)
        head_bank = heads.prepare(first, head_inputs, ids)
    graph.insert_before(graph[0], first.nodes)
    Filler(graph, constants, banks, table, places, order).fill(groups)
    for call in wanted:
        for bank in banks:
            if isinstance(bank, sided.SidedBank):
                map_inputs(graph, constants, bank, call)
    for call in head_calls:
        _replace_head(graph, constants, call, head_bank, head_inputs, plan, batch, last=call is head_calls[-1])
    graph.sort()
    rows = tuple((name, sides[name][1], sides[name][0]) for name in table)
    return Slotted(rows, tuple((call.module, call.inputs, call.outputs) for call in head_calls))


def _group_sizes(groups: Sequence[Sequence[Call]], table: Mapping[str, int]) -> list[int]:
    """How many rows of the table each group has, in the table's order; groups of the same modules count once."""
    found = {}
    for group in groups:
        rows = {table[call.module] for call in group}
        found[min(rows)] = len(rows)
    return [size for _, size in sorted(found.items())]


def _input(
    graph: ir.Graph, name: str, dtype: ir.DataType, sides: Sequence[int | str], default: object, plan: Plan
) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(sides), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    if not plan.required:
        value.const_value = ir.tensor(np.asarray(default, dtype=dtype.numpy()), name=name)
        graph.register_initializer(value)
    return value


def _ids(graph: ir.Graph, emitter: Emitter, name: str, requests: str, plan: Plan) -> ir.Value:
    """The ids input ``name``, one for the batch or one a row, int64 [1] or [batch].

    Negative ids, which Gather would count from the end, are turned into ids beyond any bank.
    """
    ids = _input(graph, name, ir.DataType.INT64, [requests], [0], plan)
    beyond = emitter.const(np.iinfo(np.int64).max, np.int64)
    return emitter.op("Where", emitter.op("Less", ids, emitter.const(0, np.int64)), beyond, ids)


def _batch_ids(graph: ir.Graph, emitter: Emitter, name: str, requests: str, batch: ir.Value, plan: Plan) -> ir.Value:
    """`_ids`, one for every row of the batch, int64 [batch]."""
    return emitter.op("Reshape", emitter.op("Expand", _ids(graph, emitter, name, requests, plan), batch), batch)


def _spectral_bank(
    graph: ir.Graph,
    emitter: Emitter,
    kind: str,
    plan: Plan,
    shapes: Sequence[tuple[int, int]],
    groups: Sequence[int],
) -> spectral_bank.SpectralBank:
    prefix = AXES[kind]
    dims = prefix.removeprefix("adapter_")
    sides: tuple[int | str, ...] = (f"{dims}adapters", len(shapes), f"{dims}coefficients")
    ids = _ids(graph, emitter, f"{prefix}ids", f"{dims}requests", plan)
    values = ir.DataType.FLOAT16 if plan.adapter_dtype == "float16" else ir.DataType.FLOAT
    places = ir.DataType.from_numpy(place_dtype(shapes))
    none = np.zeros((1, len(shapes), 0))
    inputs = {
        "values": _input(graph, f"{prefix}values", values, sides, none, plan),
        "scales": _input(graph, f"{prefix}scales", ir.DataType.FLOAT, sides[:2], np.ones((1, len(shapes))), plan),
        "cols": _input(graph, f"{prefix}cols", places, sides, none, plan),
    }
    pointers = {}
    for name, (count, width) in pointer_shapes(kind, [shape[0] for shape in shapes]).items():
        rows, default = (f"{dims}adapters", count, width), np.zeros((1, count, width))
        pointers[width - 1] = _input(graph, name, ir.DataType.UINT16, rows, default, plan)
    cached = {name.rpartition(".")[0] for value in graph.inputs if (name := value.name or "").startswith(PAST)}
    return spectral_bank.prepare(
        emitter, kind, inputs, pointers, ids, like=graph.inputs[0], shapes=shapes, groups=groups, layers=len(cached)
    )


def _lowrank_bank(
    graph: ir.Graph, emitter: Emitter, plan: Plan, batch: ir.Value, shapes: Sequence[tuple[int, int]]
) -> lowrank.LowRankBank:
    ids = _batch_ids(graph, emitter, "adapter_lowrank_ids", "lowrank_requests", batch, plan)
    inputs, outputs = (sites_by_width([shape[side] for shape in shapes]) for side in (1, 0))
    rank, float32 = "lowrank_rank", ir.DataType.FLOAT
    a, b = {}, {}
    for n, sites in inputs.items():
        sides: tuple[int | str, ...] = ("lowrank_adapters", len(sites), rank, n)
        a[n] = _input(graph, f"{A}{n}", float32, sides, np.zeros((1, len(sites), 0, n)), plan)
    for n, sites in outputs.items():
        sides = ("lowrank_adapters", len(sites), n, rank)
        b[n] = _input(graph, f"{B}{n}", float32, sides, np.zeros((1, len(sites), n, 0)), plan)
    most = max(len(sites) for sites in (*inputs.values(), *outputs.values()))
    return lowrank.prepare(emitter, a, b, ids, most=most)


def _structured_banks(
    graph: ir.Graph,
    emitter: Emitter,
    plan: Plan,
    batch: ir.Value,
    shapes: Sequence[tuple[int, int]],
    sites: Mapping[str, tuple[int, int]],
) -> list[sparse.SparseBank | sided.SidedBank]:
    declare = partial(_input, graph, plan=plan)
    ids = partial(_batch_ids, graph, emitter, batch=batch, plan=plan)
    banks: list[sparse.SparseBank | sided.SidedBank] = []
    if "sparse" in plan.kinds and sites:
        values = ir.DataType.FLOAT16 if plan.adapter_dtype == "float16" else ir.DataType.FLOAT
        places = ir.DataType.from_numpy(place_dtype(shapes))
        banks.append(sparse_bank(emitter, declare, ids, shapes, values=values, places=places))
    kinds = [kind for kind in SIDED if kind in plan.kinds and sites]
    return banks + [sided_bank(emitter, kind, declare, ids, shapes, sites) for kind in kinds]


def place_dtype(shapes: Sequence[tuple[int, int]]) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Of places in weights of ``shapes``: uint16, or int32 where a side exceeds 65,536."""
    return np.dtype(np.uint16) if max(side for shape in shapes for side in shape) <= 1 << 16 else np.dtype(np.int32)


def _head_inputs(graph: ir.Graph, calls: Sequence[Call], plan: Plan) -> dict[str, dict[str, ir.Value]]:
    found = {}
    for call in calls:
        labels = "labels" if call is calls[-1] else f"{call.module}.out"
        name, sides = f"adapter_head.{call.module}", ("head_adapters", labels)
        weight = _input(
            graph, f"{name}.weight", ir.DataType.FLOAT, [*sides, call.inputs], np.zeros((1, 0, call.inputs)), plan
        )
        bias = _input(graph, f"{name}.bias", ir.DataType.FLOAT, sides, np.zeros((1, 0)), plan)
        found[call.module] = {"weight": weight, "bias": bias}
    return found


def _replace_head(
    graph: ir.Graph,
    constants: Constants,
    call: Call,
    bank: heads.HeadBank | None,
    inputs: Mapping[str, Mapping[str, ir.Value]],
    plan: Plan,
    batch: ir.Value,
    *,
    last: bool,
) -> None:
    """Put the bank's head (or nothing, where there is neither) in the place of ``call``'s nodes."""
    emitter = Emitter(constants, f"adapter/head/{call.module}")
    # a base that lacks any part of its head has none: its labels would come from made-up numbers
    base = call.module not in plan.missing and not (last and plan.missing)
    if bank is not None:
        weight = inputs[call.module]["weight"]
        made = heads.answer(emitter, bank, call, weight, base=base, last=last, batch=batch)
    elif base:
        return
    else:
        made = heads.nothing(emitter, call, last=last, batch=batch)
    made.dtype = ir.DataType.FLOAT
    old = call.result
    graph.insert_before(call.nodes[0], emitter.nodes)
    for node, i in list(old.uses()):
        if node not in emitter.nodes:
            node.replace_input_with(i, made)
    rename_output(graph, old, made)
    _forget_shapes(made)
    graph.remove(list(reversed(call.nodes)), safe=True)


def _forget_shapes(value: ir.Value) -> None:
    """Drop the shapes that were traced with the base's own number of labels."""
    left, seen = [value], set()
    while left:
        current = left.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        current.shape = None
        for node in current.consumers():
            left.extend(node.outputs)

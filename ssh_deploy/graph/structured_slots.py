"""Slots for scales, thin maps and sparse changes: their inputs, and layers that read their input through a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Constants, Emitter
from ssh_deploy.graph.lowering import sided, sparse
from ssh_deploy.graph.lowrank_rows import sites_by_width
from ssh_deploy.graph.sites import Call
from ssh_deploy.graph.structured_rows import SIDED, SPARSE

#: Declares an adapter input: name, dtype, sides, default.
Declare = Callable[[str, ir.DataType, Sequence[int | str], object], ir.Value]
#: Declares an ids input and checks it: its name, the name of its side.
DeclareIds = Callable[[str, str], ir.Value]


def sparse_bank(
    emitter: Emitter,
    declare: Declare,
    ids: DeclareIds,
    shapes: Sequence[tuple[int, int]],
    *,
    values: ir.DataType,
    places: ir.DataType,
) -> sparse.SparseBank:
    """Declare the inputs of the sparse kind and emit what its sites share.

    Args:
        emitter: of the outermost graph.
        declare: see `Declare`.
        ids: see `DeclareIds`.
        shapes: (out, in) of every site.
        values: dtype of values.
        places: dtype of rows and columns.
    """
    sides: tuple[int | str, ...] = ("sparse_adapters", len(shapes), "sparse_values")
    checked, none = ids(f"{SPARSE}ids", "sparse_requests"), np.zeros((1, len(shapes), 0))
    inputs = {
        "values": declare(f"{SPARSE}values", values, sides, none),
        "scales": declare(f"{SPARSE}scales", ir.DataType.FLOAT, sides[:2], np.ones((1, len(shapes)))),
        "rows": declare(f"{SPARSE}rows", places, sides, none),
        "cols": declare(f"{SPARSE}cols", places, sides, none),
    }
    return sparse.prepare(emitter, inputs, checked, shapes=shapes)


def sided_bank(
    emitter: Emitter,
    kind: str,
    declare: Declare,
    ids: DeclareIds,
    shapes: Sequence[tuple[int, int]],
    places: Mapping[str, tuple[int, int]],
) -> sided.SidedBank:
    """Declare the inputs of ``kind`` and emit what its sites share.

    Args:
        emitter: of the outermost graph.
        kind: ``diagonal`` or ``reflection``.
        declare: see `Declare`.
        ids: see `DeclareIds`.
        shapes: (out, in) of every site.
        places: of each module among the sites of its ``in`` and of its ``out``.
    """
    checked = ids(f"{SIDED[kind]}ids", f"{kind}_requests")
    parts = () if kind == "diagonal" else (2,)
    arrays: dict[str, dict[int, ir.Value]] = {}
    for side, i in ((sided.IN, 1), (sided.OUT, 0)):
        arrays[side] = {}
        for width, members in sites_by_width([shape[i] for shape in shapes]).items():
            sides = (f"{kind}_adapters", len(members), *parts, f"{kind}_{side}", width)
            none = np.zeros((1, len(members), *parts, 0, width))
            arrays[side][width] = declare(f"{SIDED[kind]}{side}.{width}", ir.DataType.FLOAT, sides, none)
    return sided.prepare(emitter, kind, arrays, checked, places)


def map_inputs(graph: ir.Graph, constants: Constants, bank: sided.SidedBank, call: Call) -> None:
    """Have ``call`` read its activation plus what ``bank`` adds to it; after other kinds have found what it reads."""
    x = call.activation
    emitter = Emitter(constants, f"adapter/{bank.kind}/{call.module}/read")
    then, other = emitter.branch("there"), emitter.branch("absent")
    term, absent = sided.read(then, bank, call), other.op("Gather", x, other.const(np.zeros(0), np.int64), axis=0)
    (added,) = emitter.when(bank.gates[sided.IN], then, [term], other, [absent], dtype=ir.DataType.FLOAT)
    mapped = emitter.op("ScatterND", x, bank.batches[sided.IN], added, reduction="add")
    mapped.shape, mapped.dtype = x.shape, ir.DataType.FLOAT
    if call.reader is call.nodes[0]:
        call.reader.replace_input_with(0, mapped)
    else:  # a Reshape, which other calls may read through too
        flat = emitter.op("Reshape", mapped, *call.reader.inputs[1:], **dict(call.reader.attributes))
        flat.shape, flat.dtype = call.reader.outputs[0].shape, ir.DataType.FLOAT
        call.nodes[0].replace_input_with(0, flat)
    graph.extend(emitter.nodes)

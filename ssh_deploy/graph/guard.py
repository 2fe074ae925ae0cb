"""The guard: a zero-byte optional input whose shape ties adapters to the one graph whose places they mean.

Rows and columns of a spectrum are numbered in the order in which this graph's transforms put their outputs, and
sites by this graph's table. Fed to another graph of equal widths they would mean something else and no shape would
tell. So the graph has an input `adapter_guard`, uint8 [g1, 0, g2], with g1 and g2 from a sha256 of all that gives
those numbers their meaning; every `.onnx_adapter` carries it, and ORT refuses one whose shape differs. It costs no
byte. It must be the last pass: quantisers delete inputs that nothing reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ssh_deploy.errors import GraphError

#: Version of the contract of exported graphs.
CONTRACT = 4
GUARD = "adapter_guard"
#: Order of a site's coefficients, part of what the guard covers (`lowering.spectral`).
COEFFICIENT_ORDER = "compressed by rows"


def guard_shape(
    *,
    fingerprint: str,
    sites: Sequence[tuple[str, int, int]],
    orders: Mapping[str, Mapping[int, tuple[int, int]]],
    kinds: Sequence[str],
    heads: Sequence[str],
) -> tuple[int, int, int]:
    """``(g1, 0, g2)`` with g1, g2 in 1…2³¹−1.

    Args:
        fingerprint: sha256 of the base.
        sites: (module, in, out) in the order of the table.
        orders: (p, q) of each length by axis.
        kinds: of slots, in order.
        heads: modules with a head slot, in order.
    """
    meaning = {
        "contract": CONTRACT,
        "coefficients": COEFFICIENT_ORDER,
        "fingerprint": fingerprint,
        "sites": [list(site) for site in sites],
        "orders": {axis: {str(n): list(pq) for n, pq in sorted(pairs.items())} for axis, pairs in orders.items()},
        "kinds": list(kinds),
        "heads": list(heads),
    }
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") % ((1 << 31) - 1) + 1 for i in (0, 4))
    return first, 0, second


def add_guard(model: ir.Model, shape: tuple[int, int, int], *, required: bool = False) -> None:
    """Add the guard input to ``model``; nothing reads it.

    Raises:
        GraphError: the graph has one already.
    """
    if any(value.name == GUARD for value in model.graph.inputs):
        raise GraphError(f"The graph has an input {GUARD} already.", hint="It was exported with slots before.")
    value = ir.Value(name=GUARD, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.UINT8))
    model.graph.inputs.append(value)
    if not required:
        value.const_value = ir.tensor(np.zeros(shape, np.uint8), name=GUARD)
        model.graph.register_initializer(value)

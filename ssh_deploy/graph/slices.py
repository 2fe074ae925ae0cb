"""Slices that cut one value apart, as rotary positions do with query and key, as one Split: a node and not several.

onnxruntime does the same, but not behind a node of several outputs, which an If of slots is. So it is done before.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def split_where_sliced(graph: ir.Graph) -> None:
    """Put a Split in the place of Slices of one value that share it among themselves along its last axis, in place."""
    for node in list(graph):
        for value in node.outputs:
            slices = [use.node for use in value.uses() if use.idx == 0 and use.node.op_type == "Slice"]
            side = value.shape[-1] if value.shape is not None and len(value.shape) else None
            if len(slices) < 2 or not isinstance(side, int):
                continue
            parts = {part: each for each in slices if (part := _part(each, len(value.shape or ()), side)) is not None}
            ends = [0, *(end for _, end in sorted(parts))]
            if len(parts) < len(slices) or [start for start, _ in sorted(parts)] != ends[:-1] or ends[-1] != side:
                continue
            ordered = [parts[part] for part in sorted(parts)]
            name = f"{value.name}/split"
            lengths = ir.Value(name=f"{name}/lengths", const_value=ir.tensor(np.diff(ends).astype(np.int64)))
            lengths.shape, lengths.dtype = ir.Shape([len(ordered)]), ir.DataType.INT64
            graph.register_initializer(lengths)
            split = ir.node("Split", [value, lengths], {"axis": -1}, num_outputs=len(ordered), name=name)
            split.metadata_props.update(ordered[0].metadata_props)
            graph.insert_after(node, split)
            for each, made in zip(ordered, split.outputs, strict=True):
                old = each.outputs[0]
                made.shape, made.type, made.name = old.shape, old.type, f"{old.name}/part"
                for user, i in list(old.uses()):
                    user.replace_input_with(i, made)
            graph.remove(ordered, safe=True)


def _part(node: ir.Node, rank: int, side: int) -> tuple[int, int] | None:
    """Where a Slice begins and ends on the last axis, of ``side``; None where it cuts another one, steps, or may."""
    given = [value.const_value.numpy() if value and value.const_value else None for value in node.inputs[1:]]
    if len(given) < 3 or any(each is None or each.size != 1 for each in given) or node.outputs[0].is_graph_output():
        return None
    start, end, axis, step = (int(each.item()) for each in [*given, np.ones(1)][:4] if each is not None)
    if axis not in (-1, rank - 1) or step != 1:
        return None
    start, end = (max(0, min(side, at + side if at < 0 else at)) for at in (start, end))
    return (start, end) if start < end else None

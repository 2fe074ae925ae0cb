"""A graph on disk: weights in one file beside it, and inside it whatever shape inference has to read."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

#: bytes: sizes of Split and Reshape are read when ORT infers shapes in branches, and must not lie in another file
_INLINE = 1 << 14


def save_graph(model: ir.Model, path: Path) -> None:
    """Write ``model`` to ``path`` and its weights to ``path`` with ``.data`` behind its name."""
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE)

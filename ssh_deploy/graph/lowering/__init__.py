"""How each kind of delta becomes nodes: one module per kind, found by name in a literal table."""

from __future__ import annotations

import importlib
from typing import Any

#: kind of slot: module of its lowering
LOWERINGS = {
    "hartley": "ssh_deploy.graph.lowering.spectral",
    "cosine": "ssh_deploy.graph.lowering.spectral",
    "lowrank": "ssh_deploy.graph.lowering.lowrank",
    "sparse": "ssh_deploy.graph.lowering.sparse",
    "diagonal": "ssh_deploy.graph.lowering.sided",
    "reflection": "ssh_deploy.graph.lowering.sided",
    "head": "ssh_deploy.graph.lowering.head",
}


def lowering(kind: str) -> Any:
    """The module that lowers ``kind`` (a key of `LOWERINGS`)."""
    return importlib.import_module(LOWERINGS[kind])

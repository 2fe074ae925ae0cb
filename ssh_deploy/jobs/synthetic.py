"""Made-up adapters for an exported folder: valid files of random content, to test and to measure with.

Their deltas have the size of the weights they are added to, so that every adapter's answers are its own.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.graph.spectral_rows import AXES
from ssh_deploy.runtimes.bank import kind_of
from ssh_deploy.runtimes.deployment import Deployment

_STRENGTH = 0.05  # root mean square of ΔW
_FAMILIES = {"hartley": ("ssh", "backward"), "cosine": ("sdctft", "ortho")}


def synthetic_adapter(deployment: Deployment, *, seed: int, most: int, labels: int = 0) -> Adapter:
    """A random adapter that fits ``deployment``: some of its sites, one of its kinds, any n up to ``most``.

    Args:
        deployment: whose slots it is for.
        seed: of everything random in it.
        most: coefficients of a site.
        labels: of its head; 0: none.
    """
    rng = np.random.default_rng(seed)
    folder = deployment.folder
    kind = str(rng.choice([kind for kind in folder.kinds if kind in AXES]))
    chosen = rng.permutation(len(folder.sites))[: rng.integers(max(1, len(folder.sites) // 2), len(folder.sites) + 1)]
    sites = [folder.sites[i] for i in sorted(chosen)]
    n = min(int(rng.integers(1, most + 1)), *(site.out * site.inn for site in sites))
    family, norm = _FAMILIES[kind]
    size = math.sqrt(sites[0].out * sites[0].inn)
    alpha = _STRENGTH * size / math.sqrt(n) * (size if norm == "backward" else 1.0)
    deltas = {}
    for site in sites:
        rows, cols = np.divmod(rng.choice(site.out * site.inn, n, replace=False), site.inn)
        places = np.uint16 if max(site.out, site.inn) <= 1 << 16 else np.uint32
        values = rng.normal(size=n).astype(np.float32)
        deltas[site.module] = SpectralDelta(
            (site.out, site.inn), kind, rows.astype(places), cols.astype(places), values, alpha, norm
        )
    return Adapter(
        family=family,
        deltas=deltas,
        replaced={
            module: ReplacedModule(
                {
                    "weight": rng.normal(size=(rows, depth)).astype(np.float32) / math.sqrt(depth),
                    "bias": rng.normal(size=rows).astype(np.float32),
                }
            )
            for module, rows, depth in (_head_shapes(deployment, labels) if labels else ())
        },
        digest="",
        source=Path("synthetic"),
        fingerprint=folder.samples(),
        task="text-classification" if labels else None,
        labels=tuple(f"label-{i}" for i in range(labels)),
        settings={"n": n, "delta_ratio": 0.7, "seed": seed},
    )


def _head_shapes(deployment: Deployment, labels: int) -> list[tuple[str, int, int]]:
    """(module, rows, depth) of the head's modules; an inner one has as many rows as the next is deep."""
    weights = [
        entry for name, entry in deployment.adapter_inputs.items() if kind_of(name) == "head" and len(entry.shape) == 3
    ]
    depths = [int(entry.shape[2] or 0) for entry in weights]
    names = [entry.name.removeprefix("adapter_head.").removesuffix(".weight") for entry in weights]
    return list(zip(names, [*depths[1:], labels], depths, strict=True))

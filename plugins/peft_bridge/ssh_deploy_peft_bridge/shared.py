"""Which of a TinyLoRA's shared vectors is which module's: read off the projections, whose seeds count the modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import AdapterFiles
from ssh_deploy.adapters.peft_folder import number
from ssh_deploy.errors import AdapterFileError

_V = "base_model.tinylora_v."


def tinylora_vectors(
    files: AdapterFiles, modules: Mapping[str, Mapping[str, NDArray[Any]]], shared: Mapping[str, NDArray[Any]]
) -> dict[str, dict[str, NDArray[Any]]]:
    """Each module's tensors with the one vector that it uses, under the name of the first.

    PEFT counts the modules in the order of the model, which no file tells; it seeds the projection P of number i
    with ``projection_seed + i`` and gives vector ``i // (modules // vectors)`` to it. So i is the one whose P is
    the P in the file.

    Raises:
        AdapterFileError: vectors are missing, or a projection is none of the seed's.
    """
    import torch

    vectors = [shared.get(f"{_V}{k}") for k in range(len(shared))]
    if not vectors or any(v is None for v in vectors) or len(vectors) > len(modules):
        raise AdapterFileError(
            f"{files.folder}: {sorted(shared)[:4]} are not one vector for each group of its {len(modules)} modules.",
            hint="The file is incomplete.",
        )
    seed, each = int(number(files, "projection_seed")), max(1, len(modules) // len(vectors))
    found = {}
    for path, tensors in modules.items():
        p = tensors.get(f"{path}.tinylora_P")
        drawn = None
        if p is not None and p.ndim == 3 and p.shape[1]:
            stored = torch.from_numpy(np.array(p, dtype=np.float32))
            for i in range(len(modules)):
                generator = torch.Generator().manual_seed(seed + i)
                made = torch.normal(0.0, 1.0 / p.shape[1] ** 0.5, size=p.shape, generator=generator)
                if torch.allclose(made, stored, rtol=1e-2, atol=1e-3):  # the file may hold it in half precision
                    drawn = i
                    break
        if drawn is None:
            raise AdapterFileError(
                f"{files.folder}: {path}.tinylora_P is not what projection_seed {seed} gives any of its "
                f"{len(modules)} modules.",
                hint="Save it with PEFT's save_projection=True, all modules of the model together.",
            )
        own = vectors[min(drawn // each, len(vectors) - 1)]
        assert own is not None
        found[path] = {**tensors, f"{_V}0": own}
    return found

"""HRA: ``W′ = W Π (I − 2 uᵢuᵢᵀ)``, r reflections in a row; with ``apply_GS`` at vectors made orthogonal first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of, number
from ssh_deploy.deltas.reflection import ReflectionDelta, reflected
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_structured.folders import expect, modules_of, written

_U = "hra_u"


@dataclass(frozen=True, slots=True)
class HRAFamily:
    """Tensor ``<module>.hra_u`` [in, r]; ``r`` and ``apply_GS`` of the config."""

    name: str = "hra"
    peft_type: str = "HRA"
    slots: tuple[str, ...] = ("reflection",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        r, orthogonal = number(files, "r"), files.config.get("apply_GS", False)
        if not isinstance(orthogonal, bool):
            raise AdapterFileError(
                f"{files.folder}/{CONFIG}: apply_GS is {orthogonal!r:.40}.", hint="It is true or false."
            )
        modules, rest = modules_of(files, (_U,), needed=(_U,))
        deltas = {}
        for module, (where, shape, tensors) in modules.items():
            expect(where, _U, tensors[_U], (shape[1], int(r)))
            vectors = tensors[_U].T.astype(np.float64)
            if orthogonal:
                vectors = _orthogonal(vectors)
            if not np.linalg.norm(vectors, axis=1).all():
                raise AdapterFileError(
                    f"{where}: a column of {_U} has length zero{' once orthogonal' * orthogonal}.",
                    hint="There is no plane to reflect at; PEFT would make NaN of it.",
                )
            deltas[module] = ReflectionDelta(shape, tensors, inner=reflected(vectors))
        return adapter_of(files, self.name, deltas, rest, {"r": int(r), "apply_GS": orthogonal})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        return {key: adapter.settings[key] for key in ("r", "apply_GS")}

    def tensors(self, module: str, delta: ReflectionDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return written(module, delta.vectors)


def _orthogonal(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gram–Schmidt over the rows of ``vectors``, in order; what is left of a dependent row is zero."""
    made: list[NDArray[np.float64]] = []
    for row in vectors:
        left = row.copy()
        for other in made:
            left -= (other @ left) * other
        length = np.linalg.norm(left)
        made.append(left / length if length > 1e-12 * np.linalg.norm(row) else np.zeros_like(left))
    return np.array(made)


HRA = HRAFamily()

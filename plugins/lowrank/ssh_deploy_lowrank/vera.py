"""VeRA: ``ΔW = (λ_b ⊙ B) (λ_d ⊙ A)``, A and B random, frozen and shared by all modules; each takes their first rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_shape
from ssh_deploy.adapters.peft_folder import adapter_of, by_module, module_shape
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_lowrank.folders import all_of, floats, refuse

_A, _B = "base_model.vera_A", "base_model.vera_B"
_LAMBDA_B, _LAMBDA_D = "vera_lambda_b", "vera_lambda_d"


@dataclass(frozen=True, slots=True, eq=False)
class VeRADelta(LowRankDelta):
    """The product, and what it was made of: the projections [r, in…], [out…, r] and the module's own λ [out], [r]."""

    projections: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    of_rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    of_rank: NDArray[Any] = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True)
class VeRA:
    """Tensors `_A` [r, widest in], `_B` [widest out, r]; ``<module>.vera_lambda_b`` [out], ``.vera_lambda_d`` [r]."""

    name: str = "vera"
    peft_type: str = "VERA"
    slots: tuple[str, ...] = ("lowrank",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        refuse(files, {"bias": "it changes biases, and deltas change weights."}, harmless=["none"])
        modules, rest = by_module(files, (_LAMBDA_B, _LAMBDA_D))
        shared = {name: rest.pop(name) for name in (_A, _B) if name in rest}
        if len(shared) != 2:
            raise AdapterFileError(
                f"{files.folder}: the shared projections vera_A and vera_B are not both in the file.",
                hint="Save it with save_projection=True: they are never drawn again from a seed.",
            )
        shared = floats(str(files.folder), shared)
        deltas = {m: _delta(files, m, parts, shared[_A], shared[_B]) for m, parts in modules.items()}
        key = files.config.get("projection_prng_key")
        settings = {"r": int(shared[_A].shape[0]), **({"projection_prng_key": key} if type(key) is int else {})}
        return adapter_of(files, self.name, deltas, rest, settings)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        return {**adapter.settings, "save_projection": True, "module_shapes": None}

    def tensors(self, module: str, delta: VeRADelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`; float32; the projections are every module's."""
        own = {f"{module}.{_LAMBDA_B}": delta.of_rows, f"{module}.{_LAMBDA_D}": delta.of_rank}
        return {name: np.ascontiguousarray(t, np.float32) for name, t in {**own, **delta.projections}.items()}


def _delta(
    files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]], a: NDArray[Any], b: NDArray[Any]
) -> VeRADelta:
    where = f"{files.folder}: {module}"
    all_of(where, parts, [_LAMBDA_B, _LAMBDA_D])
    found = floats(where, parts, dims=1)
    of_rows, of_rank = found[_LAMBDA_B].astype(np.float32), found[_LAMBDA_D].astype(np.float32)
    out, inn = check_shape(where, module_shape(files, module))
    r = of_rank.size
    if of_rows.size != out or a.shape[0] != r or b.shape[1] != r or a.shape[1] < inn or b.shape[0] < out:
        raise AdapterFileError(
            f"{where}: {of_rows.size} and {r} numbers with projections of {list(a.shape)} and {list(b.shape)} "
            f"for a weight of {out}×{inn}.",
            hint="It belongs to another base, or the file is damaged.",
        )
    left, right = of_rows[:, None] * b[:out].astype(np.float32), of_rank[:, None] * a[:, :inn].astype(np.float32)
    projections = {_A: a, _B: b}
    return VeRADelta(right, left, trained=out + r, projections=projections, of_rows=of_rows, of_rank=of_rank)


VERA = VeRA()

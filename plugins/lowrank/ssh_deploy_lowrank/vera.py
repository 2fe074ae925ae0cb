"""VeRA: ``ΔW = (λ_b ⊙ B) (λ_d ⊙ A)``, A and B random, frozen and shared by all modules; each takes their first rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_shape
from ssh_deploy.adapters.peft_folder import adapter_of, by_module, module_shape
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy_lowrank.folders import all_of, floats, refuse

_A, _B = "base_model.vera_A", "base_model.vera_B"
_LAMBDA_B, _LAMBDA_D = "vera_lambda_b", "vera_lambda_d"


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
        return adapter_of(files, self.name, deltas, rest, {"r": int(shared[_A].shape[0])})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """Refused: what was read is the products, not the projections they share."""
        raise AdapterMismatchError(
            f"{adapter.source}: a VeRA is read, merged and lent to slots, not written.",
            hint="Copy its folder.",
        )

    def tensors(self, module: str, delta: LowRankDelta) -> dict[str, NDArray[Any]]:
        """Both factors as they stand in ΔW (for comparisons; `config` refuses to write them)."""
        return {f"{module}.a": delta.a, f"{module}.b": delta.b}


def _delta(
    files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]], a: NDArray[Any], b: NDArray[Any]
) -> LowRankDelta:
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
    return LowRankDelta(right, left, trained=out + r)


VERA = VeRA()

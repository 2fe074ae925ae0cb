"""LoHa: ``ΔW = α/r · (w1_a w1_b) ⊙ (w2_a w2_b)``, the entrywise product of two low-rank matrices.

It is itself a product, of rank r²: column (p, q) of the left factor is column p of w1_a times column q of w2_a, entry
by entry; rows of the right one likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import adapter_of, by_module
from ssh_deploy.deltas.formula import FormulaDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_lowrank.folders import all_of, alpha_and_rank, alphas_and_ranks, floats

if TYPE_CHECKING:
    import torch

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, slots=True, eq=False)
class LoHaDelta(FormulaDelta):
    """``factors``: the four matrices in the order of `_PARTS`, [out, r], [r, in], [out, r], [r, in]; one float."""

    factors: tuple[NDArray[Any], ...]
    scaling: float

    kind: ClassVar[str] = "hadamard"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.factors[0].shape[0], self.factors[1].shape[1]

    @property
    def rank(self) -> int:
        """Rank r of either product."""
        return int(self.factors[1].shape[0])

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(int(factor.size) for factor in self.factors)

    @property
    def product_rank(self) -> int:
        """See `FormulaDelta.product_rank`."""
        return self.rank**2

    def product(self) -> LowRankDelta:
        """See `FormulaDelta.product`."""
        w1_a, w1_b, w2_a, w2_b = (factor.astype(np.float64) for factor in self.factors)
        (out, inn), rank = self.shape, self.product_rank
        left = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(out, rank)
        right = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(rank, inn)
        return LowRankDelta(right.astype(np.float32), left.astype(np.float32), self.scaling, trained=self.parameters)

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `Delta.dense`."""
        import torch

        work = torch.float64 if dtype == torch.float64 else torch.float32
        w1_a, w1_b, w2_a, w2_b = (torch.from_numpy(np.array(f)).to(device, work) for f in self.factors)
        return ((w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(self.scaling)).to(dtype or work)


@dataclass(frozen=True, slots=True)
class LoHa:
    """Tensors ``<module>.hada_w1_a`` and so on; four to a module."""

    name: str = "loha"
    peft_type: str = "LOHA"
    slots: tuple[str, ...] = ("lowrank",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        modules, rest = by_module(files, _PARTS)
        deltas = {module: self._delta(files, module, parts) for module, parts in modules.items()}
        settings = {k: files.config.get(k) for k in ("r", "alpha")}
        return adapter_of(files, self.name, deltas, rest, {k: v for k, v in settings.items() if v})

    def _delta(self, files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]]) -> LoHaDelta:
        where = f"{files.folder}: {module}"
        all_of(where, parts, _PARTS)
        found = floats(where, parts)
        alpha, r = alpha_and_rank(files, module, alpha="alpha")
        out, inn = found[_PARTS[0]].shape[0], found[_PARTS[1]].shape[1]
        shapes = [tuple(found[part].shape) for part in _PARTS]
        if shapes != [(out, r), (r, inn)] * 2:
            raise AdapterFileError(
                f"{where}: matrices of {shapes} are not two products of rank {r} (the config's) and of one shape.",
                hint="Its config and its weights do not belong together.",
            )
        return LoHaDelta(tuple(found[part] for part in _PARTS), alpha / r)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        deltas = {m: d for m, d in adapter.deltas.items() if isinstance(d, LoHaDelta)}
        return alphas_and_ranks({m: (d.scaling, d.rank) for m, d in deltas.items()}, alpha="alpha")

    def tensors(self, module: str, delta: LoHaDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`; float32."""
        return {f"{module}.{p}": np.array(f, dtype=np.float32) for p, f in zip(_PARTS, delta.factors, strict=True)}


LOHA = LoHa()

"""LoKr: ``ΔW = α/r · w1 ⊗ w2`` (Kronecker), each factor whole or a product of two thin matrices.

``(A₁B₁) ⊗ (A₂B₂) = (A₁ ⊗ A₂)(B₁ ⊗ B₂)``: a product whose rank is that of w1 times that of w2, where a whole factor
counts its shorter side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import adapter_of, by_module
from ssh_deploy.deltas.formula import FormulaDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_lowrank.folders import alpha_and_rank, alphas_and_ranks, floats

if TYPE_CHECKING:
    import torch

_W1, _W2 = "lokr_w1", "lokr_w2"
_PARTS = tuple(f"{w}{end}" for w in (_W1, _W2) for end in ("", "_a", "_b"))
_CONVOLUTION = "lokr_t2"


@dataclass(frozen=True, slots=True, eq=False)
class LoKrDelta(FormulaDelta):
    """``parts``: factors by PEFT's names, one float: ``lokr_w1`` [m, n] or ``_a`` [m, r] and ``_b`` [r, n]; w2 too."""

    parts: Mapping[str, NDArray[Any]]
    scaling: float
    rank: int

    kind: ClassVar[str] = "kronecker"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        (m, n), (p, q) = (self._sides(w) for w in (_W1, _W2))
        return m * p, n * q

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(int(part.size) for part in self.parts.values())

    @property
    def product_rank(self) -> int:
        """See `FormulaDelta.product_rank`."""
        left, right = (pair[0].shape[1] for pair in map(self._pair, (_W1, _W2)))
        return int(left * right)

    def product(self) -> LowRankDelta:
        """See `FormulaDelta.product`."""
        (a1, b1), (a2, b2) = self._pair(_W1), self._pair(_W2)
        left, right = np.kron(a1, a2).astype(np.float32), np.kron(b1, b2).astype(np.float32)
        return LowRankDelta(right, left, self.scaling, trained=self.parameters)

    def _pair(self, w: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Factor ``w`` as a product, float64; a whole one times the identity of its shorter side."""
        if w not in self.parts:
            a, b = (self.parts[f"{w}{end}"].astype(np.float64) for end in ("_a", "_b"))
            return a, b
        whole = self.parts[w].astype(np.float64)
        rows, cols = whole.shape
        return (np.eye(rows), whole) if rows <= cols else (whole, np.eye(cols))

    def dense(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `Delta.dense`."""
        import torch

        work = torch.float64 if dtype == torch.float64 else torch.float32
        p = {name: torch.from_numpy(np.array(part)).to(device, work) for name, part in self.parts.items()}
        one, two = (p[w] if w in p else p[f"{w}_a"] @ p[f"{w}_b"] for w in (_W1, _W2))
        return torch.kron(one, two * self.scaling).to(dtype or work)

    def _sides(self, w: str) -> tuple[int, int]:
        rows, cols = (self.parts[w if w in self.parts else f"{w}{end}"] for end in ("_a", "_b"))
        return rows.shape[0], cols.shape[1]


@dataclass(frozen=True, slots=True)
class LoKr:
    """Tensors ``<module>.lokr_w1`` or ``.lokr_w1_a`` and ``_b``; ``.lokr_w2`` likewise."""

    name: str = "lokr"
    peft_type: str = "LOKR"
    slots: tuple[str, ...] = ("lowrank",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        modules, rest = by_module(files, (*_PARTS, _CONVOLUTION))
        deltas = {module: self._delta(files, module, parts) for module, parts in modules.items()}
        settings = {k: files.config.get(k) for k in ("r", "alpha", "decompose_factor")}
        return adapter_of(files, self.name, deltas, rest, {k: v for k, v in settings.items() if v})

    def _delta(self, files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]]) -> LoKrDelta:
        where = f"{files.folder}: {module}"
        if _CONVOLUTION in parts:
            raise AdapterFileError(f"{where} adapts a convolution.", hint="Only linear modules take a delta.")
        found, (alpha, r) = floats(where, parts), alpha_and_rank(files, module, alpha="alpha")
        for w in (_W1, _W2):
            names = [name for name in (w, f"{w}_a", f"{w}_b") if name in found]
            if names not in ([w], [f"{w}_a", f"{w}_b"]):
                raise AdapterFileError(
                    f"{where} has {' and '.join(names) or 'nothing'} for {w}.",
                    hint=f"Either {w} or both {w}_a and {w}_b are needed.",
                )
            if len(names) == 2 and not found[names[0]].shape[1] == found[names[1]].shape[0] == r:
                shapes = f"{list(found[names[0]].shape)} and {list(found[names[1]].shape)}"
                raise AdapterFileError(
                    f"{where}: rank {r} in the config, {w} is made of {shapes}.",
                    hint="Its config and its weights do not belong together.",
                )
        return LoKrDelta(found, alpha / r, r)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        deltas = {m: d for m, d in adapter.deltas.items() if isinstance(d, LoKrDelta)}
        shared = alphas_and_ranks({m: (d.scaling, d.rank) for m, d in deltas.items()}, alpha="alpha")
        both = any(f"{_W1}_a" in d.parts for d in deltas.values())
        return {**shared, "decompose_both": both, "decompose_factor": adapter.settings.get("decompose_factor", -1)}

    def tensors(self, module: str, delta: LoKrDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`; float32."""
        return {f"{module}.{name}": np.array(part, dtype=np.float32) for name, part in delta.parts.items()}


LOKR = LoKr()

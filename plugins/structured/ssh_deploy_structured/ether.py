"""ETHER: ``W′ = W H`` with blocks ``I − 2uuᵀ/|u|²``; ETHER+: ``I − uuᵀ/|u|² + vvᵀ/|v|²``, on one side or on both.

With several blocks on the side of the inputs there are two readings, and the config's ``blocks`` says which:

- ``diagonal``: ``W′ = W blockdiag(H₁ … Hₙ)``, the formula of the paper.
- ``memory``: what the released code does. It takes the numbers of W [out, in] as they lie in memory for an array
  [n, out, in/n] and multiplies part r with Hᵣ, so that *rows* choose the block: the c-th run of in/n numbers of W gets
  block ⌊c/out⌋. Merged only: no one change of a layer's input does that.

On the side of the answers (``flip_side``, and the second map of a two-sided ETHER+) both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.reflection import ReflectionDelta, ThinMap
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_structured.folders import Module, expect, modules_of, written

if TYPE_CHECKING:
    import torch

_INNER, _OUTER = ("ether_R", "ether_R2"), ("ether_R3", "ether_R4")
MEMORY, DIAGONAL = "memory", "diagonal"


@dataclass(frozen=True, slots=True, eq=False)
class MemoryBlocksDelta(RelativeDelta):
    """The ``memory`` reading: ``runs`` [n, rank, in/n] twice, I + pᵀq of each block; then ``then``."""

    runs: tuple[NDArray[np.float64], NDArray[np.float64]]
    then: ReflectionDelta

    kind: ClassVar[str] = "memory-blocks"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.then.shape

    @property
    def vectors(self) -> Any:
        """What was trained."""
        return self.then.vectors

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return self.then.parameters

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """See `RelativeDelta.change`."""
        import torch

        p, q = (torch.from_numpy(part).to(weight) for part in self.runs)
        cut = weight.reshape(p.shape[0], self.shape[0], -1)
        moved = (cut + (cut @ p.transpose(1, 2)) @ q).reshape(self.shape)
        return self.then.change(moved) + (moved - weight)


@dataclass(frozen=True, slots=True)
class Ether:
    """Tensors ``<module>.ether_R`` [n, in/n] (with ``flip_side``: [n, out/n]); ETHER+ also ``.ether_R2``.

    A two-sided ETHER+ has ``.ether_R3`` and ``.ether_R4`` [n, out/n] too.
    """

    name: str
    peft_type: str
    relaxed: bool
    slots: tuple[str, ...] = ("reflection",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        flipped, reading = files.config.get("flip_side", False), files.config.get("blocks")
        if not isinstance(flipped, bool) or reading not in (None, MEMORY, DIAGONAL):
            raise AdapterFileError(
                f"{files.folder}/{CONFIG}: flip_side is {flipped!r:.40}, blocks is {reading!r:.40}.",
                hint=f"flip_side is true or false, blocks {MEMORY} or {DIAGONAL}.",
            )
        needed = _INNER if self.relaxed else _INNER[:1]
        modules, rest = modules_of(files, (*needed, *(_OUTER if self.relaxed else ())), needed=needed)
        deltas = {m: self._delta(files, found, flipped=flipped, reading=reading) for m, found in modules.items()}
        settings = {"flip_side": flipped, "blocks": reading}
        return adapter_of(files, self.name, deltas, rest, {key: value for key, value in settings.items() if value})

    def _delta(
        self, files: AdapterFiles, module: Module, *, flipped: bool, reading: str | None
    ) -> ReflectionDelta | MemoryBlocksDelta:
        where, shape, tensors = module
        both = [name for name in _OUTER if name in tensors]
        if len(both) == 1 or (both and flipped):
            raise AdapterFileError(
                f"{where} has {' and '.join(sorted(tensors))}{' with flip_side' * flipped}.",
                hint=f"A two-sided ETHER+ has all of {', '.join((*_INNER, *_OUTER))} and is not flipped.",
            )
        names = _INNER if self.relaxed else _INNER[:1]
        first = self._blocks(where, names, tensors, shape[0] if flipped else shape[1])
        outer = first if flipped else self._blocks(where, _OUTER, tensors, shape[0]) if both else None
        ends = None if outer is None else _whole(*outer)
        if flipped:
            return ReflectionDelta(shape, tensors, outer=ends)
        if len(first[0]) > 1 and reading is None:
            raise AdapterFileError(
                f"{where}: {len(first[0])} blocks, and the config does not say how they lie (blocks).",
                hint=f"Write blocks: {MEMORY} for an adapter of the released code, {DIAGONAL} for W·blockdiag(H).",
            )
        if len(first[0]) > 1 and reading == MEMORY:
            return MemoryBlocksDelta(first, ReflectionDelta(shape, tensors, outer=ends))
        return ReflectionDelta(shape, tensors, inner=_whole(*first), outer=ends)

    def _blocks(
        self, where: str, names: tuple[str, ...], tensors: dict[str, NDArray[Any]], side: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The blocks ``I + pᵀq``: p and q, float64 [n, rank, side/n]."""
        expect(where, names[0], tensors[names[0]], ("blocks", "width"))
        count = tensors[names[0]].shape[0]
        for name in names:
            if side % count:
                raise AdapterFileError(
                    f"{where}: {name} has {count} blocks, which do not divide a side of {side}.",
                    hint="It was made for a weight of another shape.",
                )
            expect(where, name, tensors[name], (count, side // count))
        u = np.stack([tensors[name].astype(np.float64) for name in names], axis=1)
        lengths = np.linalg.norm(u, axis=2, keepdims=True)
        if not lengths.all():
            raise AdapterFileError(
                f"{where}: a vector of {' or '.join(names)} has length zero.",
                hint="There is no plane to reflect at; the released code would make NaN of it.",
            )
        u = u / lengths
        return u * (np.array([-1.0, 1.0])[:, None] if self.relaxed else -2.0), u

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        return {key: adapter.settings[key] for key in ("flip_side", "blocks") if key in adapter.settings}

    def tensors(self, module: str, delta: ReflectionDelta | MemoryBlocksDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return written(module, delta.vectors)


def _whole(p: NDArray[np.float64], q: NDArray[np.float64]) -> ThinMap:
    """The block-diagonal map of blocks [n, rank, width]: each row with zeros outside its own block."""
    count, rank, width = p.shape
    wide = np.zeros((2, count, rank, count, width))
    for i in range(count):
        wide[:, i, :, i] = p[i], q[i]
    p, q = wide.reshape(2, count * rank, count * width)
    return ThinMap(p, q)


ETHER, ETHER_PLUS = Ether("ether", "ETHER", relaxed=False), Ether("ether-plus", "ETHER_PLUS", relaxed=True)

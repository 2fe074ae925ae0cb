"""Trainable tokens: rows of an embedding put in the place of the base's own, ``W′[i] = rows[i]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_finite, check_shape
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of, by_module, module_shape
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.errors import AdapterFileError

if TYPE_CHECKING:
    import torch

_PART = "trainable_tokens_delta"


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows(RelativeDelta):
    """``rows`` f16 or f32 [n, in] for the ``places`` int64 [n], distinct, of an embedding of ``sides`` [out, in]."""

    sides: tuple[int, int]
    places: NDArray[np.int64]
    rows: NDArray[Any]

    kind: ClassVar[str] = "tokens"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in): the vocabulary and the width."""
        return self.sides

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return int(self.rows.size)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """See `RelativeDelta.change`."""
        import torch

        places = torch.from_numpy(self.places).to(weight.device)
        rows = torch.from_numpy(np.array(self.rows, dtype=np.float32)).to(weight)
        return torch.zeros_like(weight).index_copy_(0, places, rows - weight[places])


@dataclass(frozen=True, slots=True)
class TrainableTokens:
    """Tensor ``<embedding>.trainable_tokens_delta`` [n, in]; the config's ``token_indices`` say which rows."""

    name: str = "trainable-tokens"
    peft_type: str = "TRAINABLE_TOKENS"
    slots: tuple[str, ...] = ()

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        modules, rest = by_module(files, (_PART,))
        deltas = {module: self._delta(files, module, parts[_PART]) for module, parts in modules.items()}
        return adapter_of(files, self.name, deltas, rest, {})

    @staticmethod
    def _delta(files: AdapterFiles, module: str, rows: NDArray[Any]) -> TokenRows:
        where = f"{files.folder}: {module}"
        shape = check_shape(where, module_shape(files, module))
        listed = files.config.get("token_indices")
        good = isinstance(listed, list) and all(type(i) is int and 0 <= i < shape[0] for i in listed)
        if not good or not listed or len(set(listed)) != len(listed):
            raise AdapterFileError(
                f"{files.folder}/{CONFIG}: token_indices {listed!r:.60} are not distinct rows below {shape[0]}.",
                hint="It belongs to a base with another vocabulary, or the file is damaged.",
            )
        if rows.shape != (len(listed), shape[1]) or rows.dtype.kind in "iub":
            raise AdapterFileError(
                f"{where}: {_PART} is {rows.dtype} {list(rows.shape)}; {len(listed)} rows of {shape[1]} were expected.",
                hint="Its config and its weights do not belong together.",
            )
        check_finite(where, rows)
        kept = rows if rows.dtype in (np.float16, np.float32) else rows.astype(np.float32)
        return TokenRows(shape, np.array(listed, np.int64), kept)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        delta = next(iter(adapter.deltas.values()))
        assert isinstance(delta, TokenRows)
        return {"token_indices": delta.places.tolist()}

    def tensors(self, module: str, delta: TokenRows) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`; float32."""
        return {f"{module}.{_PART}": np.array(delta.rows, dtype=np.float32)}


TRAINABLE_TOKENS = TrainableTokens()

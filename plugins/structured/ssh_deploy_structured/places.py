"""SHiRA and SPT: ``W′ = W``, and at a few places ``+ values``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_spectrum
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of, number
from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_structured.folders import expect, modules_of, written


@dataclass(frozen=True, slots=True)
class Sparse:
    """Tensors ``values`` [k] and ``places`` int [2, k] (rows, columns) of each module; SHiRA's k is r·(out + in)."""

    name: str
    peft_type: str
    values: str
    places: str
    ranked: bool
    slots: tuple[str, ...] = ("sparse",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        names = (self.values, self.places)
        r = number(files, "r") if self.ranked else None
        modules, rest = modules_of(files, names, needed=names, whole=(self.places,))
        deltas = {}
        for module, (where, shape, tensors) in modules.items():
            values, places = tensors[self.values], tensors[self.places]
            expect(where, self.values, values, ("k",))
            expect(where, self.places, places, (2, values.size))
            if r is not None and values.size != r * sum(shape):
                raise AdapterFileError(
                    f"{where}: {values.size} values; r = {r:g} of {CONFIG} makes {r * sum(shape):g} of {shape[0]}×"
                    f"{shape[1]}.",
                    hint="Its config and its weights do not belong together, or it was made for another base.",
                )
            check_spectrum(where, places[0], places[1], values, shape)
            deltas[module] = SparseDelta(shape, places[0], places[1], values)
        return adapter_of(files, self.name, deltas, rest, {} if r is None else {"r": int(r)})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        return {"r": adapter.settings["r"]} if self.ranked else {}

    def tensors(self, module: str, delta: SparseDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        places = np.stack([np.asarray(part, dtype=np.int64) for part in (delta.rows, delta.cols)])
        return written(module, {self.values: delta.values, self.places: places})


SHIRA = Sparse("shira", "SHIRA", "shira_weight", "shira_indices", ranked=True)
SPT = Sparse("spt", "SPT", "sparse_weight", "sparse_weight_indexes", ranked=False)

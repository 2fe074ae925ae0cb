"""LoCA: ``ΔW = scaling · D_Mᵀ S D_N``, D the orthonormal DCT-II, values and places both trained; places that meet add.

We know of no published files of it, so the names of its tensors are ours (README). Places may be saved as trained, with
fractions: they mean the nearest whole place, halves the even one, as `torch.round` has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_finite, check_shape
from ssh_deploy.adapters.peft_folder import adapter_of, by_module, module_shape, number
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_spectral.folders import refuse_biases

_SPECTRUM, _LOCATIONS = "loca_spectrum", "loca_locations"


@dataclass(frozen=True, slots=True)
class LoCA:
    """Tensors ``<module>.loca_spectrum`` float [n], ``.loca_locations`` [2, n]: row 0 along out, row 1 along in."""

    name: str = "loca"
    peft_type: str = "LOCA"
    slots: tuple[str, ...] = ("cosine",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        refuse_biases(files)
        modules, rest = by_module(files, (_SPECTRUM, _LOCATIONS))
        scaling = number(files, "scaling")
        deltas = {module: _delta(files, module, parts, scaling) for module, parts in modules.items()}
        return adapter_of(
            files, self.name, deltas, rest, {"n": max((d.parameters for d in deltas.values()), default=0)}
        )

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        deltas = [delta for delta in adapter.deltas.values() if isinstance(delta, SpectralDelta)]
        return {"n_frequency": max(delta.parameters for delta in deltas), "scaling": deltas[0].alpha}

    def tensors(self, module: str, delta: SpectralDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`; places that met are one."""
        return {
            f"{module}.{_SPECTRUM}": delta.values.astype(np.float32),
            f"{module}.{_LOCATIONS}": np.stack([delta.rows, delta.cols]).astype(np.int32),
        }


def _delta(files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]], scaling: float) -> SpectralDelta:
    where = f"{files.folder}: {module}"
    if len(parts) != 2:
        raise AdapterFileError(
            f"{where} has {' and '.join(parts)} only.", hint=f"Both {_SPECTRUM} and {_LOCATIONS} are needed."
        )
    values, places = parts[_SPECTRUM], parts[_LOCATIONS]
    fits = values.ndim == 1 and places.shape == (2, values.size) and values.size
    if not fits or values.dtype.kind in "iubc" or places.dtype.kind in "bc":
        raise AdapterFileError(
            f"{where}: {_SPECTRUM} is {values.dtype} {list(values.shape)}, {_LOCATIONS} {places.dtype} "
            f"{list(places.shape)}.",
            hint="Expected floats [n] and numbers [2, n].",
        )
    check_finite(where, values)
    check_finite(f"{where}: {_LOCATIONS}", places)
    shape = check_shape(where, module_shape(files, module))
    whole = np.rint(places.astype(np.float64))
    outside = (whole < 0) | (whole >= np.array(shape)[:, None])
    if outside.any():
        side, k = np.argwhere(outside)[0]
        raise AdapterFileError(
            f"{where}: coefficient {k} has {('row', 'column')[side]} {whole[side, k]:g}, outside 0…{shape[side] - 1}.",
            hint="The file is damaged or was made for a weight of another shape.",
        )
    flat, meeting = np.unique((whole[0] * shape[1] + whole[1]).astype(np.int64), return_inverse=True)
    with np.errstate(over="ignore"):
        sums = np.bincount(meeting, weights=values.astype(np.float64)).astype(np.float32)
    check_finite(f"{where}, places that meet added", sums)
    rows, cols = np.divmod(flat, shape[1])
    return SpectralDelta(shape, "cosine", rows, cols, sums, scaling, "ortho")


LOCA = LoCA()

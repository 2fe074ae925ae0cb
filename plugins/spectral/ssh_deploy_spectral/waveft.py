"""WaveFT: one level of an inverse 2-D wavelet transform of a few trained coefficients, or those as a sparse ΔW itself.

PEFT lays the coefficients out in a matrix padded for the filters' length, its quarters the low/low, high/low, low/high
and high/high bands (filter along rows first: the top right quarter is filtered *high* along out, unlike in pictures
of wavelets), synthesises, and crops the centre. One coefficient is thus one small patch, the outer product of two
filters, at a place that follows from its own: no matrix product is needed, and what a crop cuts off is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_finite
from ssh_deploy.adapters.peft_folder import CONFIG, adapter_of, by_module, number
from ssh_deploy.errors import AdapterFileError, DependencyError
from ssh_deploy_spectral.folders import refuse_biases, seed_of, seeded_spectrum
from ssh_deploy_spectral.patches import PatchDelta

_SPECTRUM = "waveft_spectrum"
_NONE = "none"  # the wavelet of a ΔW that is its sparse coefficients


@dataclass(frozen=True, slots=True)
class Bank:
    """A wavelet's synthesis filters, float64 [2, L] (low, high), and how much longer than a side PEFT pads it."""

    filters: NDArray[np.float64]
    padding: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WaveFT:
    """Tensors ``<module>.waveft_spectrum`` float [n]; places drawn for [out, in] by ``random_loc_seed``."""

    name: str = "waveft"
    peft_type: str = "WAVEFT"
    slots: tuple[str, ...] = ()

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        refuse_biases(files)
        modules, rest = by_module(files, (_SPECTRUM,))
        scaling, synthesised = number(files, "scaling"), files.config.get("use_idwt", True)
        if not isinstance(synthesised, bool):
            raise AdapterFileError(
                f"{files.folder}/{CONFIG}: use_idwt is {synthesised!r:.40}.", hint="It is true or false."
            )
        bank = _bank(files) if synthesised else Bank(np.ones((1, 1)), (0, 0))
        deltas = {}
        for module, parts in modules.items():
            shape, rows, cols, values = seeded_spectrum(files, module, parts[_SPECTRUM])
            check_finite(f"{files.folder}: {module}", values)
            u, v = (rows, np.zeros_like(rows)), (cols, np.zeros_like(cols))
            if synthesised:
                u, v = (_starts(files, p, n, bank, s) for p, n, s in zip((rows, cols), shape, (0, 1), strict=True))
            # the quarter's column chooses the filter along out, its row the one along in: PEFT's order of bands
            deltas[module] = PatchDelta(shape, values, scaling, (u[0], v[0]), (bank.filters[v[1]], bank.filters[u[1]]))
        told = {"seed": seed_of(files), "wavelet": files.config.get("wavelet_family") if synthesised else _NONE}
        return adapter_of(files, self.name, deltas, rest, told)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`; places follow from the seed, patches from places."""
        sizes = {module: delta.parameters for module, delta in adapter.deltas.items()}
        n, wavelet = max(sizes.values()), adapter.settings["wavelet"]
        scalings = {delta.scaling for delta in adapter.deltas.values() if isinstance(delta, PatchDelta)}
        return {
            "n_frequency": n,
            "n_frequency_pattern": {module: size for module, size in sizes.items() if size != n},
            "scaling": scalings.pop(),
            "random_loc_seed": adapter.settings["seed"],
            "use_idwt": wavelet != _NONE,
            **({"wavelet_family": wavelet} if wavelet != _NONE else {}),
        }

    def tensors(self, module: str, delta: PatchDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return {f"{module}.{_SPECTRUM}": delta.values.astype(np.float32)}


def _bank(files: AdapterFiles) -> Bank:
    """The wavelet that the config names, out of PEFT's own tables."""
    name: Any = files.config.get("wavelet_family")
    try:
        from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
        from peft.tuners.waveft.wavelet import Wavelet
    except ImportError as error:
        raise DependencyError(
            f"{files.folder}: the filters of wavelet {name!r:.40} are PEFT's.", hint="pip install 'peft>=0.21'"
        ) from error
    try:
        wavelet, padding = Wavelet(name), WAVELET_REDUCTIONS[name]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise AdapterFileError(
            f"{files.folder}/{CONFIG}: wavelet_family is {name!r:.40}, of which PEFT has no filters.",
            hint="It has db1 to db10, sym2 to sym10 and coif1 to coif4.",
        ) from error
    return Bank(np.array([wavelet.rec_lo, wavelet.rec_hi], dtype=np.float64), padding)


def _starts(
    files: AdapterFiles, places: NDArray[np.int64], side: int, bank: Bank, axis: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where along a side of length ``side`` the patches of ``places`` begin (maybe outside), and their half: 0 or 1."""
    padded = side + bank.padding[axis]
    padded += padded % 2
    half, inside = np.divmod(places + (padded - side) // 2, padded // 2)
    trimmed = bank.filters.shape[1] - 2  # off either end of the synthesis
    length = padded - trimmed
    if length - side not in (0, 1):  # PEFT's crop of the centre takes the one too many off the end
        raise AdapterFileError(
            f"{files.folder}/{CONFIG}: wavelet {files.config['wavelet_family']} makes {length} of {side} numbers.",
            hint="PEFT does not pad it as its length needs: such an adapter cannot have been trained.",
        )
    return 2 * inside - trimmed, half


WAVEFT = WaveFT()

"""FourierFT: ``ΔW = scaling · Re(ifft2 S)``, n trained values at places that a seed draws (no file holds them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_spectra
from ssh_deploy.adapters.peft_folder import adapter_of, by_module, number
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy_spectral.folders import refuse_biases, seed_of, seeded_spectrum
from ssh_deploy_spectral.places import drawn_places

_SPECTRUM = "fourierft_spectrum"


@dataclass(frozen=True, slots=True)
class FourierFT:
    """Tensors ``<module>.fourierft_spectrum`` float [n]; places drawn for [out, in] by ``random_loc_seed``."""

    name: str = "fourierft"
    peft_type: str = "FOURIERFT"
    slots: tuple[str, ...] = ("hartley",)

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        refuse_biases(files)
        modules, rest = by_module(files, (_SPECTRUM,))
        scaling, deltas = number(files, "scaling"), {}
        for module, parts in modules.items():
            shape, rows, cols, values = seeded_spectrum(files, module, parts[_SPECTRUM])
            deltas[module] = SpectralDelta(shape, "fourier", rows, cols, values, scaling, "backward")
        check_spectra(str(files.folder), deltas)
        n = max((delta.parameters for delta in deltas.values()), default=0)
        return adapter_of(files, self.name, deltas, rest, {"n": n, "seed": seed_of(files)})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`; only places that the adapter's own seed draws can be written."""
        seed, alphas = adapter.settings.get("seed"), set()
        for module, delta in adapter.deltas.items():
            assert isinstance(delta, SpectralDelta)
            alphas.add(delta.alpha)
            out, inn = delta.shape
            flat = delta.rows.astype(np.int64) * inn + delta.cols
            known = isinstance(seed, int) and (delta.transform, delta.norm) == ("fourier", "backward")
            if not known or not np.array_equal(flat, drawn_places(out * inn, flat.size, seed)):
                raise AdapterMismatchError(
                    f"{adapter.source}: {module} has not the Fourier coefficients that seed {seed!r:.40} draws, "
                    "and a FourierFT folder holds no places.",
                    hint="Keep it as a compact file.",
                )
        sizes = {module: delta.parameters for module, delta in adapter.deltas.items()}
        n = max(sizes.values())
        return {
            "n_frequency": n,
            "n_frequency_pattern": {module: size for module, size in sizes.items() if size != n},
            "scaling": alphas.pop(),
            "random_loc_seed": seed,
        }

    def tensors(self, module: str, delta: SpectralDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return {f"{module}.{_SPECTRUM}": delta.values.astype(np.float32)}


FOURIERFT = FourierFT()

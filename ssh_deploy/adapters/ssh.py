"""The families SSH (sparse Hartley spectra) and sDCTFT (sparse cosine spectra), as PEFT folders hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter, AdapterFiles, check_shape, check_spectra, is_finite_number
from ssh_deploy.adapters.peft_folder import adapter_of, module_shape, number
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterFileError


@dataclass(frozen=True, slots=True)
class SpectralFamily:
    """Tensors ``<module>.ssh_spectrum`` f32 [n] and ``<module>.ssh_indices`` int32 [2, n] (row 0 out, row 1 in)."""

    name: str
    peft_type: str
    transforms: tuple[str, ...]
    norm: str
    slots: tuple[str, ...]

    def read(self, files: AdapterFiles) -> Adapter:
        """See `Family.read`."""
        transform = files.config.get("transform", self.transforms[0])
        if transform not in self.transforms:
            raise AdapterFileError(
                f"{files.folder}: transform {transform!r} in a {self.peft_type} adapter.",
                hint=f"Known for it: {', '.join(self.transforms)}.",
            )
        alpha = number(files, "scaling")
        modules: dict[str, dict[str, NDArray[Any]]] = {}
        rest: dict[str, NDArray[Any]] = {}
        for name, tensor in files.tensors.items():
            module, _, part = name.rpartition(".")
            if part in ("ssh_spectrum", "ssh_indices"):
                modules.setdefault(module, {})[part] = tensor
            else:
                rest[name] = tensor
        deltas = {module: self._delta(files, module, parts, transform, alpha) for module, parts in modules.items()}
        check_spectra(str(files.folder), deltas)
        settings = {
            "n": files.config.get("n_frequency"),
            "delta_ratio": files.config.get("delta_ratio"),
            "seed": files.config.get("seed"),
        }
        return adapter_of(files, self.name, deltas, rest, {k: v for k, v in settings.items() if is_finite_number(v)})

    def _delta(
        self, files: AdapterFiles, module: str, parts: dict[str, NDArray[Any]], transform: str, alpha: float
    ) -> SpectralDelta:
        where = f"{files.folder}: {module}"
        values, places = parts.get("ssh_spectrum"), parts.get("ssh_indices")
        if values is None or places is None:
            raise AdapterFileError(
                f"{where} has {' and '.join(parts)} only.", hint="Both ssh_spectrum and ssh_indices are needed."
            )
        if places.ndim != 2 or places.shape[0] != 2 or places.dtype.kind not in "iu" or values.dtype.kind in "iub":
            raise AdapterFileError(
                f"{where}: ssh_indices is {places.dtype} {list(places.shape)}, ssh_spectrum {values.dtype}.",
                hint="Expected integers [2, n] and floats [n].",
            )
        shape = check_shape(where, module_shape(files, module))
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            kept = values if values.dtype in (np.float16, np.float32) else values.astype(np.float32)
        if kept.shape == places.shape[1:]:  # `check_spectra` says what else it is
            order = np.lexsort(places[::-1])  # a compact file is checked in less time when its places ascend
            places, kept = places[:, order], kept[order]
        return SpectralDelta(shape, transform, places[0], places[1], kept, alpha, self.norm)

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `Family.config`."""
        first = next(iter(adapter.deltas.values()))
        assert isinstance(first, SpectralDelta)
        return {
            "n_frequency": adapter.settings.get("n", max(d.parameters for d in adapter.deltas.values())),
            "scaling": first.alpha,
            "transform": first.transform,
            "delta_ratio": adapter.settings.get("delta_ratio", 0.7),
            "seed": adapter.settings.get("seed", 0),
        }

    def tensors(self, module: str, delta: SpectralDelta) -> dict[str, NDArray[Any]]:
        """See `Family.tensors`."""
        return {
            f"{module}.ssh_spectrum": delta.values.astype(np.float32),
            f"{module}.ssh_indices": np.stack([delta.rows, delta.cols]).astype(np.int32),
        }


#: ``ΔW = α/(MN) · C_M S C_N`` (math.md's table).
SSH = SpectralFamily("ssh", "SSH", ("hartley", "hartley-joint"), "backward", ("hartley",))
#: ``ΔW = α · iDCT2(S)``, orthonormal.
SDCTFT = SpectralFamily("sdctft", "SDCTFT", ("cosine",), "ortho", ("cosine",))

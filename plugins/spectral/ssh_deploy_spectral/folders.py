"""What PEFT's spectral folders have in common: values in the file, places from a seed, all of it checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import AdapterFiles, check_shape
from ssh_deploy.adapters.peft_folder import CONFIG, module_shape
from ssh_deploy.errors import AdapterFileError
from ssh_deploy_spectral.places import drawn_places

_MOST = 1 << 31  # numbers in a weight: drawing places in it takes half a minute, and no model has one


def refuse_biases(files: AdapterFiles) -> None:
    """Refuse a folder that trained biases.

    Raises:
        AdapterFileError: with what its config says.
    """
    bias = files.config.get("bias") or "none"
    if bias != "none":
        raise AdapterFileError(
            f"{files.folder}/{CONFIG}: bias is {bias!r:.40}: it changes biases, and deltas change weights.",
            hint="Merge it with PEFT (merge_and_unload) and deploy the merged model.",
        )


def seed_of(files: AdapterFiles) -> int:
    """``random_loc_seed`` of the config.

    Raises:
        AdapterFileError: missing, or no integer that torch takes as a seed.
    """
    seed = files.config.get("random_loc_seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 64:
        raise AdapterFileError(
            f"{files.folder}/{CONFIG}: random_loc_seed is {seed!r:.40}, not a seed of torch.",
            hint="The places of its coefficients follow from it; save the adapter again with PEFT.",
        )
    return seed


def seeded_spectrum(
    files: AdapterFiles, module: str, tensor: NDArray[Any]
) -> tuple[tuple[int, int], NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Shape (out, in) of ``module``'s weight, rows and columns int64 [n] as PEFT draws them, values f16 or f32 [n].

    Raises:
        AdapterFileError: no floats [n], other lengths than the config has, or more than the weight has places.
        AdapterMismatchError: the config and the base differ in the shape.
    """
    where = f"{files.folder}: {module}"
    if tensor.ndim != 1 or not tensor.size or tensor.dtype.kind in "iubc":
        raise AdapterFileError(
            f"{where}: its spectrum is {tensor.dtype} {list(tensor.shape)}, not floats [n].", hint="Save it again."
        )
    lengths = _lengths(files)
    if lengths is not None and tensor.size not in lengths:
        raise AdapterFileError(
            f"{where}: {tensor.size} values, n_frequency is {' or '.join(map(str, sorted(lengths)))}.",
            hint="Its config and its weights do not belong together.",
        )
    out, inn = check_shape(where, module_shape(files, module))
    if out * inn > _MOST:
        raise AdapterFileError(
            f"{where}: a weight of {out}×{inn} numbers.", hint="None is that large; the config is damaged or forged."
        )
    if tensor.size > out * inn:
        raise AdapterFileError(
            f"{where}: {tensor.size} values for the {out * inn} places of a weight of {out}×{inn}.",
            hint="It was made for a weight of another shape.",
        )
    rows, cols = np.divmod(drawn_places(out * inn, tensor.size, seed_of(files)), inn)
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        values = tensor if tensor.dtype in (np.float16, np.float32) else tensor.astype(np.float32)
    return (out, inn), rows, cols, values


def _lengths(files: AdapterFiles) -> set[int] | None:
    """Lengths the config allows a spectrum; which module has which is not asked, since the tensors tell."""
    if files.config.get("proportional_parameters"):  # WaveFT: lengths follow from the sizes of all targets
        return None
    pattern = files.config.get("n_frequency_pattern") or {}
    lengths = [files.config.get("n_frequency"), *(pattern.values() if isinstance(pattern, Mapping) else [None])]
    for n in lengths:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise AdapterFileError(
                f"{files.folder}/{CONFIG}: n_frequency {n!r:.40} (with n_frequency_pattern {pattern!r:.80}).",
                hint="Both hold counts from 1 on; save the adapter again with PEFT.",
            )
    return set(lengths)

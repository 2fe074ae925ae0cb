"""What structured folders have in common: tensors by module, checked; and how they are written again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import AdapterFiles, check_finite, check_shape
from ssh_deploy.adapters.peft_folder import CONFIG, by_module, module_shape
from ssh_deploy.errors import AdapterFileError

#: One module: where it is (for messages), (out, in) of its weight, its tensors by name, float16 or float32.
Module = tuple[str, tuple[int, int], dict[str, NDArray[Any]]]


def modules_of(
    files: AdapterFiles, parts: Sequence[str], *, needed: Collection[str], whole: Collection[str] = ()
) -> tuple[dict[str, Module], dict[str, NDArray[Any]]]:
    """Every module with its checked tensors, and the tensors that belong to none of them.

    Args:
        files: the folder.
        parts: names of a module's tensors.
        needed: those of them that every module has.
        whole: those that hold integers, returned as int64.

    Raises:
        AdapterFileError: a tensor missing, of another kind than floats (or whole numbers), of several dtypes, empty,
            NaN or infinite; biases trained.
        AdapterMismatchError: config and base differ in a shape.
    """
    bias = files.config.get("bias") or "none"
    if bias != "none":
        raise AdapterFileError(
            f"{files.folder}/{CONFIG}: bias is {bias!r:.40}: biases were trained too, which is not covered.",
            hint="Merge it with PEFT (merge_and_unload) and deploy the merged model.",
        )
    found, rest = by_module(files, parts)
    modules = {}
    for module, tensors in found.items():
        where = f"{files.folder}: {module}"
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise AdapterFileError(
                f"{where} has {' and '.join(sorted(tensors))}, and no {' or '.join(missing)}.",
                hint="The file is incomplete.",
            )
        shape = check_shape(where, module_shape(files, module))
        modules[module] = (where, shape, _checked(where, tensors, whole))
    return modules, rest


def expect(where: str, name: str, tensor: NDArray[Any], shape: Sequence[int | str]) -> None:
    """Refuse a tensor of another shape; sides given as text may have any length.

    Raises:
        AdapterFileError: with both shapes.
    """
    fits = tensor.ndim == len(shape)
    if not fits or any(isinstance(w, int) and w != s for w, s in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join(map(str, shape))
        raise AdapterFileError(
            f"{where}: {name} is {list(tensor.shape)}, not [{wanted}].",
            hint="It was made for a weight of another shape, or its config and its weights do not belong together.",
        )


def written(module: str, vectors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Tensors of ``module`` as a folder holds them: float32, whole numbers int32."""
    return {
        f"{module}.{name}": np.ascontiguousarray(t, dtype=np.int32 if t.dtype.kind in "iu" else np.float32)
        for name, t in vectors.items()
    }


def _checked(where: str, tensors: Mapping[str, NDArray[Any]], whole: Collection[str]) -> dict[str, NDArray[Any]]:
    kinds = {name: tensor.dtype for name, tensor in tensors.items() if name not in whole}
    if len(set(kinds.values())) > 1:
        said = ", ".join(f"{name} {dtype}" for name, dtype in kinds.items())
        raise AdapterFileError(f"{where} mixes dtypes: {said}.", hint="Save the adapter again in one dtype.")
    found = {}
    for name, tensor in tensors.items():
        if not tensor.size or tensor.dtype.kind in ("bc" if name in whole else "biuc"):
            raise AdapterFileError(
                f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, not numbers as training leaves them.",
                hint="The file is damaged, or a sharded save that was not gathered.",
            )
        check_finite(f"{where}.{name}", tensor.astype(np.float32) if tensor.dtype.kind in "iu" else tensor)
        if name in whole:
            if tensor.dtype.kind not in "iu" and (tensor != np.floor(tensor)).any():  # Windows saves them as floats
                raise AdapterFileError(f"{where}: {name} holds fractions.", hint="Places are whole numbers.")
            found[name] = tensor.astype(np.int64)
        else:
            found[name] = tensor if tensor.dtype in (np.float16, np.float32) else tensor.astype(np.float32)
    return found

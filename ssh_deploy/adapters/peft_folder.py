"""PEFT folders (`adapter_config.json` + `adapter_model.safetensors`): opened, bounded, and written.

What is common to all PEFT methods is here; what a method's tensors mean is its family's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ssh_deploy.adapters.base import Adapter, AdapterFiles, Shapes, check_finite, is_finite_number
from ssh_deploy.adapters.without_delta import REASONS
from ssh_deploy.checkpoints.safefile import open_safefile
from ssh_deploy.checkpoints.whole import whole_folder
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError, OutputError, RegistryError
from ssh_deploy.registry import families, get_family

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHARED = "base_model."  # what all modules share, PEFT keeps beside the model
_TASKS = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "causal-lm", "FEATURE_EXTRACTION": "feature-extraction"}


def read_folder(folder: Path, *, shapes: Shapes | None = None) -> Adapter:
    """Read a PEFT folder through the family its ``peft_type`` names.

    Args:
        folder: holds the two files.
        shapes: of the base's weights by module path, for folders whose config has no ``module_shapes``.

    Raises:
        AdapterFileError: a file is missing or breaks the format.
        RegistryError: no installed family reads this ``peft_type``.
    """
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    if not weights_path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise AdapterFileError(
            f"{folder}: no {WEIGHTS}{' but an adapter_model.bin, which is a pickle' if pickled else ''}.",
            hint="Save it with safe_serialization=True; pickles are never read." if pickled else "Is this the folder?",
        )
    try:
        raw = config_path.read_bytes()
        config = json.loads(raw)
    except OSError as error:
        raise AdapterFileError(
            f"{config_path}: cannot be read: {error.strerror}.", hint="Is this the folder?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{config_path}: not JSON ({error}).", hint="Save the adapter again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterFileError(f"{config_path}: names no peft_type.", hint="Save the adapter again with PEFT.")
    _check_fields(config_path, config)
    file = open_safefile(weights_path, error=AdapterFileError, mapped=False)  # what was hashed is what is used
    digest = hashlib.sha256(raw)
    digest.update(file.content)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in file.tensors.items()}
    if len(tensors) != len(file.tensors):
        twice = next(name for name in tensors if {name, f"{_PREFIX}{name}"} <= set(file.tensors))
        raise AdapterFileError(
            f"{weights_path}: {twice} is there with and without {_PREFIX!r}.", hint="Save the adapter again with PEFT."
        )
    family = _family(config["peft_type"])
    adapter: Adapter = family.read(AdapterFiles(folder, config, tensors, digest.hexdigest(), shapes))
    return adapter


def _check_fields(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse fields that are not what every PEFT method means by them; a family checks its own."""

    def texts(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    shapes = config.get("module_shapes")
    wrong = [key for key in ("modules_to_save", "labels") if config.get(key) is not None and not texts(config[key])]
    if shapes is not None and not (isinstance(shapes, dict) and all(isinstance(s, list) for s in shapes.values())):
        wrong.append("module_shapes")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        wrong.append("base_model_name_or_path")
    if wrong:
        raise AdapterFileError(
            f"{path}: {wrong[0]} is {config[wrong[0]]!r:.80}, which PEFT never writes.", hint="Save the adapter again."
        )


def _family(peft_type: str) -> Any:
    wanted = peft_type.lower().replace("_", "-")
    if wanted not in families():
        if peft_type in REASONS:
            raise AdapterFileError(
                f"PEFT type {peft_type} has no change of a weight that could be deployed: {REASONS[peft_type]}.",
                hint="Train one of the types that `ssh-deploy plugins --peft-types` marks, or serve it with PEFT.",
            )
        raise RegistryError(
            f"No installed family reads PEFT type {peft_type}.",
            hint=f"Installed: {', '.join(sorted(families()))}. More come as plugins (`pip install ssh-deploy-…`).",
        )
    return get_family(wanted)


def adapter_of(
    files: AdapterFiles,
    family: str,
    deltas: Mapping[str, Delta],
    rest: Mapping[str, NDArray[Any]],
    settings: Mapping[str, Any],
) -> Adapter:
    """The adapter of a PEFT folder: what its family understood, and ``rest`` as modules trained whole.

    Raises:
        AdapterFileError: no delta, or tensors that are neither.
    """
    if not deltas:
        raise AdapterFileError(
            f"{files.folder}: no tensor of a {files.config['peft_type']} adapter in it; there is {sorted(rest)[:3]}.",
            hint="Its config and its weights do not belong together.",
        )
    saved = files.config.get("modules_to_save") or []
    heads: dict[str, dict[str, NDArray[Any]]] = {}
    for name, tensor in rest.items():
        module, _, part = name.rpartition(".")
        if not module or not any(module == s or module.endswith(f".{s}") or f".{s}." in f".{module}." for s in saved):
            raise AdapterFileError(
                f"{files.folder}: tensor {name!r} belongs to no adapted module and to none of modules_to_save {saved}.",
                hint="A tensor that nobody reads would be dropped in silence; save the adapter again.",
            )
        check_finite(f"{files.folder}: {name}", tensor)
        heads.setdefault(module, {})[part] = tensor
    labels = files.config.get("labels") or ()
    return Adapter(
        family=family,
        deltas=deltas,
        replaced={module: ReplacedModule(tensors) for module, tensors in heads.items()},
        digest=files.digest,
        source=files.folder,
        base=files.config.get("base_model_name_or_path"),
        fingerprint=None,
        task=_TASKS.get(str(files.config.get("task_type"))),
        labels=tuple(labels),
        settings=settings,
    )


def by_module(
    files: AdapterFiles, parts: Collection[str]
) -> tuple[dict[str, dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """Tensors called ``<module>.<part>`` by module and part, and all others by name; a part may hold dots."""
    modules: dict[str, dict[str, NDArray[Any]]] = {}
    rest: dict[str, NDArray[Any]] = {}
    for name, tensor in files.tensors.items():
        part = next((part for part in parts if name.endswith(f".{part}")), None)
        if part is None:
            rest[name] = tensor
        else:
            modules.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
    return modules, rest


def module_shape(files: AdapterFiles, module: str) -> tuple[int, ...]:
    """Declared or known (out, in) of ``module``'s weight.

    Raises:
        AdapterFileError: neither the config nor the caller knows it.
        AdapterMismatchError: both do, and differ.
    """
    declared = (files.config.get("module_shapes") or {}).get(module)
    known = files.shapes.get(module) if files.shapes is not None else None
    if declared is not None and known is not None and tuple(declared) != tuple(known):
        raise AdapterMismatchError(
            f"{files.folder}: {module} was trained on a weight of {list(declared)}, the base has {list(known)}.",
            hint="This adapter belongs to another base.",
        )
    shape = known if known is not None else declared
    if shape is None:
        raise AdapterFileError(
            f"{files.folder}: the shape of {module} is neither in {CONFIG} (module_shapes) nor known from a base.",
            hint="Give the base (--base BASE).",
        )
    return tuple(shape)


def number(files: AdapterFiles, key: str) -> float:
    """A finite number of the config.

    Raises:
        AdapterFileError: missing or no such number.
    """
    value = files.config.get(key)
    if not is_finite_number(value):
        raise AdapterFileError(
            f"{files.folder}/{CONFIG}: {key} is {value!r:.40}, not a finite number.",
            hint=f"A {files.config['peft_type']} is computed with it: write what it was trained with.",
        )
    return float(value)


def write_folder(adapter: Adapter, folder: Path) -> None:
    """Write ``adapter`` as the folder `PeftModel.from_pretrained` reads, all or nothing.

    Raises:
        OutputError: exists already or cannot be written.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already.", hint="Choose another name or remove it first.")
    family = get_family(adapter.family)
    tensors: dict[str, NDArray[Any]] = {}
    for module, delta in adapter.deltas.items():
        for name, tensor in family.tensors(module, delta).items():
            tensors[name if name.startswith(_SHARED) else f"{_PREFIX}{name}"] = tensor
    for module, head in adapter.replaced.items():
        tensors |= {f"{_PREFIX}{module}.{name}": np.ascontiguousarray(t) for name, t in head.tensors.items()}
    task = {v: k for k, v in _TASKS.items()}.get(adapter.task or "")
    config = {
        "peft_type": family.peft_type,
        "task_type": task,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "target_modules": sorted(adapter.deltas),
        "modules_to_save": sorted(adapter.replaced) or None,
        "module_shapes": {module: list(delta.shape) for module, delta in adapter.deltas.items()},
        "labels": list(adapter.labels) or None,
        **family.config(adapter),
    }
    for key in ("module_shapes", "labels"):  # ours, not PEFT's, which warns of fields it does not know
        if config[key] is None:
            del config[key]
    with whole_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")

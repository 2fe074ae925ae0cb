"""The compact adapter file: one safetensors file, 6 bytes per coefficient, its own digest inside (FORMAT.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ssh_deploy.adapters.base import TASKS, Adapter, check_finite, check_spectra, is_finite_number
from ssh_deploy.adapters.compact_table import BF16, VALUES, CompactTable, take, understood
from ssh_deploy.checkpoints.fingerprint import SAMPLES, Fingerprint, SiteSample
from ssh_deploy.checkpoints.safefile import SafeFile, canonical_json, open_safefile
from ssh_deploy.checkpoints.whole import whole_file
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.deltas.spectral import NORMS, SpectralDelta, Stacks
from ssh_deploy.errors import AdapterFileError, OutputError
from ssh_deploy.registry import families
from ssh_deploy.transforms import transform_names

FORMAT = "ssh-deploy-adapter"
VERSION = 1
SCALINGS = {"backward": "alpha/(out*in)", "ortho": "alpha"}


def read_file(path: Path) -> Adapter:
    """Read a compact adapter file, every rule of FORMAT.md checked; spectra are zero-copy views of the bytes read.

    Raises:
        AdapterFileError: anything the format does not allow, with the tensor or field.
    """
    file = open_safefile(path, error=AdapterFileError, mapped=False)  # what was hashed is what is used
    if file.metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path}: not a compact adapter file (its metadata has no format={FORMAT!r}).",
            hint="A PEFT adapter is given as its folder; other safetensors files are not adapters.",
        )
    if file.metadata.get("version") != str(VERSION):
        raise AdapterFileError(
            f"{path}: format version {file.metadata.get('version')!r}; this release reads {VERSION}.",
            hint="Upgrade ssh-deploy, or convert the adapter again with this release.",
        )
    found = _digest(file.metadata, file.header.canonical, file.payload)
    if found != file.metadata.get("sha256"):
        raise AdapterFileError(
            f"{path}: its content has sha256 {found[:16]}…, its metadata says "
            f"{file.metadata.get('sha256', 'nothing')[:16]}…: bits were changed.",
            hint="Fetch or make the file again.",
        )
    return _adapter(file, _fields(file), found)


def write_file(adapter: Adapter, path: Path, *, values_dtype: Any = np.float16, overwrite: bool = False) -> str:
    """Write ``adapter`` as a compact file through a temporary sibling and a rename; returns its digest.

    Args:
        adapter: its deltas must all be spectral, of one transform, scaling and α.
        path: where.
        values_dtype: float16 or float32 of the values; places take uint16, or uint32 where a side exceeds 65,535.
        overwrite: replace an existing file (a mapped file stays valid: its inode is not touched).

    Raises:
        AdapterFileError: deltas of another kind, or values that overflow ``values_dtype``.
        OutputError: exists already or cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already.", hint="Choose another name or remove it first.")
    tensors, fields = _tensors_and_fields(adapter, np.dtype(values_dtype))
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "adapter": json.dumps(fields, sort_keys=True, ensure_ascii=False),
    }
    # The digest covers the table of tensors too, so the file is laid out once without it to learn the table.
    draft = save(tensors, metadata=metadata)
    header = json.loads(draft[8 : 8 + int.from_bytes(draft[:8], "little")])
    table = {k: v for k, v in header.items() if k != "__metadata__"}
    payload = memoryview(draft)[8 + int.from_bytes(draft[:8], "little") :]
    digest = content_digest(metadata, table, payload)
    with whole_file(path) as partial:
        partial.write_bytes(save(tensors, metadata={**metadata, "sha256": digest}))
    return digest


def content_digest(metadata: Mapping[str, str], table: Mapping[str, Any], payload: memoryview) -> str:
    """sha256 (hex) over the canonical JSON of metadata (without ``sha256``) and tensor table, then the payload."""
    return _digest(metadata, canonical_json(dict(table)), payload)


def _digest(metadata: Mapping[str, str], table: str, payload: memoryview) -> str:
    head = canonical_json({k: v for k, v in metadata.items() if k != "sha256"})
    digest = hashlib.sha256(f"[{head},{table}]".encode())
    digest.update(payload)
    return digest.hexdigest()


def _fields(file: SafeFile) -> dict[str, Any]:
    try:
        fields = json.loads(file.metadata["adapter"])
    except (KeyError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file.path}: metadata field 'adapter' is not JSON.", hint="Not our file.") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{file.path}: metadata field 'adapter' is not an object.", hint="Not our file.")
    return fields


def _adapter(file: SafeFile, fields: dict[str, Any], digest: str) -> Adapter:
    path, text = file.path, str(file.path)
    family = _one_of(path, fields, "family", sorted(families()))
    transform = _one_of(path, fields, "transform", transform_names())
    norm = {v: k for k, v in SCALINGS.items()}[_one_of(path, fields, "scaling", sorted(SCALINGS.values()))]
    transposed = _one_of(path, fields, "orientation", ["out,in", "in,out"]) == "in,out"
    alpha = fields.get("alpha")
    if not is_finite_number(alpha):
        raise AdapterFileError(f"{path}: alpha is {alpha!r:.40}, not a finite number.", hint="The file is forged.")
    architecture, sha256, sites = _stated_base(path, fields)
    table = understood(text, file.header, _object(path, fields, "modules"), sites, transposed=transposed)
    deltas = Stacks(table.modules, table.stacks(file.payload, transform, float(alpha), norm))
    check_spectra(text, deltas)
    left = set(table.others)
    replaced = {}
    for module, names in _object(path, fields, "heads").items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AdapterFileError(f"{path}: head {module!r} lists no tensors.", hint="The file is forged.")
        tensors = {}
        for name in names:
            stored = f"replaced.{module}.{name}"
            take(text, file.header, stored, left)
            tensors[name] = file.header.alike([stored]).of(file.payload)[0, ...]
            check_finite(f"{path}: {module}.{name}", tensors[name])
        replaced[module] = ReplacedModule(tensors)
    if left:
        raise AdapterFileError(
            f"{path}: tensors that nothing declares: {sorted(left)[:5]}.", hint="The file is forged."
        )
    fingerprint = None
    if architecture is not None:
        fingerprint = _fingerprint_of(architecture, table, table.sample_bytes(file.payload))
        if fingerprint.sha256 != sha256:
            raise AdapterFileError(f"{path}: fingerprint samples do not have its sha256.", hint="The file is forged.")
    return Adapter(
        family=family,
        deltas=deltas,
        replaced=replaced,
        digest=digest,
        source=path,
        base=_text(path, fields, "base"),
        fingerprint=fingerprint,
        task=_task(path, fields),
        labels=_labels(path, fields),
        settings={k: fields[k] for k in ("n", "delta_ratio", "seed") if fields.get(k) is not None},
    )


def _stated_base(path: Path, fields: dict[str, Any]) -> tuple[str | None, Any, dict[str, Any]]:
    """Architecture, sha256 and sites of the fingerprint; None, None and no sites without one."""
    stored = fields.get("fingerprint")
    if stored is None:
        return None, None, {}
    if not isinstance(stored, dict) or not isinstance(stored.get("architecture"), str):
        raise AdapterFileError(f"{path}: fingerprint names no architecture.", hint="The file is forged.")
    return stored["architecture"], stored.get("sha256"), _object(path, stored, "sites")


@lru_cache(maxsize=64)
def _fingerprint_of(architecture: str, table: CompactTable, samples: bytes) -> Fingerprint:
    """Of the sites of ``table``; made, and hashed, once for all adapters of one base with that table."""
    values, found, start = np.frombuffer(samples, BF16), {}, 0
    for site, sides in table.sites:
        stop = start + min(SAMPLES, sides[0] * sides[1])
        found[site] = SiteSample(sides, values[start:stop])
        start = stop
    return Fingerprint(architecture, found)


def _tensors_and_fields(adapter: Adapter, dtype: np.dtype[Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    if dtype not in VALUES:
        raise AdapterFileError(f"Values cannot be stored as {dtype}.", hint="Use float16 or float32.")
    kinds = {
        (d.transform, d.norm, d.alpha) if isinstance(d, SpectralDelta) else d.kind for d in adapter.deltas.values()
    }
    if len(kinds) != 1 or not isinstance(first := next(iter(kinds)), tuple):
        raise AdapterFileError(
            f"{adapter.source}: a compact file holds spectra of one transform and scaling; "
            f"this has {sorted(map(str, kinds))}.",
            hint="Other families stay in their PEFT folder.",
        )
    transform, norm, alpha = first
    tensors: dict[str, NDArray[Any]] = {}
    modules = {}
    for module, delta in adapter.deltas.items():
        assert isinstance(delta, SpectralDelta)
        place = np.uint16 if max(delta.shape) <= 1 << 16 else np.uint32
        with np.errstate(over="ignore"):
            values = delta.values.astype(dtype)
        if not np.isfinite(values).all():
            raise AdapterFileError(
                f"{adapter.source}: {module}: values up to {np.abs(delta.values).max():.3g} overflow {dtype}.",
                hint="Write the file with float32 values.",
            )
        tensors[f"spectral.{module}.values"] = values
        tensors[f"spectral.{module}.rows"] = delta.rows.astype(place)
        tensors[f"spectral.{module}.cols"] = delta.cols.astype(place)
        modules[module] = list(delta.shape)
    for module, head in adapter.replaced.items():
        for name, tensor in head.tensors.items():
            tensors[f"replaced.{module}.{name}"] = np.ascontiguousarray(tensor)
    fields: dict[str, Any] = {
        "family": adapter.family,
        "transform": transform,
        "scaling": SCALINGS[norm],
        "alpha": alpha,
        "orientation": "out,in",
        "modules": modules,
        "heads": {module: sorted(head.tensors) for module, head in adapter.replaced.items()},
        "base": adapter.base,
        "task": adapter.task,
        "labels": list(adapter.labels),
        **{k: v for k, v in adapter.settings.items() if k in ("n", "delta_ratio", "seed")},
    }
    if adapter.fingerprint is not None:
        fields["fingerprint"] = {
            "architecture": adapter.fingerprint.architecture,
            "sha256": adapter.fingerprint.sha256,
            "sites": {site: list(s.shape) for site, s in adapter.fingerprint.sites.items()},
        }
        for site, s in adapter.fingerprint.sites.items():
            tensors[f"fingerprint.{site}"] = s.values
    return tensors, fields


def _one_of(path: Path, fields: Mapping[str, Any], key: str, allowed: list[str]) -> str:
    value = fields.get(key)
    if value not in allowed:
        raise AdapterFileError(
            f"{path}: {key} is {value!r}.", hint=f"Installed here: {', '.join(allowed)}. A plugin may be missing."
        )
    return str(value)


def _object(path: Path, fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = fields.get(key)
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path}: {key} is {value!r:.80}, not an object.", hint="The file is forged.")
    return value


def _text(path: Path, fields: Mapping[str, Any], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterFileError(f"{path}: {key} is {value!r:.80}, not text.", hint="The file is forged.")
    return value


def _task(path: Path, fields: Mapping[str, Any]) -> str | None:
    task = _text(path, fields, "task")
    if task is not None and task not in TASKS:
        raise AdapterFileError(f"{path}: task is {task!r}.", hint=f"Known: {', '.join(TASKS)}.")
    return task


def _labels(path: Path, fields: Mapping[str, Any]) -> tuple[str, ...]:
    labels = fields.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterFileError(f"{path}: labels are not a list of text.", hint="The file is forged.")
    return tuple(labels)


assert set(NORMS) == set(SCALINGS)

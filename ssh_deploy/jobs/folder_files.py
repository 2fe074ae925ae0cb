"""What lies in an exported folder beside the graph: JSON, samples, base head, model card, tokenizer files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ssh_deploy.checkpoints.fingerprint import Fingerprint
from ssh_deploy.checkpoints.index import Checkpoint, contained
from ssh_deploy.checkpoints.whole import whole_file
from ssh_deploy.errors import DeploymentError
from ssh_deploy.graph.bank_file import GUARD, PADDED, PREFIXES, Layout, padded_rows
from ssh_deploy.graph.spectral_rows import AXES, no_pointers

DEPLOYMENT = "deployment.json"
PROVENANCE = "provenance.json"
FINGERPRINT = "fingerprint.safetensors"
BASE_HEAD = "base_head.safetensors"
MODEL = "model.onnx"
ADAPTERS = "adapters"
#: Files of a base that its users need to make inputs; weights are in the graph.
_COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_PACKAGES = ("ssh-deploy", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` whole or not at all: temporary sibling, fsync, rename.

    Raises:
        OutputError: cannot be written.
    """
    _write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all.

    Raises:
        OutputError: cannot be written.
    """
    _write(path, text.encode())


def require_digest(path: Path, sha256: str) -> None:
    """Refuse a file of the folder whose bytes are not those that were exported.

    Raises:
        DeploymentError: with both digests.
    """
    found = file_sha256(path)
    if found != sha256:
        raise DeploymentError(
            f"{path}: its sha256 is {found[:16]}…, {DEPLOYMENT} says {sha256[:16]}…: it was damaged or replaced.",
            hint="Fetch the folder again, or `ssh-deploy remove` and `add` the adapter.",
        )


def write_samples(path: Path, fingerprint: Fingerprint) -> None:
    """Write the samples of a base: bf16 tensors by site, shapes and architecture in the metadata."""
    shapes = {name: list(site.shape) for name, site in fingerprint.sites.items()}
    metadata = {"architecture": fingerprint.architecture, "sites": json.dumps(shapes)}
    _write(
        path, save({name: np.ascontiguousarray(s.values) for name, s in fingerprint.sites.items()}, metadata=metadata)
    )


def write_base_head(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write the base's own head, f32: row 0 of head banks."""
    _write(path, save({name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}))


def copy_companions(checkpoint: Checkpoint, folder: Path, changes: Mapping[str, Any]) -> None:
    """Copy the base's tokenizer files, and its config.json with ``changes`` and without paths of this machine."""
    for name in _COMPANIONS:
        if (checkpoint.folder / name).exists():
            shutil.copyfile(contained(checkpoint.folder, Path(name)), folder / name)
    config = {**checkpoint.config, **changes}
    if Path(str(config.get("_name_or_path", ""))).is_absolute():
        del config["_name_or_path"]
    write_json(folder / "config.json", config)


def padding_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """How short rows of a batch are filled, as far as the base's config says: ``id`` of the padding token."""
    pad = checkpoint.config.get("pad_token_id")
    return {} if pad is None else {"id": pad}


def versions() -> dict[str, str]:
    """Versions of what made the folder."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def base_name(checkpoint: Checkpoint, given: str, adapters: Iterable[str | None]) -> str:
    """The base's public name: the hub id it was asked for by, what all adapters call it, or its folder's name.

    Never a local path, and not its config's ``_name_or_path``: that often names the model it was tuned from.
    """
    if not Path(given).exists():
        return given
    named = set(adapters)
    name = next(iter(named)) if len(named) == 1 else None
    if name and not Path(name).is_absolute() and not name.startswith((".", "~")) and "\\" not in name:
        return name
    return checkpoint.folder.resolve().name


def base_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of the base's config and weight files by name."""
    names = ["config.json", *checkpoint.shards]
    return {name: file_sha256(contained(checkpoint.folder, Path(name))) for name in names}


def model_card(deployment: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    adapters = deployment["adapters"]
    rows = "\n".join(
        f"| {name} | {entry['family']} | {entry['n']} | {', '.join(entry['labels']) or '–'} |"
        for name, entry in adapters.items()
    )
    table = f"| adapter | family | n | labels |\n|---|---|---|---|\n{rows}\n" if adapters else "No adapters yet.\n"
    first = next(iter(adapters), "NAME")
    given = "prompt" if deployment["task"] == "text-generation" else "text"
    slots = (
        f"{len(deployment['sites'])} sites with slots for {', '.join(deployment['kinds'])}"
        if deployment["kinds"]
        else "no slots"
    )
    quantized = deployment["quantized"]
    stored = f"{quantized['scheme']} and {deployment['dtype']}" if quantized else deployment["dtype"]
    return f"""---
library_name: onnx
base_model: {deployment["base"]}
pipeline_tag: {deployment["task"]}
---

# {deployment["base"]}, {deployment["task"]}, ONNX

Exported by ssh-deploy ({deployment["mode"]}, opset {deployment["opset"]}, {stored}): {slots}.

{table}
With ssh-deploy:

```
ssh-deploy run . --adapter {first} --{given} "…"
```

With nothing but onnxruntime (keep `adapter` referenced while the session runs):

```python
import onnxruntime as ort

session = ort.InferenceSession("model.onnx")
adapter = ort.LoraAdapter()
adapter.Load("adapters/{first}.onnx_adapter")
options = ort.RunOptions()
options.add_active_adapter(adapter)
outputs = session.run(None, feeds, options)
```

`deployment.json` lists sites, kinds of slots and adapters with their digests; `provenance.json` says what this was
made from and how far it was from torch.
"""


def no_adapter(layout: Layout) -> dict[str, NDArray[Any]]:
    """What a graph whose adapter inputs have no defaults is fed with when there is no adapter."""
    sites = len(layout.sites)
    none: dict[str, NDArray[Any]] = {GUARD: np.zeros(layout.guard, np.uint8)}
    for kind, prefix in PREFIXES.items():
        if kind in layout.kinds:
            none[f"{prefix}ids"] = np.zeros(1, np.int64)
            none[f"{prefix}values"] = np.zeros((1, sites, 0), layout.adapter_dtype)
            none[f"{prefix}scales"] = np.ones((1, sites), np.float32)
            none[f"{prefix}cols"] = np.zeros((1, sites, 0), layout.place_dtype)
            if kind in AXES:
                pointers = no_pointers(kind, [n_out for *_, n_out in layout.sites])
                none |= {name: array[None] for name, array in pointers.items()}
            else:
                none[f"{prefix}rows"] = none[f"{prefix}cols"]
    for kind, prefix in PADDED.items():
        if kind in layout.kinds:
            none[f"{prefix}ids"] = np.zeros(1, np.int64)
            none |= {name: array[None] for name, array in padded_rows("nothing", kind, {}, layout).items()}
    if "head" in layout.kinds:
        none["adapter_head_ids"] = np.zeros(1, np.int64)
        for module, n_in, _ in layout.heads:
            none[f"adapter_head.{module}.weight"] = np.zeros((1, 0, n_in), np.float32)
            none[f"adapter_head.{module}.bias"] = np.zeros((1, 0), np.float32)
    return none


def _write(path: Path, data: bytes) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(data)

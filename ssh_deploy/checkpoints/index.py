"""A Hugging Face checkpoint as a table of tensors: local folder or hub id, one file or shards, nothing loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ssh_deploy.checkpoints.safefile import SafeFile, open_safefile
from ssh_deploy.errors import CheckpointError, near_misses

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Weights in other forms. They are never read (some are pickles) and a copy of them would still answer as the base.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot")
FLOATS = ("F64", "F32", "F16", "BF16")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.md", "*.jinja"]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An opened checkpoint; its shards are mapped, no tensor is copied.

    Attributes:
        folder: where its files lie.
        config: config.json.
        shards: mapped weight files by their name in ``folder``.
        places: shard name by tensor name.
        index: the parsed index file of a sharded checkpoint, else None.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, SafeFile]
    places: dict[str, str]
    index: dict[str, Any] | None

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self.places)

    def modules(self) -> list[str]:
        """Module paths that hold a tensor called ``weight``, sorted."""
        return sorted(name.removesuffix(".weight") for name in self.places if name.endswith(".weight"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored (GPT-2's Conv1D weights are [in, out]).

        Raises:
            CheckpointError: no such tensor.
        """
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> str:
        """Code of safetensors: F32, F16, BF16 and so on.

        Raises:
            CheckpointError: no such tensor.
        """
        return str(self._entry(name)["dtype"])

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapped file; bfloat16 through ml_dtypes.

        Raises:
            CheckpointError: no such tensor.
        """
        self._entry(name)
        return self.shards[self.places[name]].tensors[name]

    def files(self) -> list[Path]:
        """Every file in the folder and below, relative to it, sorted; ``.git`` and ``.cache`` folders aside.

        Raises:
            CheckpointError: a symbolic link leads out of the folder.
        """
        found = []
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            if {".git", ".cache"} & set(relative.parts) or path.is_dir():
                if path.is_symlink():
                    contained(self.folder, relative)
                continue
            contained(self.folder, relative)
            found.append(relative)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(len(shard.payload) for shard in self.shards.values())

    def _entry(self, name: str) -> Any:
        if name not in self.places:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}.", hint=near_misses(name, self.places))
        return self.shards[self.places[name]].table[name]


def open_checkpoint(path_or_hub_id: str | Path) -> Checkpoint:
    """Open a base: a local Hugging Face folder, or a hub id through huggingface_hub's cache.

    Args:
        path_or_hub_id: folder with ``config.json`` and ``model.safetensors`` or its index and shards, or an id
            such as ``org/name``.

    Raises:
        CheckpointError: nothing there, pickled or quantised weights, a shard that is missing, damaged or outside
            the folder, an index that does not describe its shards.
    """
    folder = _folder(path_or_hub_id)
    config = read_json(folder, "config.json")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder}: the base is quantised ({method}); its stored numbers are codes that no delta can be added to.",
            hint="Use the unquantised checkpoint it was made from, and quantise the result.",
        )
    if (folder / INDEX).exists():
        index = read_json(folder, INDEX)
        shards, places = _sharded(folder, index)
        return Checkpoint(folder, config, shards, places, index)
    if not (folder / SINGLE).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_WEIGHTS)
        raise CheckpointError(
            f"{folder}: no {SINGLE} and no {INDEX}{f'; there is {others[0]}, which is never read' if others else ''}.",
            hint="Save the model with safe_serialization=True; pickles can run code when they are opened."
            if others
            else "Is this the folder of a model? (A sentence-transformers folder keeps it in a subfolder.)",
        )
    file = open_safefile(contained(folder, Path(SINGLE)), error=CheckpointError)
    return Checkpoint(folder, config, {SINGLE: file}, dict.fromkeys(file.table, SINGLE), None)


def contained(folder: Path, relative: Path) -> Path:
    """The real path of ``folder/relative`` when it lies in the folder, or in the blobs of its hub cache.

    Raises:
        CheckpointError: it does not exist or leads elsewhere.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots" and (blobs := root.parent.parent / "blobs").is_dir():
        roots.append(blobs)  # huggingface_hub's cache: snapshots/REVISION/file → blobs/HASH
    try:
        real = (folder / relative).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: {relative} is missing (or a link to nothing).", hint="Fetch the checkpoint again, whole."
        ) from error
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{folder}: {relative} leads out of the folder, to {real}.",
            hint="Copy the file into the folder; links out of it are not followed.",
        )
    return real


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder.

    Raises:
        CheckpointError: missing, not JSON, not an object.
    """
    path = contained(folder, Path(name))
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder}/{name}: cannot be read: {error.strerror}.", hint="Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}/{name}: not JSON ({error}).", hint="Fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder}/{name}: not a JSON object.", hint="Fetch the checkpoint again.")
    return value


def _sharded(folder: Path, index: dict[str, Any]) -> tuple[dict[str, SafeFile], dict[str, str]]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{folder}/{INDEX}: no weight_map of names to files.", hint="Fetch the checkpoint again.")
    shards = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(
                f"{folder}/{INDEX}: names the file {name!r}, which is not a plain name in its folder.",
                hint="The index is forged: do not use this checkpoint.",
            )
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder}: shard {name} is missing ({len(set(places.values()))} are declared).",
                hint="Fetch the checkpoint again, whole.",
            )
        shards[name] = open_safefile(contained(folder, Path(name)), error=CheckpointError)
    for tensor, name in places.items():
        if tensor not in shards[name].table:
            raise CheckpointError(
                f"{folder}: {INDEX} says {tensor} is in {name}; it is not.", hint="Fetch the checkpoint again, whole."
            )
    for name, shard in shards.items():
        stray = sorted(tensor for tensor in shard.table if places.get(tensor) != name)
        if stray:
            raise CheckpointError(
                f"{folder}: {name} holds {stray[0]}, which {INDEX} does not place there.",
                hint="Index and shards are of different saves: fetch the checkpoint again.",
            )
    return shards, dict(places)


def _folder(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    text = str(path_or_hub_id)
    if path.exists():
        raise CheckpointError(f"{path}: a file, not the folder of a checkpoint.", hint="Give the folder it lies in.")
    if not _HUB_ID.fullmatch(text) or ".." in text:
        raise CheckpointError(f"{path}: no such folder, and no hub id.", hint="Give a folder or an id like org/name.")
    return _from_hub(text)


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if (folder / SINGLE).exists() or (folder / INDEX).exists() or constants.is_offline_mode():
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        if constants.is_offline_mode():
            raise CheckpointError(
                f"{name}: no such folder, not in the hub cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set.",
                hint=f"Unset HF_HUB_OFFLINE, or run `hf download {name}` where there is a network and copy the cache.",
            ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: no such folder here, and the hub cannot give it ({type(error).__name__}: {str(error)[:200]}).",
            hint=f"Check the name and the network, or run `hf download {name}` first (gated: `hf auth login`).",
        ) from error

"""An exported folder, read without trust: contained paths, checked fields, digests of what is loaded.

`deployment.json` says what the model is and which adapters lie beside it. It came from somewhere else, so every
field is checked for its type before it is used, every file it names must be a plain file inside the folder after
links are resolved, and an adapter is read only when its sha256 is the one written down.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from ssh_deploy.checkpoints.fingerprint import Fingerprint
from ssh_deploy.errors import DeploymentError, UnknownNameError

#: The contract of graphs this release runs (onnx.md); others are refused, never reinterpreted.
CONTRACT = 4
DEPLOYMENT = "deployment.json"
MODEL = "model.onnx"
GENAI = "genai_config.json"
FINGERPRINT = "fingerprint.safetensors"
BASE_HEAD = "base_head.safetensors"
_MAX_JSON = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DAMAGED = "The folder is damaged or forged: export it again."

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SiteEntry:
    """One weight that has a slot: canonical module path, its sides, its row in the banks' ``sites`` dimension."""

    module: str
    inn: int
    out: int
    index: int


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter of the folder: ``path`` resolved and inside it, ``sha256`` (hex) of its bytes."""

    name: str
    path: Path
    sha256: str
    family: str
    labels: tuple[str, ...]
    task: str | None
    verified: bool | None


@dataclass(frozen=True, slots=True)
class Decoder:
    """What generation needs to know of a graph of task ``text-generation``.

    Attributes:
        layers, kv_heads, head_dim: the cache: 2·layers tensors, f32 [batch, kv_heads, past, head_dim].
        past: names of the cache's inputs, layer by layer, key before value.
        present: names of its outputs in the same order: past and new tokens together.
        logits_at: optional input int64 [batch, positions]: tokens of each row whose logits are wanted; fed, `logits` is
            [batch, positions, vocab], else [batch, tokens, vocab]. None where the graph has no such input.
        window: columns of the cache that a token sees at most in some layers; None where it sees all. Columns, not
            tokens: with a window, short rows are padded in front, because a gap behind a prompt would count.
        context: most tokens of a row, prompt and answer together; None where the base states none.
        bos: token that texts begin with; None without.
        eos: tokens that end a text; may be none.
        pad: token that fills short rows; None where the base names none (then any will do: the mask hides it).
        chat_template: file of the folder that turns messages into a prompt (Jinja); None without.
        packed: a row's tokens must be the first columns of its cache, as GroupQueryAttention wants them: so it is in
            graphs of onnxruntime-genai's builder.
    """

    layers: int
    kv_heads: int
    head_dim: int
    past: tuple[str, ...]
    present: tuple[str, ...]
    logits_at: str | None
    window: int | None
    context: int | None
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    chat_template: str | None
    packed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """What `deployment.json` says, checked; field names as there.

    ``guard``: None for a graph without slots. ``labels``: the base's own class names, empty when it has no head.
    ``orders``: (p, q) of the output order by transform and length. ``required``: adapter inputs have no defaults and
    must always be fed. ``inputs``: the model's own, in order. ``decoder``: None for every task but ``text-generation``.
    """

    root: Path
    base: str
    fingerprint: str
    architecture: str
    guard: tuple[int, int, int] | None
    task: str
    sites: tuple[SiteEntry, ...]
    orders: Mapping[str, Mapping[int, tuple[int, int]]]
    kinds: tuple[str, ...]
    head: str | None
    labels: tuple[str, ...]
    required: bool
    padding: Mapping[str, Any]
    adapters: Mapping[str, StoredAdapter]
    inputs: tuple[str, ...]
    decoder: Decoder | None

    def samples(self) -> Fingerprint | None:
        """The base's samples (`FINGERPRINT`), or None where the folder has none.

        Raises:
            DeploymentError: damaged, or not the ones whose sha256 the folder states.
        """
        if not (self.root / FINGERPRINT).exists():
            return None
        from ssh_deploy.checkpoints.fingerprint import SiteSample
        from ssh_deploy.checkpoints.safefile import open_safefile

        path = contained(self.root, FINGERPRINT)
        file = open_safefile(path, error=DeploymentError, mapped=False)
        try:
            shapes = json.loads(file.metadata.get("sites", ""))
            sites = {name: SiteSample(tuple(map(int, shapes[name])), t) for name, t in file.tensors.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DeploymentError(f"{path}: names no shapes of its samples ({error}).", hint=_DAMAGED) from error
        found = Fingerprint(file.metadata.get("architecture", ""), sites)
        if found.sha256 != self.fingerprint:
            raise DeploymentError(f"{path}: its samples do not have the sha256 of {DEPLOYMENT}.", hint=_DAMAGED)
        return found

    def base_head(self) -> dict[str, NDArray[Any]]:
        """Tensors of the base's own head by ``module.weight`` and ``module.bias``; empty where it has none.

        Raises:
            DeploymentError: a damaged file.
        """
        if not (self.root / BASE_HEAD).exists():
            return {}
        from ssh_deploy.checkpoints.safefile import open_safefile

        return dict(open_safefile(contained(self.root, BASE_HEAD), error=DeploymentError, mapped=False).tensors)


def is_exported(path: str | Path) -> bool:
    """Whether there is a `deployment.json` in ``path``: then it is an exported folder, sound or not."""
    return (Path(path) / DEPLOYMENT).exists()


def open_folder(path: str | Path) -> Folder:
    """Read and check ``path/deployment.json``; no other file is read.

    Raises:
        DeploymentError: no exported folder, a field of the wrong type, an unknown contract, a path that leads out.
    """
    root = Path(path)
    if not root.is_dir():
        raise DeploymentError(f"{root}: no such folder.", hint="Give the folder that `ssh-deploy export --onnx` wrote.")
    fields = read_json(root, DEPLOYMENT)
    contract = fields.get("contract")
    if type(contract) is not int or contract != CONTRACT:
        raise DeploymentError(
            f"{root}: its graph obeys contract {contract!r}; this release runs {CONTRACT}.",
            hint="Export the base again with this release, or install the release that wrote the folder.",
        )
    head = fields.get("head")
    if head is not None:
        head = _typed(root, "head", head, dict)
    adapters = {name: _stored(root, name, entry) for name, entry in _field(root, fields, "adapters", dict).items()}
    for file in (MODEL, f"{MODEL}.data", "tokenizer.json", "tokenizer_config.json", "config.json"):
        if (root / file).is_symlink() or file == MODEL:
            contained(root, file)
    return Folder(
        root=root,
        base=_field(root, fields, "base", str),
        fingerprint=_field(root, fields, "fingerprint", str),
        architecture=_field(root, fields, "architecture", str),
        guard=_guard(root, fields),
        task=_field(root, fields, "task", str),
        sites=_sites(root, _list(root, fields, "sites", dict)),
        orders=_orders(root, _field(root, fields, "orders", dict)),
        kinds=tuple(_list(root, fields, "kinds", str)),
        # a merged graph has its head inside: it names labels and no module with slots
        head=None if head is None or head.get("module") is None else _field(root, head, "module", str),
        labels=() if head is None else _labels(root, head),
        required=_field(root, fields, "adapter_inputs", str) == "required",
        padding=_typed(root, "padding", fields.get("padding") or {}, dict),
        adapters=adapters,
        inputs=tuple(_list(root, fields, "inputs", str)),
        decoder=_decoder(root, fields.get("decoder")),
    )


def contained(root: Path, relative: str) -> Path:
    """The real path of ``root/relative``, a plain file inside ``root`` after links are resolved.

    Raises:
        DeploymentError: missing, no plain file, or elsewhere.
    """
    try:
        real = (root / relative).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise DeploymentError(f"{root}: {relative} is missing.", hint="Export or fetch the folder again.") from error
    if not real.is_relative_to(root.resolve()):
        raise DeploymentError(
            f"{root}: {relative} leads out of the folder, to {real}.",
            hint="Links out of an exported folder are not followed: copy the file into it.",
        )
    if not real.is_file():
        raise DeploymentError(f"{root}: {relative} is no file.", hint=_DAMAGED)
    return real


def check_name(name: str) -> str:
    """``name`` when it can name an adapter: 1 to 128 of letters, digits, dot, dash and underscore; never a path.

    Raises:
        UnknownNameError: anything else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or set(name) == {"."}:
        raise UnknownNameError(
            f"{name!r:.200} is not the name of an adapter.",
            hint="Names are 1 to 128 of A-Z a-z 0-9 . _ - and never paths; `.load(name, path)` takes a path.",
        )
    return name


def file_digest(path: Path) -> str:
    """sha256 (hex) of the file at ``path``.

    Raises:
        DeploymentError: cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror}.", hint="Check the path.") from error


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The JSON object in ``root/name``.

    Raises:
        DeploymentError: missing, outside the folder, over 64 MiB, or no JSON object.
    """
    path = contained(root, name)
    try:
        if path.stat().st_size > _MAX_JSON:
            raise DeploymentError(f"{path}: over {_MAX_JSON >> 20} MiB.", hint=_DAMAGED)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror}.", hint="Check the folder.") from error
    except (ValueError, RecursionError) as error:
        raise DeploymentError(f"{path}: not JSON ({error}).", hint=_DAMAGED) from error
    return _typed(root, name, value, dict)


def _stored(root: Path, name: str, entry: Any) -> StoredAdapter:
    try:
        check_name(name)
    except UnknownNameError as error:
        raise DeploymentError(f"{root}/{DEPLOYMENT}: adapter {error.what}", hint=_DAMAGED) from error
    entry = _typed(root, f"adapters.{name}", entry, dict)
    file = _field(root, entry, "file", str)
    parts = Path(file).parts
    if Path(file).is_absolute() or ".." in parts or "\\" in file:
        raise DeploymentError(
            f"{root}/{DEPLOYMENT}: adapter {name} names the file {file!r}, which is not inside the folder.",
            hint="The folder is forged: do not use it.",
        )
    sha256 = _field(root, entry, "sha256", str)
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DeploymentError(f"{root}/{DEPLOYMENT}: adapter {name} has no sha256 but {sha256!r:.80}.", hint=_DAMAGED)
    task = entry.get("task")
    base = entry.get("base")
    return StoredAdapter(
        name=name,
        path=root / file,
        sha256=sha256,
        family=_field(root, entry, "family", str),
        labels=tuple(_list(root, entry, "labels", str)),
        task=None if task is None else _typed(root, f"adapters.{name}.task", task, str),
        verified=None if base is None else base == "verified",
    )


def _decoder(root: Path, entry: Any) -> Decoder | None:
    if entry is None:
        return None
    fields = _typed(root, "decoder", entry, dict)
    layers, kv_heads, head_dim = (_field(root, fields, key, int) for key in ("layers", "kv_heads", "head_dim"))
    past, present = (tuple(_list(root, fields, key, str)) for key in ("past", "present"))
    if min(layers, kv_heads, head_dim) < 1 or {len(past), len(present)} != {2 * layers}:
        raise DeploymentError(
            f"{root}/{DEPLOYMENT}: a cache of {layers} layers, {kv_heads} heads, {head_dim} wide, with {len(past)} "
            f"inputs and {len(present)} outputs.",
            hint=_DAMAGED,
        )
    window, context, bos, pad = (
        None if fields.get(key) is None else _field(root, fields, key, int)
        for key in ("window", "context", "bos", "pad")
    )
    logits_at, template = (
        None if fields.get(key) is None else _field(root, fields, key, str) for key in ("logits_at", "chat_template")
    )
    if template is not None:
        contained(root, template)
    eos = tuple(_list(root, fields, "eos", int))
    packed = (root / GENAI).exists()
    return Decoder(
        layers, kv_heads, head_dim, past, present, logits_at, window, context, bos, eos, pad, template, packed
    )


def _guard(root: Path, fields: Mapping[str, Any]) -> tuple[int, int, int] | None:
    if fields.get("guard") is None:
        return None
    guard = _list(root, fields, "guard", int)
    if len(guard) != 3 or guard[1] != 0 or not all(0 <= g < 1 << 31 for g in guard):
        raise DeploymentError(f"{root}/{DEPLOYMENT}: guard is {guard}.", hint=_DAMAGED)
    return guard[0], guard[1], guard[2]


def _sites(root: Path, entries: list[dict[str, Any]]) -> tuple[SiteEntry, ...]:
    sites = tuple(
        SiteEntry(
            _field(root, e, "module", str),
            _field(root, e, "in", int),
            _field(root, e, "out", int),
            _field(root, e, "index", int),
        )
        for e in entries
    )
    if [s.index for s in sites] != list(range(len(sites))) or len({s.module for s in sites}) != len(sites):
        raise DeploymentError(f"{root}/{DEPLOYMENT}: sites are not one table 0…{len(sites) - 1}.", hint=_DAMAGED)
    return sites


def _orders(root: Path, orders: dict[str, Any]) -> dict[str, dict[int, tuple[int, int]]]:
    try:
        return {axis: {int(n): (int(p), int(q)) for n, (p, q) in pairs.items()} for axis, pairs in orders.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DeploymentError(f"{root}/{DEPLOYMENT}: orders are not (p, q) by length.", hint=_DAMAGED) from error


def _labels(root: Path, head: dict[str, Any]) -> tuple[str, ...]:
    count = _field(root, head, "labels", int)
    names = tuple(_list(root, head, "base_labels", str)) if head.get("base_labels") is not None else ()
    if names and len(names) != count:
        raise DeploymentError(f"{root}/{DEPLOYMENT}: {len(names)} base_labels for {count} labels.", hint=_DAMAGED)
    if not 0 <= count <= 1 << 20:
        raise DeploymentError(f"{root}/{DEPLOYMENT}: a head of {count} labels.", hint=_DAMAGED)
    return names or tuple(f"LABEL_{i}" for i in range(count))


def _field(root: Path, fields: Mapping[str, Any], key: str, kind: type[T]) -> T:
    if key not in fields:
        raise DeploymentError(f"{root}/{DEPLOYMENT}: {key} is missing.", hint=_DAMAGED)
    return _typed(root, key, fields[key], kind)


def _list(root: Path, fields: Mapping[str, Any], key: str, kind: type[T]) -> list[T]:
    return [_typed(root, f"{key}[]", value, kind) for value in _field(root, fields, key, list)]


def _typed(root: Path, key: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DeploymentError(f"{root}/{DEPLOYMENT}: {key} is {value!r:.80}, not {kind.__name__}.", hint=_DAMAGED)
    return value

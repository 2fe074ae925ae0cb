"""An adapter out of a fully fine-tuned checkpoint: what it changed against its base, tensor by tensor, as SSH or LoRA.

Neither model is ever in memory: both files are mapped, and one pair of tensors at a time is subtracted and recast.
What was trained beside the matrices of linear modules (embeddings, norms, biases) has no place in an adapter; it is
named with its share of all the energy ``‖W′ − W‖²`` that was added, and too much of it is refused. Heads, which the
base does not have or the task replaces, come along whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.adapters.projecting import Change
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.architecture import base_prefix, meta_model, renaming
from ssh_deploy.checkpoints.index import FLOATS, Checkpoint, open_checkpoint
from ssh_deploy.checkpoints.names import canonical
from ssh_deploy.checkpoints.orientation import is_transposed
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.errors import AdapterMismatchError, CheckpointError, OutputError
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.jobs.recasting import Recast, Share, energy_kept, recast, settings_of, table
from ssh_deploy.registry import get_family

RANK = 16
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was found and written.

    Attributes:
        out, family, digest, bytes: the adapter.
        unit, shares, energy: see `Conversion`: of the matrices it holds.
        heads: modules taken whole.
        lost: share of the energy of all changes by tensor, of those that no adapter can hold.
        notes: what a person should know.
    """

    out: str
    family: str
    digest: str
    bytes: int
    unit: str
    shares: tuple[Share, ...]
    energy: float
    heads: tuple[str, ...]
    lost: Mapping[str, float]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self)
        found["shares"] = {s.module: {"size": s.size, "energy": s.share} for s in self.shares}
        return found

    def lines(self) -> list[str]:
        """For people."""
        left = f"; {sum(self.lost.values()):.2%} of all changes left out" if self.lost else ""
        return [
            *table(self.shares, self.unit),
            f"{self.energy:.2%} of ΔW's energy kept in {len(self.shares)} matrices{left}",
            f"heads taken whole: {', '.join(self.heads) or 'none'}",
            *(f"Left out: {name}, {share:.2%}" for name, share in list(self.lost.items())[:8]),
            *([f"Left out: {len(self.lost) - 8} tensors more"] if len(self.lost) > 8 else []),
            f"{self.out}: {self.family}, {self.bytes:,} bytes, sha256 {self.digest}",
            *(f"Note: {note}" for note in self.notes),
        ]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What belongs together.

    ``matrices``: linear modules of the base by those of the tuned checkpoint; ``others``: tensors of the base by those
    of the tuned, that an adapter has no place for; ``heads``: modules of the tuned.
    """

    matrices: dict[str, str]
    others: dict[str, str]
    heads: tuple[str, ...]


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    kind: str = "ssh",
    values: str = "float16",
    tolerance: float = TOLERANCE,
    ignore: bool = False,
    progress: Progress = silent,
    **amount: Any,
) -> Extraction:
    """Write what ``tuned`` changed of ``base`` as the adapter ``out``, all or nothing.

    Args:
        base: local folder or hub id.
        tuned: the same, of the same architecture.
        out: new file, where spectra are asked for and it ends in .safetensors, or new folder.
        kind: ``ssh``, ``sdctft`` or ``lora`` (rank `RANK` unless ``amount`` says otherwise).
        values: ``float16`` or ``float32`` of a file.
        tolerance: refuse when more than this share of the energy of all changes is in tensors no adapter can hold.
        ignore: leave them out however much it is.
        progress: told of matrices done.
        amount: of `Recast`.

    Raises:
        AdapterMismatchError: nothing changed, too much has no place, or too little would be kept.
        CheckpointError: a checkpoint that cannot be read, or two of different architectures.
        OutputError: ``out`` exists or cannot be written.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists already.", hint="Choose another name or remove it first.")
    given = {key: value for key, value in amount.items() if value is not None}
    if kind == "lora" and not {"rank", "energy"} & set(given):
        given["rank"] = RANK
    target = Recast(kind, **given)
    get_family(kind)
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    pairs = _pairs(before, after)
    deltas, shares = recast(_changes(before, after, pairs.matrices, progress), target, where=str(after.folder))
    if not deltas:
        raise AdapterMismatchError(
            f"{after.folder}: no matrix of a linear module differs from {before.folder}.", hint="Are they swapped?"
        )
    lost = _lost(before, after, pairs.others, sum(s.total for s in shares))
    if sum(lost.values()) > tolerance and not ignore:
        worst = ", ".join(f"{name} {share:.1%}" for name, share in list(lost.items())[:3])
        raise AdapterMismatchError(
            f"{after.folder}: {sum(lost.values()):.1%} of what was trained is in tensors that no adapter can hold "
            f"({worst}), more than {tolerance:.1%}.",
            hint="--ignore leaves them out: the adapter then answers otherwise than the checkpoint.",
        )
    places = {module: pairs.matrices[module] for module in deltas}
    adapter = Adapter(
        family=kind,
        deltas=deltas,
        replaced={module: _head(after, module) for module in pairs.heads},
        digest="",
        source=after.folder,
        base=_name(before, base),
        fingerprint=fingerprint_of(before, set(places.values())),
        task=_task(after.config),
        labels=_labels(after.config) if pairs.heads else (),
        settings=settings_of(target, shares),
    )
    if out.suffix == ".safetensors":
        write_file(adapter, out, values_dtype=np.dtype(values))
    else:
        write_folder(adapter, out)
    written = read_adapter(out)
    files = [out] if out.is_file() else [path for path in out.iterdir() if path.is_file()]
    return Extraction(
        out=str(out),
        family=kind,
        digest=written.digest,
        bytes=sum(path.stat().st_size for path in files),
        unit=target.unit,
        shares=shares,
        energy=energy_kept(shares),
        heads=pairs.heads,
        lost=lost,
        notes=_notes(before, after, places),
    )


def _pairs(before: Checkpoint, after: Checkpoint) -> _Pairs:
    """Which tensors of both belong together, and what is to become of them."""
    one, two = (checkpoint.config.get("model_type") for checkpoint in (before, after))
    if one != two:
        raise CheckpointError(
            f"{before.folder} is a {one}, {after.folder} a {two}.",
            hint="An adapter is extracted between two checkpoints of one architecture.",
        )
    model = meta_model(after.config)
    rename = renaming(model)

    def key(name: str, checkpoint: Checkpoint) -> str:
        return canonical(rename(name), checkpoint.config)

    linear = {
        canonical(name, after.config)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")
    }
    stored = {key(name, before): name for name in before.places}
    inside = _inside(after)
    matrices, others, heads = {}, {}, []
    for name in after.places:
        module, _, part = name.rpartition(".")
        own = stored.get(key(name, after))
        replaced = not inside(name) and not _generative(after.config)
        if replaced or own is None:
            heads.append(module)
        elif before.shape(own) != after.shape(name):
            raise CheckpointError(
                f"{name} of {after.folder} is {list(after.shape(name))}, the base's {list(before.shape(own))}.",
                hint="Was the vocabulary resized? An adapter cannot hold that.",
            )
        elif part == "weight" and key(name, after).removesuffix(".weight") in linear:
            matrices[module] = own.removesuffix(".weight")
        elif before.dtype(own) in FLOATS:
            others[name] = own
    whole = tuple(dict.fromkeys(heads))
    return _Pairs(matrices, {n: o for n, o in others.items() if n.rpartition(".")[0] not in whole}, whole)


def _inside(checkpoint: Checkpoint) -> Any:
    """Whether a tensor belongs to the bare model: of a task model's, those under its prefix."""
    prefix = f"{base_prefix(checkpoint.config)}."
    if len(prefix) == 1 or not any(name.startswith(prefix) for name in checkpoint.places):
        return lambda _: True
    return lambda name: name.startswith(prefix)


def _changes(
    before: Checkpoint, after: Checkpoint, matrices: Mapping[str, str], progress: Progress
) -> Iterator[tuple[str, Change]]:
    """ΔW [out, in], float32 or float64, of each matrix that changed; one pair of tensors is read at a time."""
    for done, (module, own) in enumerate(matrices.items(), 1):
        change = _difference(before, f"{own}.weight", after, f"{module}.weight")
        progress("extract", done, len(matrices))
        if change is not None:
            yield module, change.T if is_transposed(after, module) else change


def _difference(before: Checkpoint, own: str, after: Checkpoint, name: str) -> NDArray[Any] | None:
    """The tensor's change, or None where there is none; what was mapped is given back."""
    old, new = before.read(own), after.read(name)
    wide = np.float64 if old.dtype == np.float64 else np.float32
    change = new.astype(wide) - old.astype(wide)
    for checkpoint, tensor in ((before, own), (after, name)):
        checkpoint.shards[checkpoint.places[tensor]].forget()
    if not np.isfinite(change).all():
        raise CheckpointError(f"{name}: NaN or infinite numbers.", hint="The training diverged, or a file is damaged.")
    return change if change.any() else None


def _lost(before: Checkpoint, after: Checkpoint, others: Mapping[str, str], held: float) -> dict[str, float]:
    """Share of the energy of all changes by tensor, largest first, of those that have no place in an adapter."""
    energies = {}
    for name, own in others.items():
        change = _difference(before, own, after, name)
        if change is not None:
            flat = change.reshape(-1)
            energies[name] = float(np.einsum("i,i->", flat, flat, dtype=np.float64))
    total = held + sum(energies.values())
    return {name: energy / total for name, energy in sorted(energies.items(), key=lambda item: -item[1])}


def _head(checkpoint: Checkpoint, module: str) -> ReplacedModule:
    tensors = {}
    for name in checkpoint.places:
        owner, _, part = name.rpartition(".")
        if owner == module:
            tensor = checkpoint.read(name)
            tensors[part] = np.array(tensor, dtype=np.float16 if tensor.dtype == np.float16 else np.float32)
    return ReplacedModule(tensors)


def _generative(config: Mapping[str, Any]) -> bool:
    return _task(config) == "causal-lm"


def _task(config: Mapping[str, Any]) -> str | None:
    own = str((config.get("architectures") or [""])[0])
    if own.endswith("ForSequenceClassification"):
        return "text-classification"
    if own.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    return "feature-extraction" if own.endswith("Model") else None


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if _task(config) != "text-classification" or not isinstance(names, dict):
        return ()
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _name(checkpoint: Checkpoint, given: str | Path) -> str:
    known = str(checkpoint.config.get("_name_or_path") or given)
    return Path(known).name if Path(known).exists() or Path(known).is_absolute() else known


def _notes(before: Checkpoint, after: Checkpoint, places: Mapping[str, str]) -> tuple[str, ...]:
    kinds = {(before.dtype(f"{own}.weight"), after.dtype(f"{module}.weight")) for module, own in places.items()}
    mixed = [pair for pair in kinds if pair[0] != pair[1]]
    if not mixed:
        return ()
    return (f"the base is stored as {mixed[0][0]}, the other as {mixed[0][1]}: rounding counts as change.",)

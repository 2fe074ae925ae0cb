"""Turn an adapter into another form (compact file, PEFT folder, `.onnx_adapter`) or kind, and say what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy.adapters.base import TASKS, Adapter
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.fitting import fit
from ssh_deploy.adapters.peft_folder import CONFIG, WEIGHTS, write_folder
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError, OutputError
from ssh_deploy.jobs.recasting import KINDS, Base, Recast, Share, energy_kept, recast_adapter, table
from ssh_deploy.registry import get_family

FORMS = ("file", "peft", *KINDS, "onnx-adapter")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Attributes:
        source, out: paths; ``form``: of ``out``, in words.
        digest: sha256 of the content written.
        bytes_before, bytes_after: of both.
        rounding: largest change of a number by writing it, over the largest number of its tensor; None for rows of
            a graph.
        fingerprint: of the base, where one is stored.
        notes: what a person should know.
        energy: share of ``‖ΔW‖²`` that another kind keeps; None where the kind is the same.
        shares: the same for each matrix, and how many ``unit`` (coefficients, rank) hold it.
    """

    source: str
    out: str
    form: str
    digest: str
    bytes_before: int
    bytes_after: int
    rounding: float | None
    fingerprint: str | None
    notes: tuple[str, ...]
    energy: float | None = None
    shares: tuple[Share, ...] = ()
    unit: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self)
        found["shares"] = {s.module: {"size": s.size, "energy": s.share} for s in self.shares}
        return found

    def lines(self) -> list[str]:
        """For people."""
        kept = f"fingerprint {self.fingerprint[:16]}…" if self.fingerprint else "no fingerprint of its base"
        said = "" if self.rounding is None else f"; values rounded by at most {self.rounding:.1e} of the largest"
        return [
            *([] if self.energy is None else table(self.shares, self.unit)),
            *([] if self.energy is None else [f"{self.energy:.2%} of ΔW's energy kept in {len(self.shares)} matrices"]),
            f"{self.out}: {self.form}, {self.bytes_after:,} bytes (was {self.bytes_before:,}), {kept}",
            f"sha256 {self.digest}{said}",
            *(f"Note: {note}" for note in self.notes),
        ]


def convert_adapter(
    source: str | Path,
    out: str | Path,
    *,
    form: str | None = None,
    values: str = "float16",
    base: str | Path | None = None,
    base_name: str | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    folder: str | Path | None = None,
    **amount: Any,
) -> Conversion:
    """Read ``source`` and write it as ``out``, all or nothing; what was written is read back and compared.

    Args:
        source: compact file or PEFT folder.
        out: new file or folder. Spectra go into a file when it ends in .safetensors, else into a folder.
        form: one of `FORMS`; None: a file when ``out`` ends in .safetensors, else the other form than it has.
        values: ``float16`` or ``float32``, of the coefficients in a file (a PEFT folder always has float32).
        base: checkpoint it was trained on; it is checked against it, gets its shapes and stores its fingerprint.
            Changes that depend on the weight (DoRA) need it to become another kind.
        base_name: of the base, to store instead of what ``source`` says.
        task: one of `TASKS`, instead of what ``source`` says.
        labels: instead of what ``source`` says.
        folder: exported, for ``onnx-adapter``: whose graph the rows are for.
        amount: ``transform``, ``coefficients``, ``energy``, ``rank``, ``min_energy`` of `Recast`, for another kind.

    Raises:
        AdapterFileError, AdapterMismatchError, CheckpointError, FingerprintError: ``source`` is broken, not of
            this base, or too little of it would be kept.
        OutputError: ``out`` exists or cannot be written.
    """
    source, out = Path(source), Path(out)
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists already.", hint="Choose another name or remove it first.")
    _check_options(form, folder, {k: v for k, v in amount.items() if v is not None})
    if form == "onnx-adapter":
        return _lay_out(source, out, Path(str(folder)))
    adapter, fitted = _read(source, base)
    adapter = _described(adapter, base_name, task, labels)
    before, unit, notes = _bytes(adapter.source), "", list[str]()
    shares: tuple[Share, ...] = ()
    if form in KINDS:
        target = Recast(form, **{k: v for k, v in amount.items() if v is not None})
        adapter, shares = recast_adapter(adapter, target, base=fitted)
        unit = target.unit
        notes += _larger(shares, target)
    whole = form == "file" or (form != "peft" and out.suffix == ".safetensors")
    if whole or (form is None and adapter.source.is_dir()):
        write_file(adapter, out, values_dtype=np.dtype(values))
        if adapter.fingerprint is None:
            notes.append("no fingerprint is stored; give --base BASE to store one.")
    else:
        write_folder(adapter, out)
        if adapter.fingerprint is not None:
            notes.append("a PEFT folder has no place for the fingerprint; keep the file, or convert back with --base.")
    written = read_adapter(out, shapes={module: delta.shape for module, delta in adapter.deltas.items()})
    return Conversion(
        source=str(source),
        out=str(out),
        form="compact file" if out.is_file() else "PEFT folder",
        digest=written.digest,
        bytes_before=before,
        bytes_after=_bytes(out),
        rounding=_rounding(adapter, written),
        fingerprint=written.fingerprint.sha256 if written.fingerprint is not None else None,
        notes=tuple(notes),
        energy=energy_kept(shares) if shares else None,
        shares=shares,
        unit=unit,
    )


def _check_options(form: str | None, folder: str | Path | None, amount: dict[str, Any]) -> None:
    """Options that mean nothing for ``form`` are refused, not ignored."""
    if amount and form not in KINDS:
        raise AdapterMismatchError(
            f"--{next(iter(amount)).replace('_', '-')} says nothing of --to {form or 'file'}.",
            hint=f"It is for --to {', '.join(KINDS)}.",
        )
    if (folder is None) == (form == "onnx-adapter"):
        raise AdapterMismatchError(
            "--to onnx-adapter and --for OUT go together: rows are laid out for one exported graph.",
            hint="Give both, or neither.",
        )


def _lay_out(source: Path, out: Path, folder: Path) -> Conversion:
    """``source`` as the rows that the graph of the exported ``folder`` takes."""
    from ssh_deploy.graph.bank_file import write_onnx_adapter
    from ssh_deploy.jobs import folder_files as files
    from ssh_deploy.jobs.folder_adapters import layout_of
    from ssh_deploy.runtimes.folder import contained, open_folder, read_json
    from ssh_deploy.runtimes.loading import read_source
    from ssh_deploy.runtimes.session import Session

    opened = open_folder(folder)
    inputs = Session(contained(opened.root, files.MODEL)).adapter_inputs
    loaded = read_source(opened, inputs, stored=None, path=source, rename=True)
    rows = {key: array[None] for arrays in loaded.kinds.values() for key, array in arrays.items()}
    write_onnx_adapter(out, rows, layout_of(opened.root, read_json(opened.root, files.DEPLOYMENT)))
    return Conversion(
        source=str(source),
        out=str(out),
        form=f"rows for the graph of {folder}",
        digest=files.file_sha256(out),
        bytes_before=_bytes(source),
        bytes_after=_bytes(out),
        rounding=None,
        fingerprint=None,
        notes=(f"it means something to this export alone; its labels are {', '.join(loaded.labels) or 'the base’s'}.",),
    )


def _larger(shares: Sequence[Share], target: Recast) -> list[str]:
    """A note where a LoRA's factors hold more numbers than the matrices they stand for."""
    bulky = [s for s in shares if s.size * sum(s.shape) >= s.shape[0] * s.shape[1]]
    if target.kind != "lora" or not bulky:
        return []
    highest = max(s.size for s in bulky)
    found = f"in {len(bulky)} of {len(shares)} matrices the factors are larger than ΔW itself (rank up to {highest})"
    return [f"{found}; --rank R or --energy E makes them smaller."]


def _read(source: Path, base: str | Path | None) -> tuple[Adapter, Base | None]:
    """The adapter, and its base where one is given."""
    if base is None:
        return read_adapter(source), None
    checkpoint = open_checkpoint(base)
    fitted = fit(source, checkpoint)
    adapter = fitted.adapter
    # a hub id says which base it is; a path says only where it lay, so its last name is enough
    known = str(
        checkpoint.config.get("_name_or_path") or (checkpoint.folder.resolve() if Path(base).exists() else base)
    )
    own = Path(known).name if Path(known).is_absolute() else known
    adapter = replace(adapter, fingerprint=adapter.fingerprint or fitted.fingerprint, base=adapter.base or own)
    return adapter, Base(checkpoint, fitted.places)


def _described(adapter: Adapter, base: str | None, task: str | None, labels: Sequence[str] | None) -> Adapter:
    """``adapter`` with what the caller says of it."""
    if task is not None and task not in TASKS:
        raise AdapterFileError(f"No task is called {task!r}.", hint=f"Known: {', '.join(TASKS)}.")
    if labels is not None:
        rows = {t.shape[0] for new in adapter.replaced.values() for t in new.tensors.values() if t.ndim}
        if rows and len(labels) not in rows:
            raise AdapterFileError(
                f"{adapter.source}: {len(labels)} labels for a head of {' or '.join(map(str, sorted(rows)))} rows.",
                hint="Name every class once, in the order of the head's rows.",
            )
        adapter = replace(adapter, labels=tuple(labels))
    return replace(adapter, base=base or adapter.base, task=task or adapter.task)


def _bytes(path: Path) -> int:
    return sum((path / name).stat().st_size for name in (CONFIG, WEIGHTS)) if path.is_dir() else path.stat().st_size


def _rounding(before: Adapter, after: Adapter) -> float:
    """Largest change of a number, against the largest of its tensor."""
    family, worst = get_family(before.family), 0.0
    for module, delta in before.deltas.items():
        written = family.tensors(module, after.deltas[module])
        for name, tensor in family.tensors(module, delta).items():
            exact = tensor.astype(np.float64)
            change = float(np.abs(exact - written[name]).max(initial=0.0))
            worst = max(worst, change / (float(np.abs(exact).max(initial=0.0)) or 1.0))
    return worst

"""Turn a PEFT folder into a compact file, or back, and say what the change cost."""

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
from ssh_deploy.errors import AdapterFileError, OutputError
from ssh_deploy.registry import get_family

FORMS = ("file", "peft")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written. ``rounding`` is the largest change of a coefficient over the largest coefficient."""

    source: str
    out: str
    form: str
    digest: str
    bytes_before: int
    bytes_after: int
    rounding: float
    fingerprint: str | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        kept = f"fingerprint {self.fingerprint[:16]}…" if self.fingerprint else "no fingerprint of its base"
        return [
            f"{self.out}: {self.form}, {self.bytes_after:,} bytes (was {self.bytes_before:,}), {kept}",
            f"sha256 {self.digest}; values rounded by at most {self.rounding:.1e} of the largest",
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
) -> Conversion:
    """Read ``source`` and write it as ``out``, all or nothing; what was written is read back and compared.

    Args:
        source: compact file or PEFT folder.
        out: new file or folder.
        form: ``file`` or ``peft``; None: a file when ``out`` ends in .safetensors, else the other form than it has.
        values: ``float16`` or ``float32``, of the coefficients in a file (a PEFT folder always has float32).
        base: checkpoint it was trained on; it is checked against it, gets its shapes and stores its fingerprint.
        base_name: of the base, to store instead of what ``source`` says.
        task: one of `TASKS`, instead of what ``source`` says.
        labels: instead of what ``source`` says.

    Raises:
        AdapterFileError, AdapterMismatchError, CheckpointError, FingerprintError: ``source`` is broken or not of
            this base.
        OutputError: ``out`` exists or cannot be written.
    """
    source, out = Path(source), Path(out)
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists already.", hint="Choose another name or remove it first.")
    adapter = _described(_read(source, base), base_name, task, labels)
    if form is None:
        form = "file" if out.suffix == ".safetensors" or adapter.source.is_dir() else "peft"
    notes = []
    if form == "file":
        write_file(adapter, out, values_dtype=np.dtype(values))
        if adapter.fingerprint is None:
            notes.append("no fingerprint is stored; give --base BASE to store one.")
    else:
        write_folder(adapter, out)
        if adapter.fingerprint is not None:
            notes.append("a PEFT folder has no place for the fingerprint; keep the file, or convert back with --base.")
    written = read_adapter(out)
    return Conversion(
        source=str(source),
        out=str(out),
        form="compact file" if form == "file" else "PEFT folder",
        digest=written.digest,
        bytes_before=_bytes(adapter.source),
        bytes_after=_bytes(out),
        rounding=_rounding(adapter, written),
        fingerprint=written.fingerprint.sha256 if written.fingerprint is not None else None,
        notes=tuple(notes),
    )


def _read(source: Path, base: str | Path | None) -> Adapter:
    if base is None:
        return read_adapter(source)
    checkpoint = open_checkpoint(base)
    fitted = fit(source, checkpoint)
    adapter = fitted.adapter
    # a hub id says which base it is; a path says only where it lay, so its last name is enough
    known = str(
        checkpoint.config.get("_name_or_path") or (checkpoint.folder.resolve() if Path(base).exists() else base)
    )
    own = Path(known).name if Path(known).is_absolute() else known
    return replace(adapter, fingerprint=adapter.fingerprint or fitted.fingerprint, base=adapter.base or own)


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

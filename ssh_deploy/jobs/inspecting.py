"""What an adapter holds, what it weighs beside LoRA, and whether it fits a base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.fitting import fit
from ssh_deploy.adapters.peft_folder import CONFIG, WEIGHTS
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.deltas.sparse import SparseDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError, FingerprintError

LORA_RANK = 8
VERIFIED, UNVERIFIED, UNFIT = "verified", "base unverified", "does not fit"


@dataclass(frozen=True, slots=True)
class ModuleView:
    """One adapted weight: shape [out, in], n coefficients and its scale ‖ΔW‖ (Frobenius) where that is free."""

    module: str
    shape: tuple[int, int]
    kind: str
    parameters: int
    norm: float | None


@dataclass(frozen=True, slots=True)
class HeadView:
    """One module trained whole: shapes of its tensors."""

    module: str
    tensors: dict[str, tuple[int, ...]]
    parameters: int


@dataclass(frozen=True, slots=True)
class BaseView:
    """How an adapter stands to a base: ``verified``, ``base unverified`` or ``does not fit``, and why."""

    base: str
    match: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything about one adapter; bytes are of its files, LoRA's of bf16 matrices A and B on the same modules."""

    source: str
    form: str
    digest: str
    family: str
    transforms: tuple[str, ...]
    alphas: tuple[float, ...]
    settings: dict[str, Any]
    base: str | None
    fingerprint: str | None
    task: str | None
    labels: tuple[str, ...]
    modules: tuple[ModuleView, ...]
    heads: tuple[HeadView, ...]
    parameters: int
    head_parameters: int
    bytes: int
    lora_parameters: int
    lora_bytes: int
    against: BaseView | None

    @property
    def fits(self) -> bool:
        """False when it was held against a base that it does not fit."""
        return self.against is None or self.against.match != UNFIT

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "fits": self.fits}

    def lines(self) -> list[str]:
        """For people."""
        settings = ", ".join(f"{k} = {v}" for k, v in self.settings.items())
        alphas = ", ".join(f"{alpha:g}" for alpha in self.alphas)
        width = max(len(m.module) for m in self.modules)
        table = [f"{'module':{width}}  {'shape':>11}  {'n':>6}  ‖ΔW‖"]
        for m in self.modules:
            shape = f"{m.shape[0]}×{m.shape[1]}"
            norm = "" if m.norm is None else f"{m.norm:.3g}"
            table.append(f"{m.module:{width}}  {shape:>11}  {m.parameters:>6}  {norm}")
        numbers = f"{self.parameters:,} numbers in {len(self.modules)} modules, {self.head_parameters:,} in heads"
        lines = [
            f"{self.source}: {self.form}, family {self.family}, transform {', '.join(self.transforms) or 'none'}",
            f"sha256 {self.digest}",
            ", ".join(part for part in (f"α = {alphas}" if alphas else "", settings) if part) or "no settings",
            f"task {self.task or 'unnamed'}; labels: {', '.join(self.labels) or 'unnamed'}",
            f"base {self.base or 'unnamed'}; fingerprint {self.fingerprint or 'none'}",
            *table,
            *(f"head {h.module}: {', '.join(f'{n} {list(s)}' for n, s in h.tensors.items())}" for h in self.heads),
            f"{numbers}; {self.bytes:,} bytes",
            f"LoRA r={LORA_RANK} on the same: {self.lora_parameters:,} numbers, {self.lora_bytes:,} bytes (bf16)",
        ]
        if self.against is not None:
            reason = f": {self.against.reason}" if self.against.reason else ""
            lines.append(f"against {self.against.base}: {self.against.match}{reason}")
        return lines


def inspect_adapter(path: str | Path, *, base: str | Path | None = None, plot: str | Path | None = None) -> Inspection:
    """Read an adapter and say what it is; with ``base`` also whether it fits.

    Args:
        path: compact file or PEFT folder.
        base: folder or hub id to hold it against.
        plot: PNG to draw: where the coefficients lie, and |ΔW| of one module.

    Raises:
        AdapterFileError: no adapter, or a broken one.
        CheckpointError: no base there.
        DependencyError: ``plot`` without matplotlib.
        OutputError: the picture cannot be written.
    """
    path = Path(path)
    adapter, against = (read_adapter(path), None) if base is None else _held_against(path, base)
    if plot is not None:
        from ssh_deploy.jobs.picture import draw_adapter

        draw_adapter(adapter, Path(plot))
    spectral = [d for d in adapter.deltas.values() if isinstance(d, SpectralDelta)]
    lora = sum(LORA_RANK * sum(delta.shape) for delta in adapter.deltas.values())
    return Inspection(
        source=str(path),
        form="PEFT folder" if adapter.source.is_dir() else "compact file",
        digest=adapter.digest,
        family=adapter.family,
        transforms=tuple(sorted({d.transform for d in spectral})),
        alphas=tuple(sorted({d.alpha for d in spectral})),
        settings=dict(adapter.settings),
        base=adapter.base,
        fingerprint=adapter.fingerprint.sha256 if adapter.fingerprint is not None else None,
        task=adapter.task,
        labels=adapter.labels,
        modules=tuple(
            ModuleView(name, delta.shape, delta.kind, delta.parameters, _norm(delta))
            for name, delta in sorted(adapter.deltas.items())
        ),
        heads=tuple(
            HeadView(name, {n: tuple(t.shape) for n, t in new.tensors.items()}, new.parameters)
            for name, new in sorted(adapter.replaced.items())
        ),
        parameters=adapter.parameters,
        head_parameters=sum(new.parameters for new in adapter.replaced.values()),
        bytes=_size(adapter),
        lora_parameters=lora,
        lora_bytes=2 * lora,
        against=against,
    )


def _held_against(path: Path, base: str | Path) -> tuple[Adapter, BaseView]:
    """The adapter, and how it stands to ``base``; that it does not fit is an answer, not an error."""
    checkpoint = open_checkpoint(base)
    try:
        fitted = fit(path, checkpoint)
    except (AdapterMismatchError, FingerprintError) as reason:
        try:
            return read_adapter(path), BaseView(str(base), UNFIT, f"{reason.what}")
        except AdapterFileError:  # a folder that tells no shapes cannot be read without a base that fits
            raise reason from None
    return fitted.adapter, BaseView(str(base), VERIFIED if fitted.verified else UNVERIFIED, "")


def _norm(delta: Delta) -> float | None:
    """‖ΔW‖ where ΔW need not be formed: of a spectrum by Parseval, since every axis is orthonormal."""
    if isinstance(delta, LowRankDelta | SparseDelta):
        return delta.norm
    if not isinstance(delta, SpectralDelta):
        return None
    spectrum = delta.separable()
    _, places = np.unique(spectrum.rows * delta.shape[1] + spectrum.cols, return_inverse=True)  # duplicates add
    sums = np.bincount(places, weights=spectrum.values.astype(np.float64))
    return float(abs(delta.gain * spectrum.factor) * np.linalg.norm(sums))


def _size(adapter: Adapter) -> int:
    source = adapter.source
    files = [source / CONFIG, source / WEIGHTS] if source.is_dir() else [source]
    return sum(file.stat().st_size for file in files)

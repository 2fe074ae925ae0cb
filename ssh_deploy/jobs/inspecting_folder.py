"""What an exported folder holds: its base, how that is stored, where adapters fit, and which lie in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.folder import DEPLOYMENT, MODEL, StoredAdapter, open_folder, read_json


@dataclass(frozen=True, slots=True)
class AdapterView:
    """One adapter of the folder. ``bytes`` of its file, None where that is missing; ``verified``: it fits the base."""

    name: str
    family: str
    task: str | None
    labels: tuple[str, ...]
    bytes: int | None
    verified: bool | None


@dataclass(frozen=True, slots=True)
class QuantizedView:
    """How the base is stored: ``int8`` or ``int4``, and how many of its linear modules have so many bits."""

    scheme: str
    modules: dict[int, int]


@dataclass(frozen=True, slots=True)
class FolderInspection:
    """Everything about one exported folder; ``shapes`` counts the slots by (out, in), ``bytes`` are the graph's."""

    source: str
    mode: str
    base: str
    architecture: str
    fingerprint: str
    task: str
    quantized: QuantizedView | None
    kinds: tuple[str, ...]
    shapes: tuple[tuple[tuple[int, int], int], ...]
    head: str | None
    labels: tuple[str, ...]
    context: int | None
    required: bool
    bytes: int
    adapters: tuple[AdapterView, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        shapes = [{"out": out, "in": inn, "sites": sites} for (out, inn), sites in self.shapes]
        return {**asdict(self), "shapes": shapes}

    def lines(self) -> list[str]:
        """For people."""
        base = f"{self.source}: exported folder ({self.mode}) of {self.base} ({self.architecture}), task {self.task}"
        stored = "not quantised"
        if self.quantized is not None:
            parts = ", ".join(f"{n} modules of {bits} bits" for bits, n in sorted(self.quantized.modules.items()))
            stored = f"quantised to {self.quantized.scheme}: {parts}"
        slots = "no slots: its adapter is merged"
        if self.kinds:
            sites = ", ".join(f"{n} of {out}×{inn}" for (out, inn), n in self.shapes) or "no sites"
            needed = "must be fed" if self.required else "may be left out"
            slots = f"slots: {sites}; kinds {', '.join(self.kinds)}; adapter inputs {needed}"
        lines = [base, f"fingerprint {self.fingerprint}", f"graph of {self.bytes:,} bytes, {stored}", slots]
        if self.labels or self.head:
            lines.append(f"head {self.head or 'inside'}; labels of the base: {', '.join(self.labels) or 'unnamed'}")
        if self.context is not None:
            lines.append(f"context of {self.context:,} tokens")
        if not self.adapters:
            return [*lines, "no adapters"]
        width = max(len(adapter.name) for adapter in self.adapters)
        for adapter in self.adapters:
            size = "its file is missing" if adapter.bytes is None else f"{adapter.bytes:,} bytes"
            match = "verified" if adapter.verified else "base unverified"
            labels = f"; {', '.join(adapter.labels)}" if adapter.labels else ""
            task = adapter.task or "task unnamed"
            lines.append(f"adapter {adapter.name:{width}}  {adapter.family}, {task}, {size}, {match}{labels}")
        return lines


def inspect_folder(path: str | Path) -> FolderInspection:
    """Read an exported folder's own description; neither its graph nor its adapters are opened.

    Raises:
        DeploymentError: no exported folder, or a damaged description.
    """
    folder = open_folder(path)
    shapes = Counter((site.out, site.inn) for site in folder.sites)
    graph = [folder.root / name for name in (MODEL, f"{MODEL}.data")]
    return FolderInspection(
        source=str(path),
        mode="merged" if folder.guard is None else "sidecar",
        base=folder.base,
        architecture=folder.architecture,
        fingerprint=folder.fingerprint,
        task=folder.task,
        quantized=_quantized(folder.root),
        kinds=folder.kinds,
        shapes=tuple(sorted(shapes.items(), reverse=True)),
        head=folder.head,
        labels=folder.labels,
        context=None if folder.decoder is None else folder.decoder.context,
        required=folder.required,
        bytes=sum(file.stat().st_size for file in graph if file.exists()),
        adapters=tuple(_viewed(adapter) for _, adapter in sorted(folder.adapters.items())),
    )


def _viewed(adapter: StoredAdapter) -> AdapterView:
    size = adapter.path.stat().st_size if adapter.path.is_file() else None
    return AdapterView(adapter.name, adapter.family, adapter.task, adapter.labels, size, adapter.verified)


def _quantized(root: Path) -> QuantizedView | None:
    stated = read_json(root, DEPLOYMENT).get("quantized")
    if stated is None:
        return None
    scheme, modules = (stated.get(key) for key in ("scheme", "modules")) if isinstance(stated, dict) else (None, None)
    if not isinstance(scheme, str) or not isinstance(modules, dict) or {type(n) for n in modules.values()} - {int}:
        raise DeploymentError(
            f"{root}/{DEPLOYMENT}: quantized names no scheme and bits of modules.",
            hint="The folder is damaged or forged: export it again.",
        )
    return QuantizedView(scheme, dict(Counter(modules.values())))

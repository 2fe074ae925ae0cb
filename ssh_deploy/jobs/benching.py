"""What every `ssh-deploy bench` prints: the machine, a row per case and variant, and the headline figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssh_deploy.checkpoints.whole import whole_file

_PACKAGES = ("ssh-deploy", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "torch", "transformers", "peft")


@dataclass(slots=True)
class Bench:
    """Figures as they grow: ``results`` has one mapping per case and variant, ``summary`` the headline figures."""

    name: str
    machine: Mapping[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The form that every bench speaks."""
        return {
            "bench": self.name,
            "machine": dict(self.machine),
            "results": self.results,
            "summary": self.summary,
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write `as_dict` as JSON in place of what is at ``path``, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        with whole_file(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def lines(self, columns: Sequence[str]) -> list[str]:
        """For people: a table of ``columns`` of the results, then the summary."""
        about = f"{self.machine['cpu']}, {self.machine['cores']} cores, Python {self.machine['python']}"
        headline = [f"{key:<20} {value:g}" for key, value in self.summary.items()]
        return [about, "", *table(self.results, columns), "", *headline, *(f"note: {note}" for note in self.notes)]


def describe_machine(*, threads: int | None = None) -> dict[str, Any]:
    """CPU, cores, memory and versions; ``threads`` of one operator, None: all cores."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_gb": _memory_gb(),
        "threads": threads or os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def resident_bytes() -> int:
    """Resident memory of this process, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Lines of a plain table; a row without a column leaves it blank."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

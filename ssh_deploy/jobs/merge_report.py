"""What a merge did, as numbers and as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

VERIFIED, UNVERIFIED = "verified", "base unverified"
SURVIVAL_FLOOR = 0.9


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What happened to one weight: max|ΔW|, ‖ΔW‖ (Frobenius), survival and unchanged share (`jobs.rounding`)."""

    tensor: str
    adapters: tuple[str, ...]
    max_delta: float
    norm: float
    survival: float
    unchanged: float


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """One adapter as it went in; ``base`` is ``verified`` or ``base unverified``."""

    name: str
    weight: float
    family: str
    digest: str
    base: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote.

    Bytes are of the whole folder, ``changed_bytes`` of the tensors that were computed. ``resumed``: shards that an
    earlier run had finished; ``infinite``: adapted tensors with numbers in the base that are not finite.
    """

    out: str
    dtype: str
    adapters: tuple[MergedAdapter, ...]
    head: str | None
    sites: tuple[SiteReport, ...]
    survival: float
    renamed: int
    dropped: tuple[str, ...]
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes: int
    changed_bytes: int
    resumed: tuple[str, ...]
    infinite: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(_notes(self)))

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: one line a tensor, then the sums and what to know."""
        width = max(len(site.tensor) for site in self.sites)
        table = [f"{'tensor':{width}}  max|ΔW|    ‖ΔW‖      survived"]
        table += [f"{s.tensor:{width}}  {s.max_delta:<9.3g}  {s.norm:<8.3g}  {s.survival:.1%}" for s in self.sites]
        names = ", ".join(f"{a.name} × {a.weight:g} ({a.base})" for a in self.adapters)
        size = f"{self.bytes:,} bytes, {self.changed_bytes:,} of them computed"
        count = f"{len(self.sites)} tensor{'' if len(self.sites) == 1 else 's'}"
        return [
            *table,
            f"Merged {names}; head: {self.head or 'as the base has it'}.",
            f"{count} changed, {self.survival:.2%} of ΔW survived the rounding.",
            f"{self.out}: {len(self.files)} files, {size}, in {self.seconds:.2f} s.",
            *(f"Note: {note}" for note in self.notes),
        ]


def _notes(report: MergeReport) -> Iterator[str]:
    """What a person should know of the merge."""
    if report.sites and not any(site.norm for site in report.sites):
        yield "ΔW is zero everywhere: but for a head, the result is the base. Was it saved before its training?"
    if report.survival < SURVIVAL_FLOOR:
        yield (
            f"Only {report.survival:.1%} of ΔW survived the rounding: merge with --dtype float32, or keep the adapter "
            "as a sidecar (ssh-deploy export --onnx), which rounds nothing."
        )
    if report.resumed:
        yield f"{len(report.resumed)} shards were there, finished by a run of the same command that was cut short."
    if report.infinite:
        yield f"Not finite in the base, and left as they are: numbers of {', '.join(report.infinite)}."
    unverified = [adapter.name for adapter in report.adapters if adapter.base != VERIFIED]
    if unverified:
        yield f"base unverified: no fingerprint of the base is stored in {', '.join(unverified)}."
    if report.dropped:
        yield f"Dropped tensors of the base that the task model has no place for: {', '.join(report.dropped)}."
    if report.left_out:
        yield f"Left out weights in other forms, which would answer as the base: {', '.join(report.left_out)}."

"""How much memory resident adapters may take, how wide their rows are, and how many fit.

The budget counts bytes of rows that adapters own, over all banks. A row is as wide as its bank, so bytes per adapter
are known before anything is loaded: that is what `HowManyFit` answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssh_deploy.errors import DeployError, DeploymentError
from ssh_deploy.graph.spectral_rows import AXES, spare
from ssh_deploy.runtimes.bank import Bank, inputs_by_kind, kind_of, row_bytes
from ssh_deploy.runtimes.folder import Folder, contained
from ssh_deploy.runtimes.mirror import Upload
from ssh_deploy.runtimes.residents import Residents
from ssh_deploy.runtimes.session import Input, onnxruntime

DEFAULT_MEMORY = "1GiB"
_NO_COEFFICIENTS, _LEAST_LABELS, _NO_RANK = 1024, 16, 16
_WIDTH_NAMES = {"lowrank": "rank", "reflection": "rank", "diagonal": "vectors"}
#: Widths of scales, where the folder stores none: one vector on the side of the inputs, two on that of the answers.
_VECTORS = {"diagonal_in": 1, "diagonal_out": 2}
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class HowManyFit:
    """What the budget holds; all sizes in bytes.

    Attributes:
        budget: for the rows of all banks together.
        max_coefficients: width of every row of coefficients, by kind; the rank of low-rank ones and thin maps.
        max_labels: labels of the widest head that fits, 0 for a graph without head slots.
        adapter_bytes: one adapter's row by kind, without a head.
        head_bytes: a head's row, 0 for a graph without head slots.
        fit: adapters that the budget holds by kind, when none brings a head.
        fit_with_heads: the same when each brings one.
        resident: adapters and sums in memory now.
        used: by them, heads included.
        used_by_heads: the part of ``used`` that is heads.
        free: of the budget; what is resident and idle is evicted for more.
    """

    budget: int
    max_coefficients: Mapping[str, int]
    max_labels: int
    adapter_bytes: Mapping[str, int]
    head_bytes: int
    fit: Mapping[str, int]
    fit_with_heads: Mapping[str, int]
    resident: int
    used: int
    used_by_heads: int
    free: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        mappings = ("max_coefficients", "adapter_bytes", "fit", "fit_with_heads")
        return {key: getattr(self, key) for key in self.__slots__} | {key: dict(getattr(self, key)) for key in mappings}

    def lines(self) -> list[str]:
        """For people: a line per kind, the head's, and what is resident."""
        said = [f"budget {self.budget:,} bytes"]
        for kind, size in self.adapter_bytes.items():
            with_heads = f", {self.fit_with_heads[kind]:,} with a head each" if self.head_bytes else ""
            width = f"{_WIDTH_NAMES.get(kind, 'n')} up to {self.max_coefficients[kind]:,}"
            said.append(f"{kind}: {size:,} bytes an adapter ({width}): {self.fit[kind]:,} fit{with_heads}")
        if self.head_bytes:
            said.append(f"head: {self.head_bytes:,} bytes (up to {self.max_labels:,} labels)")
        if not self.adapter_bytes and not self.head_bytes:
            said.append("the graph has no slots: no adapter fits")
        said.append(
            f"resident now: {self.resident:,} in {self.used:,} bytes, of which heads {self.used_by_heads:,}; "
            f"free {self.free:,}"
        )
        return said


def parse_bytes(memory: int | str) -> int:
    """``memory`` in bytes: a positive number, or text such as ``512MiB``, ``1.5 GB``, ``4096``.

    Raises:
        DeploymentError: anything else.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = _TEXT.fullmatch(memory) if isinstance(memory, str) else None
    unit = _UNITS.get(found.group(2).upper()) if found else None
    size = int(float(found.group(1)) * unit) if found and unit else 0
    if size <= 0:
        raise DeploymentError(
            f"{memory!r:.80} is no amount of memory.", hint="Give bytes, or text such as 512MiB, 1GiB or 2GB."
        )
    return size


def widths_of(
    folder: Folder,
    inputs: Mapping[str, Input],
    *,
    max_coefficients: int | None,
    max_labels: int | None,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Width of every symbolic side of the adapter inputs, the leading ones apart.

    Args:
        folder: whose stored adapters say how wide they are; one that cannot be read says nothing here, and says why
            when it is used.
        inputs: adapter inputs of the graph.
        max_coefficients: of every row; None: each kind's widest stored adapter, else the widest of any kind, else
            1,024.
        max_labels: of a head; None: the widest stored head, at least 16.
        max_rank: of low-rank adapters and thin maps; None: the highest stored rank, else 16.

    Inner layers of a head are as wide as the layer after them is deep: the graph allows nothing else.

    Raises:
        DeploymentError: a width below 1.
    """
    for option, width in {
        "max_coefficients": max_coefficients,
        "max_labels": max_labels,
        "max_rank": max_rank,
    }.items():
        if width is not None and width < 1:
            raise DeploymentError(f"{option}={width} holds nothing.", hint="Give at least 1, or None for the default.")
    stored = _stored_widths(folder, inputs)
    widest = max((n for (kind, _), n in stored.items() if kind in AXES), default=0)
    known_kinds = {kind for kind, _ in stored}
    widths: dict[str, int] = {}
    for kind, entries in inputs_by_kind(inputs.values()).items():
        following = [int(e.shape[2] or 0) for e in entries if len(e.shape) == 3 and not isinstance(e.shape[2], str)]
        for entry in entries:
            for side in entry.shape[1:]:
                if not isinstance(side, str) or side in widths:
                    continue
                if kind == "lowrank":
                    widths[side] = (stored.get((kind, side)) or _NO_RANK) if max_rank is None else max_rank
                elif kind == "reflection":  # a side that no stored adapter maps stays closed
                    known = stored.get((kind, side), 0) if kind in known_kinds else _NO_RANK
                    widths[side] = known if max_rank is None else max_rank
                elif kind == "diagonal":
                    widths[side] = stored.get((kind, side), 0) if kind in known_kinds else _VECTORS[side]
                elif kind != "head":
                    known = stored.get((kind, side), 0) or (widest if kind in AXES else 0)
                    wanted = max_coefficients or _NO_COEFFICIENTS
                    widths[side] = known if known and max_coefficients is None else wanted + spare(kind)
                elif side == "labels":
                    known = max(stored.get((kind, side), 0), len(folder.labels), _LEAST_LABELS)
                    widths[side] = known if max_labels is None else max_labels
                else:
                    following = following[1:]
                    widths[side] = following[0] if following else _LEAST_LABELS
    return widths


def _stored_widths(folder: Folder, inputs: Mapping[str, Input]) -> dict[tuple[str, str], int]:
    """Widest size of each symbolic side, by kind, among the folder's readable adapters; only shapes are looked at."""
    widest: dict[tuple[str, str], int] = {}
    for stored in folder.adapters.values():
        for name, shape in _shapes(folder, str(stored.path.relative_to(folder.root))).items():
            if name not in inputs or len(shape) != len(inputs[name].shape):
                continue
            for side, size in zip(inputs[name].shape[1:], shape[1:], strict=True):
                if isinstance(side, str):
                    key = (kind_of(name), side)
                    widest[key] = max(widest.get(key, 0), size)
    return widest


def _shapes(folder: Folder, file: str) -> dict[str, tuple[int, ...]]:
    try:
        parameters = onnxruntime().AdapterFormat.read_adapter(str(contained(folder.root, file))).get_parameters()
        return {name: tuple(map(int, value.shape())) for name, value in parameters.items()}
    except DeployError:
        return {}
    except Exception:  # ORT's classes share no root; what is wrong is said when the adapter is used
        return {}


def make_banks(
    folder: Folder,
    inputs: Mapping[str, Input],
    widths: Mapping[str, int],
    budget: int,
    *,
    upload: Upload | None = None,
) -> dict[str, Bank]:
    """Empty banks for the adapter ``inputs``, each of as many rows as ``budget`` bytes hold; ``upload``: see `Bank`.

    Raises:
        DeploymentError: the budget does not hold one adapter, or the system has not that much memory.
    """
    kinds = inputs_by_kind(inputs.values())
    size = {kind: row_bytes(entries, widths) for kind, entries in kinds.items()}
    spectra = {kind: n for kind, n in size.items() if kind != "head"}
    least = max(spectra.values(), default=0) + size.get("head", 0)
    if least > budget:
        parts = ", ".join(f"{kind} {n:,}" for kind, n in size.items())
        raise DeploymentError(
            f"{folder.root}: a budget of {budget:,} bytes is too small for one adapter of {least:,} ({parts}).",
            hint="Open the deployment with more `memory=`, or a smaller max_coefficients=, max_rank= or max_labels=.",
        )
    return {
        kind: Bank(kind, kinds[kind], widths=widths, capacity=budget // max(size[kind], 1), upload=upload)
        for kind in kinds
    }


def how_many_fit(residents: Residents) -> HowManyFit:
    """What the budget of ``residents`` holds, and what it holds now."""
    size = {kind: bank.row_bytes for kind, bank in residents.banks.items() if kind != "head"}
    head = residents.banks["head"].row_bytes if "head" in residents.banks else 0
    budget = residents.budget
    with residents.changed:
        resident, used, heads = len(residents), residents.used, residents.head_bytes()
    return HowManyFit(
        budget=budget,
        max_coefficients={kind: max(residents.banks[kind].widths.values(), default=0) - spare(kind) for kind in size},
        max_labels=residents.banks["head"].widths.get("labels", 0) if head else 0,
        adapter_bytes=size,
        head_bytes=head,
        fit={kind: budget // max(n, 1) for kind, n in size.items()},
        fit_with_heads={kind: budget // max(n + head, 1) for kind, n in size.items()},
        resident=resident,
        used=used,
        used_by_heads=heads,
        free=budget - used,
    )

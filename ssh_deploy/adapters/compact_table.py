"""What the table of tensors in a compact file means (FORMAT.md): spectra by module, samples of the base, the rest.

Files with one table and the same modules mean the same by it, so it is worked out once for as long as the table is
kept (`checkpoints.safefile`). Spectra of one form are read as stacks, where they lie: nothing is done module by module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ssh_deploy.adapters.base import check_shape
from ssh_deploy.checkpoints.fingerprint import SAMPLES
from ssh_deploy.checkpoints.safefile import Alike, Table
from ssh_deploy.deltas.spectral import Stack
from ssh_deploy.errors import AdapterFileError

#: What values and places may be.
VALUES = (np.dtype(np.float16), np.dtype(np.float32))
PLACES = (np.dtype(np.uint16), np.dtype(np.uint32))
BF16 = np.dtype(ml_dtypes.bfloat16)
_KNOWN = "compact"
_PARTS = ("values", "rows", "cols")


@dataclass(frozen=True, slots=True, eq=False)
class _Spectra:
    """Modules whose spectra agree in form: their shape (out, in) and where the three parts lie."""

    modules: tuple[str, ...]
    shape: tuple[int, int]
    rows: Alike
    cols: Alike
    values: Alike


@dataclass(frozen=True, slots=True, eq=False)
class CompactTable:
    """One table, understood.

    Attributes:
        key: what it was understood of besides.
        modules: with a spectrum, in the metadata's order.
        spectra: the same in groups of one form.
        sites: (name, (out, in)) of the base's samples.
        samples: (first byte, byte after the last) of them, where one ends and another begins taken together.
        others: names of tensors that are neither.
    """

    key: str
    modules: tuple[str, ...]
    spectra: Sequence[_Spectra]
    sites: tuple[tuple[str, tuple[int, int]], ...]
    samples: tuple[tuple[int, int], ...]
    others: frozenset[str]

    def stacks(self, payload: memoryview, transform: str, alpha: float, norm: str) -> list[Stack[str]]:
        """Spectra in ``payload``, zero-copy where they lie in equal steps."""
        return [
            Stack(s.shape, transform, s.rows.of(payload), s.cols.of(payload), s.values.of(payload), alpha, norm,
                  s.modules)
            for s in self.spectra
        ]  # fmt: skip

    def sample_bytes(self, payload: memoryview) -> bytes:
        """The base's samples, bf16, in the order of ``sites``."""
        return b"".join(payload[start:stop] for start, stop in self.samples)


def understood(
    where: str, table: Table, modules: Mapping[str, Any], sites: Mapping[str, Any], *, transposed: bool
) -> CompactTable:
    """``table`` of a file that declares spectra for ``modules`` and samples of ``sites``.

    Args:
        where: names the file in the message.
        table: of the file.
        modules: what the metadata says of their shapes.
        sites: likewise.
        transposed: shapes and places are [in, out].

    Raises:
        AdapterFileError: a shape that is none, a tensor that is missing or of a dtype that is not the format's.
    """
    key = repr((modules, sites, transposed))  # not themselves: True is equal to 1, and 1.0 is
    known = table.known.get(_KNOWN)
    if isinstance(known, CompactTable) and known.key == key:
        return known
    left = set(table.entries)
    spectra = _grouped(where, table, modules, left, transposed=transposed)
    found, samples = _samples(where, table, sites, left)
    made = CompactTable(key, tuple(modules), spectra, found, samples, frozenset(left))
    table.known[_KNOWN] = made
    return made


def _grouped(
    where: str, table: Table, modules: Mapping[str, Any], left: set[str], *, transposed: bool
) -> list[_Spectra]:
    groups: dict[Any, list[str]] = {}
    for module, shape in modules.items():
        sides = check_shape(f"{where}: {module}", tuple(shape) if isinstance(shape, list) else ())
        forms = []
        for part in _PARTS:
            name = f"spectral.{module}.{part}"
            take(where, table, name, left)
            forms.append(table.form(name))
        _check_dtypes(f"{where}: {module}", *(dtype for dtype, _ in forms))
        groups.setdefault((sides, *forms), []).append(module)
    spectra = []
    for (sides, *_), members in groups.items():
        values, rows, cols = (table.alike([f"spectral.{module}.{part}" for module in members]) for part in _PARTS)
        if transposed:
            rows, cols = cols, rows
        shape = (sides[1], sides[0]) if transposed else sides
        spectra.append(_Spectra(tuple(members), shape, rows, cols, values))
    return spectra


def _samples(
    where: str, table: Table, sites: Mapping[str, Any], left: set[str]
) -> tuple[tuple[tuple[str, tuple[int, int]], ...], tuple[tuple[int, int], ...]]:
    found, ranges = [], list[tuple[int, int]]()
    for site, shape in sites.items():
        name, what = f"fingerprint.{site}", f"{where}: fingerprint of {site}"
        take(where, table, name, left)
        sides = check_shape(what, tuple(shape) if isinstance(shape, list) else ())
        dtype, form = table.form(name)
        if dtype != BF16 or form != (min(SAMPLES, sides[0] * sides[1]),):
            raise AdapterFileError(f"{what} is {dtype} {form}.", hint="The file is forged.")
        found.append((site, sides))
        start, stop = table.entries[name]["data_offsets"]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return tuple(found), tuple(ranges)


def take(where: str, table: Table, name: str, left: set[str]) -> None:
    """``name`` is accounted for, and no longer among those ``left``.

    Raises:
        AdapterFileError: the table has none.
    """
    if name not in table.entries:
        raise AdapterFileError(f"{where}: tensor {name!r} is declared and missing.", hint="The file is forged.")
    left.discard(name)


def _check_dtypes(where: str, values: np.dtype[Any], rows: np.dtype[Any], cols: np.dtype[Any]) -> None:
    if values not in VALUES or rows != cols:
        raise AdapterFileError(
            f"{where}: values {values}, rows {rows}, cols {cols}.",
            hint="Values are float16 or float32, both places uint16 or both uint32.",
        )
    if rows not in PLACES:
        raise AdapterFileError(f"{where}: places are {rows}.", hint="Places are uint16 or uint32.")

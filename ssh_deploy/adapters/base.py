"""What an adapter is once it is read, what a family must do to read one, and the checks all of them share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.fingerprint import Fingerprint
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.replaced import ReplacedModule
from ssh_deploy.deltas.spectral import SpectralDelta, Stack, stacked
from ssh_deploy.errors import AdapterFileError

#: Shapes [out, in] of a base's weights by the adapter's own module paths.
Shapes = Mapping[str, tuple[int, int]]

TASKS = ("feature-extraction", "text-classification", "causal-lm")
MAX_SIDE = 1 << 24  # no weight has a longer side; declared shapes above it are a forged file


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter, whatever file it came from.

    Attributes:
        family: registered name of the family that read it.
        deltas: by module path as in the model it was trained on (no ``base_model.model.``, no ``.weight``).
        replaced: modules trained whole (classifier heads), by module path.
        digest: sha256 (hex) of its content: its identity, whatever its name.
        source: where it was read.
        base: name of the base it was trained on, or None.
        fingerprint: samples of that base, or None: then it is "base unverified".
        task: one of `TASKS`, or None.
        labels: class names in the order of the head's rows; empty when unnamed.
        settings: what else the file says of its training (n, δ, seed).
    """

    family: str
    deltas: Mapping[str, Delta]
    replaced: Mapping[str, ReplacedModule]
    digest: str
    source: Path
    base: str | None = None
    fingerprint: Fingerprint | None = None
    task: str | None = None
    labels: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Trained numbers in its deltas, heads aside."""
        return sum(delta.parameters for delta in self.deltas.values())


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """A PEFT folder, opened and bounded but not yet understood.

    ``config``: adapter_config.json; ``tensors``: by name as saved; ``modules``: tensors grouped by module path,
    prefix stripped; ``shapes``: of the base's weights where the caller knows them.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]]
    digest: str
    shapes: Shapes | None = None


class Family(Protocol):
    """Reads one kind of adapter; stateless. Its name is written in files.

    ``slots``: kinds of slots that its deltas fill (``hartley``, ``lowrank``, … of `graph.lowering`); none: merged only.
    """

    name: str
    peft_type: str
    slots: tuple[str, ...]

    def read(self, files: AdapterFiles) -> Adapter:
        """Deltas of a PEFT folder of this family."""

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """The family's own fields of adapter_config.json, to write ``adapter`` as a PEFT folder.

        ``module_shapes: None`` leaves the shapes out, where the tensors tell them.
        """

    def tensors(self, module: str, delta: Any) -> dict[str, NDArray[Any]]:
        """Tensors of one delta by the name PEFT gives them, for a PEFT folder."""


def check_shape(where: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """``shape`` as (out, in) when it is one.

    Raises:
        AdapterFileError: not two sides of 1…`MAX_SIDE`.
    """
    if len(shape) == 2:
        out, inn = shape
        if type(out) is type(inn) is int and 0 < out <= MAX_SIDE and 0 < inn <= MAX_SIDE:  # a bool is no side
            return out, inn
    raise AdapterFileError(
        f"{where}: shape {list(shape)} is not two sides of 1 to {MAX_SIDE}.", hint="The file is damaged or forged."
    )


def is_finite_number(value: object) -> TypeGuard[float]:
    """True for an int or float (no bool) that a float64 holds; JSON may bring NaN and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_spectra(where: str, deltas: Mapping[str, SpectralDelta]) -> None:
    """`check_spectrum` of every module at once; ``where``: the file.

    Raises:
        AdapterFileError: with the first offending module and place.
    """
    stacks, _ = stacked(deltas)
    if not all(_sound(stack) for stack in stacks):
        for module, d in deltas.items():  # which one, and what of it
            check_spectrum(f"{where}: {module}", d.rows, d.cols, d.values, d.shape)


def check_spectrum(
    where: str, rows: NDArray[Any], cols: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]
) -> None:
    """Refuse a spectrum that is not n finite values at n distinct places inside ``shape``.

    Raises:
        AdapterFileError: with the first offending place.
    """
    hint = "The file is damaged or was made for a weight of another shape."
    if not (rows.shape == cols.shape == values.shape and rows.ndim == 1):
        raise AdapterFileError(
            f"{where}: {values.shape} values, {rows.shape} rows and {cols.shape} cols are not one length.", hint=hint
        )
    if rows.size > shape[0] * shape[1]:
        raise AdapterFileError(f"{where}: {rows.size} coefficients in a weight of {shape[0]}×{shape[1]}.", hint=hint)
    for side, places, size in (("row", rows, shape[0]), ("column", cols, shape[1])):
        bad = np.flatnonzero((places < 0) | (places >= size)) if places.size else places
        if bad.size:
            raise AdapterFileError(
                f"{where}: coefficient {bad[0]} has {side} {int(places[bad[0]])}, outside 0…{size - 1}.", hint=hint
            )
    flat = np.sort(rows.astype(np.int64) * shape[1] + cols.astype(np.int64))
    twice = np.flatnonzero(flat[1:] == flat[:-1])
    if twice.size:
        u, v = divmod(int(flat[twice[0]]), shape[1])
        raise AdapterFileError(f"{where}: place ({u}, {v}) occurs twice.", hint=hint)
    check_finite(where, values)


def _sound(stack: Stack[str]) -> bool:
    """False when `check_spectrum` might not pass every spectrum of ``stack``; never True when it would not."""
    (out, inn), rows, cols = stack.shape, stack.rows, stack.cols
    if not (rows.shape == cols.shape == stack.values.shape and rows.ndim == 2 and rows.shape[1] <= out * inn):
        return False
    if not rows.size:
        return True
    negative = rows.dtype.kind != "u" and min(rows.min(), cols.min()) < 0
    if negative or rows.max() >= out or cols.max() >= inn:
        return False
    # beyond 2³² numbers this wraps: equal places stay equal, and of a false alarm the definition disposes
    flat = rows.astype(np.uint32)
    flat *= np.uint32(inn)
    flat += cols.astype(np.uint32)
    if not (flat[:, 1:] > flat[:, :-1]).all():  # ascending, as FORMAT.md wants them, they are distinct
        flat.sort(axis=-1)
        if (flat[:, 1:] == flat[:, :-1]).any():
            return False
    return finite(stack.values)


def finite(values: NDArray[Any]) -> bool:
    """Whether all of ``values`` are finite in float32, whatever float they are."""
    if values.dtype == np.float16:  # six times faster by the bits: an exponent of all ones is NaN or infinite
        return bool((values.view(np.uint16) & np.uint16(0x7C00)).max(initial=0) < 0x7C00)
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32, copy=False)).all())


def check_finite(where: str, values: NDArray[Any]) -> None:
    """Refuse NaN and infinities.

    Raises:
        AdapterFileError: with how many there are.
    """
    if not finite(values):
        with np.errstate(over="ignore"):
            bad = int(values.size - np.count_nonzero(np.isfinite(values.astype(np.float32, copy=False))))
        raise AdapterFileError(
            f"{where}: {bad} of {values.size} values are NaN or infinite.",
            hint="The training diverged or the file is damaged; no base would answer sensibly with it.",
        )

"""ΔW added to a stored tensor in float32, rounded once, and how much of it survived.

A stored weight W, an update ΔW and the written weight W′ = round(W + ΔW) in the output's dtype:

    survival = 1 − ‖(W′ − W) − ΔW‖ / ‖ΔW‖        (Frobenius, at least 0)

1 means the merged model is the base plus the adapter; bf16 has 8 significant bits, so an update of a thousandth of
its weight is rounded away entirely. ``unchanged`` is the share of entries with ΔW ≠ 0 where W′ = W. Differences are
taken in float32, where W′ − W is exact for neighbours (Sterbenz); float64 weights are summed in float64. Entries
that are not finite in the base stay as they are and are counted apart.

A tensor is made in blocks of rows that fit the cache, in the order they are written, by as many threads as are given;
what a block comes out as does not depend on how many those are. Where ΔW can be had in rows (`jobs.row_changes`) it
never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.orientation import site_weight
from ssh_deploy.checkpoints.safefile import DTYPES, SafeFile
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.jobs.row_changes import RowChange, row_change
from ssh_deploy.transforms.cpu import block_rows, pool

_ROWS = 1 << 20  # elements of a tensor cast at once


@dataclass(slots=True)
class Tally:
    """Sums over one tensor while it is written.

    ``largest`` max|ΔW|, ``delta`` ‖ΔW‖², ``error`` ‖(W′−W)−ΔW‖², entries ``moved``, put back to the ``same``, and
    ``infinite`` (or no number) in the base.
    """

    adapters: tuple[str, ...]
    largest: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    moved: int = 0
    same: int = 0
    infinite: int = 0

    def add(self, other: Tally) -> None:
        """Take the sums of a part in."""
        self.largest = max(self.largest, other.largest)
        for name in ("delta", "error", "moved", "same", "infinite"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def sums(self) -> dict[str, float]:
        """As JSON, ``adapters`` aside."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "adapters"}

    @property
    def survival(self) -> float:
        """See the module's docstring."""
        return survival([self])

    @property
    def unchanged(self) -> float:
        """Share of entries that ΔW moves and rounding put back."""
        return self.same / self.moved if self.moved else 0.0


def merging(
    checkpoint: Checkpoint,
    module: str,
    terms: Sequence[tuple[Delta, float]],
    code: str,
    *,
    device: str,
    tally: Tally,
    threads: int = 1,
) -> Callable[[], Iterator[NDArray[Any]]]:
    """Function that makes the parts of round(W + Σ wᵢ ΔWᵢ), in stored orientation, rounded once.

    Args:
        checkpoint: holds W.
        module: path of W in it.
        terms: each ΔWᵢ [out, in] with its weight wᵢ.
        code: safetensors dtype of the result.
        device: where ΔW is computed, ``cpu`` or ``cuda``.
        tally: filled while the parts are made.
        threads: how many of them make parts at once.

    Raises:
        AdapterMismatchError: the sum overflows the dtype.
        CheckpointError: the base became shorter.
    """

    def parts() -> Iterator[NDArray[Any]]:
        name = f"{module}.weight"
        shard = checkpoint.shards[checkpoint.places[name]]
        shape, stored = checkpoint.shape(name), np.dtype(DTYPES[checkpoint.dtype(name)])
        work = np.dtype(np.float64 if stored == np.float64 else np.float32)
        step = block_rows((shape[0], shape[1]))
        change = row_change(checkpoint, module, terms, rows=step, dtype=work, device=device)
        with shard.path.open("rb") as file:
            begin = shard.start + shard.table[name]["data_offsets"][0]

            def part(start: int, scratch: Any) -> tuple[NDArray[Any], Tally]:
                count = min(step, shape[0] - start)
                raw = np.empty((count, shape[1]), stored)
                shard.read_into(file.fileno(), raw, begin + start * shape[1] * stored.itemsize)
                own = Tally(())
                return _rounded(module, raw.astype(work), change.block(start, count, scratch), code, own), own

            for made, own in _in_turn(part, range(0, shape[0], step), change, threads):
                tally.add(own)
                yield made
        shard.forget()

    return parts


def _in_turn(
    part: Callable[[int, Any], tuple[NDArray[Any], Tally]], starts: range, change: RowChange, threads: int
) -> Iterator[tuple[NDArray[Any], Tally]]:
    """``part`` of every start, in their order, ``threads`` at a time."""
    scratch = [change.scratch() for _ in range(threads)]
    if threads == 1:
        for start in starts:
            yield part(start, scratch[0])
        return
    for first in range(0, len(starts), threads):
        yield from pool(threads).map(part, starts[first : first + threads], scratch)


def merging_bias(
    checkpoint: Checkpoint, module: str, terms: Sequence[tuple[RelativeDelta, float]], code: str, *, tally: Tally
) -> Callable[[], Iterator[NDArray[Any]]]:
    """As `merging`, for the bias of ``module``: round(b + Σ wᵢ Δbᵢ)."""

    def parts() -> Iterator[NDArray[Any]]:
        bias = checkpoint.read(f"{module}.bias")
        before = bias.astype(np.float64 if bias.dtype == np.float64 else np.float32)
        found = [(scale, d.bias_change_beside(before, lambda: site_weight(checkpoint, module))) for d, scale in terms]
        changes = [scale * change for scale, change in found if change is not None]
        total = np.sum(changes, axis=0).astype(before.dtype)
        yield _rounded(f"{module}.bias", before[:, None], total[:, None], code, tally)[:, 0]

    return parts


def _rounded(name: str, before: NDArray[Any], change: NDArray[Any], code: str, tally: Tally) -> NDArray[Any]:
    """``round(before + change)`` as ``code``, counted in ``tally``."""
    with np.errstate(over="ignore", invalid="ignore"):
        after: NDArray[Any] = (before + change).astype(DTYPES[code])
        back = after.astype(before.dtype)
        error = (back - before) - change
        lost = _squares(error)
    if not np.isfinite(lost):  # of numbers that were not finite before, of an overflow, or only of their squares
        odd = ~np.isfinite(before)
        if not (np.isfinite(back) | odd).all():
            raise _overflow(name, before + change, code)
        tally.infinite += int(np.count_nonzero(odd))
        change, error = np.where(odd, 0, change), np.where(odd, 0, error)
        lost = float(np.square(error, dtype=np.float64).sum())
    moved = change != 0
    tally.largest = max(tally.largest, float(np.abs(change).max(initial=0.0)))
    tally.delta += _squares(change)
    tally.error += lost
    tally.moved += int(np.count_nonzero(moved))
    tally.same += int(np.count_nonzero(moved & (back == before)))
    return after


def _squares(rows: NDArray[Any]) -> float:
    """Sum of squares: along rows in the dtype they have, which is quick, and of those sums in float64."""
    total = float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
    if np.isinf(total) and np.isfinite(rows).all():
        total = float(np.square(rows, dtype=np.float64).sum())
    return total


def casting(
    name: str, tensor: NDArray[Any], code: str, *, shard: SafeFile | None = None
) -> Callable[[], Iterator[NDArray[Any]]]:
    """Function that makes the parts of ``tensor`` in another dtype.

    Args:
        name: of the tensor, for messages.
        tensor: any float dtype.
        code: safetensors dtype of the result.
        shard: where ``tensor`` is mapped from; its pages are given back afterwards.

    Raises:
        AdapterMismatchError: a value overflows the dtype.
    """

    def parts() -> Iterator[NDArray[Any]]:
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, _ROWS):
            piece = flat[start : start + _ROWS]
            yield _cast(name, piece, code)
        if shard is not None:
            shard.forget()

    return parts


def _cast(name: str, exact: NDArray[Any], code: str) -> NDArray[Any]:
    """``exact`` as ``code``; where a finite number overflows, an error."""
    with np.errstate(over="ignore"):
        after: NDArray[Any] = exact.astype(DTYPES[code])
    if not _finite(after) and _finite(exact):
        raise _overflow(name, exact, code)
    return after


def _overflow(name: str, exact: NDArray[Any], code: str) -> AdapterMismatchError:
    largest = np.abs(exact[np.isfinite(exact)]).max(initial=0.0)
    return AdapterMismatchError(
        f"{name}: values up to {largest:.3g} go beyond the range of {np.dtype(DTYPES[code]).name}.",
        hint="Merge with --dtype float32 or bfloat16.",
    )


def _finite(values: NDArray[Any]) -> bool:
    return bool(np.isfinite(values if values.dtype.kind == "f" else values.astype(np.float32)).all())


def survival(tallies: Iterable[Tally]) -> float:
    """Survival over all tensors together; 1 where nothing was to be added."""
    every = list(tallies)
    delta, error = sum(t.delta for t in every), sum(t.error for t in every)
    return max(0.0, 1.0 - (error / delta) ** 0.5) if delta else 1.0

"""ΔW added to a stored tensor in float32, rounded once, and how much of it survived.

A stored weight W, an update ΔW and the written weight W′ = round(W + ΔW) in the output's dtype:

    survival = 1 − ‖(W′ − W) − ΔW‖ / ‖ΔW‖        (Frobenius, at least 0)

1 means the merged model is the base plus the adapter; bf16 has 8 significant bits, so an update of a thousandth of
its weight is rounded away entirely. ``unchanged`` is the share of entries with ΔW ≠ 0 where W′ = W. Differences are
taken in float32, where W′ − W is exact for neighbours (Sterbenz); float64 weights are summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.orientation import is_transposed, site_weight
from ssh_deploy.checkpoints.safefile import DTYPES, SafeFile
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterMismatchError

_ROWS = 1 << 20  # elements of W handled at once: scratch of a few times 4 MB beside ΔW


@dataclass(slots=True)
class Tally:
    """Sums over one tensor while it is written: max|ΔW|, ‖ΔW‖², ‖(W′−W)−ΔW‖², entries moved, and put back."""

    adapters: tuple[str, ...]
    largest: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    moved: int = 0
    same: int = 0

    @property
    def survival(self) -> float:
        """See the module's docstring."""
        return survival([self])

    @property
    def unchanged(self) -> float:
        """Share of entries that ΔW moves and rounding put back."""
        return self.same / self.moved if self.moved else 0.0


def merging(
    checkpoint: Checkpoint, module: str, terms: Sequence[tuple[Delta, float]], code: str, *, device: str, tally: Tally
) -> Callable[[], Iterator[NDArray[Any]]]:
    """Function that makes the parts of round(W + Σ wᵢ ΔWᵢ), in stored orientation, rounded once.

    Args:
        checkpoint: holds W.
        module: path of W in it.
        terms: each ΔWᵢ [out, in] with its weight wᵢ.
        code: safetensors dtype of the result.
        device: where ΔW is computed, ``cpu`` or ``cuda``.
        tally: filled while the parts are made.

    Raises:
        AdapterMismatchError: the sum overflows the dtype.
    """

    def parts() -> Iterator[NDArray[Any]]:
        weight = checkpoint.read(f"{module}.weight")
        work = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
        transposed = is_transposed(checkpoint, module)
        base = weight.T if transposed else weight
        total = np.zeros(terms[0][0].shape, dtype=work)
        for delta, scale in terms:
            _accumulate(total, delta, scale, device, base)
        change = total.T if transposed else total
        step = max(1, _ROWS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            yield _rounded(module, weight[rows].astype(work), change[rows], code, tally)
        checkpoint.shards[checkpoint.places[f"{module}.weight"]].forget()

    return parts


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


def _accumulate(total: NDArray[Any], delta: Delta, scale: float, device: str, base: NDArray[Any]) -> None:
    """``total += scale·ΔW``; ``base`` is W [out, in] as stored, for changes that depend on it."""
    if device == "cpu" and isinstance(delta, SpectralDelta):
        from ssh_deploy.transforms.cpu import add_synthesis

        add_synthesis(total, delta.axis, delta.separable(), gain=delta.gain * scale)
        return
    import torch

    if isinstance(delta, RelativeDelta):
        own = torch.from_numpy(base.astype(total.dtype)).to(device)
        total += scale * delta.change(own).cpu().numpy()
    elif device == "cpu":
        delta.add_to(torch.from_numpy(total), scale=scale)  # in place for float32 and float64
    else:
        total += scale * delta.dense(device=device, dtype=getattr(torch, total.dtype.name)).cpu().numpy()


def _rounded(name: str, before: NDArray[Any], change: NDArray[Any], code: str, tally: Tally) -> NDArray[Any]:
    """``round(before + change)`` as ``code``, counted in ``tally``."""
    after = _cast(name, before + change, code, before)
    back = after.astype(before.dtype)
    error = (back - before) - change
    moved = change != 0
    tally.largest = max(tally.largest, float(np.abs(change).max(initial=0.0)))
    tally.delta += float(np.einsum("ij,ij->", change, change, dtype=np.float64))
    tally.error += float(np.einsum("ij,ij->", error, error, dtype=np.float64))
    tally.moved += int(np.count_nonzero(moved))
    tally.same += int(np.count_nonzero(moved & (back == before)))
    return after


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
            yield _cast(name, piece, code, piece)
        if shard is not None:
            shard.forget()

    return parts


def _cast(name: str, exact: NDArray[Any], code: str, before: NDArray[Any]) -> NDArray[Any]:
    """``exact`` as ``code``; where it overflows and the base's own numbers ``before`` are finite, an error."""
    with np.errstate(over="ignore"):
        after: NDArray[Any] = exact.astype(DTYPES[code])
    if not _finite(after) and _finite(before):
        raise AdapterMismatchError(
            f"{name}: values up to {np.abs(exact).max():.3g} go beyond the range of {np.dtype(DTYPES[code]).name}.",
            hint="Merge with --dtype float32 or bfloat16.",
        )
    return after


def _finite(values: NDArray[Any]) -> bool:
    return bool(np.isfinite(values if values.dtype.kind == "f" else values.astype(np.float32)).all())


def survival(tallies: Iterable[Tally]) -> float:
    """Survival over all tensors together; 1 where nothing was to be added."""
    every = list(tallies)
    delta, error = sum(t.delta for t in every), sum(t.error for t in every)
    return max(0.0, 1.0 - (error / delta) ** 0.5) if delta else 1.0

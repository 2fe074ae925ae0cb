"""From spectra to kernel launches: what `kernels` takes, the tile it works on, the arrays it reads.

Everything a batch needs is on the device before the first weight is touched, so that running out of memory leaves the
weights as they were.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ssh_deploy.transforms.base import Axis, Separable

if TYPE_CHECKING:
    import torch

_MOST_PER_ROW = 64  # coefficients a row; with more, an FFT of the rows is cheaper than their sums
_ROWS_BN = 1024  # columns of one program of `transform_rows`


@dataclass(frozen=True, slots=True, eq=False)
class Addend:
    """``gain · factor · F_Mᵀ S F_N``, to be added to one weight; see `Separable`."""

    axis: Axis
    spectrum: Separable
    gain: float

    @property
    def turned(self) -> Addend:
        """The same for the transposed weight: ``ΔWᵀ = F_Nᵀ Sᵀ F_M``."""
        s = self.spectrum
        return Addend(self.axis, Separable(s.cols, s.rows, s.values, s.factor), self.gain)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of `add_columns` owns: ``p·b`` rows and ``bn`` columns; ``k`` rows of the stage at a time."""

    p: int
    b: int
    bn: int
    k: int = 16
    warps: int = 8


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Spectra of matrices of one shape, on a device, ready to be added; ``matrices`` of [m, n] in ``dtype``."""

    shape: tuple[int, int]
    matrices: int
    dtype: torch.dtype
    tile: Tile
    axis: Axis
    stage: torch.Tensor
    starts: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    pair_starts: torch.Tensor
    most: torch.Tensor
    local: torch.Tensor
    scales: torch.Tensor


def refusal(weight: torch.Tensor, addend: Addend) -> str | None:
    """Why the kernels do not take ``weight`` [M, N] (rows contiguous, or columns: then its transpose), or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if str(weight.dtype) not in ("torch.bfloat16", "torch.float16", "torch.float32"):
        return f"{weight.dtype} is not bfloat16, float16 or float32"
    if addend.axis.name not in ("hartley", "cosine"):
        return f"there is no kernel of the {addend.axis.name} transform"
    if 1 not in weight.stride():
        return "neither rows nor columns are contiguous"
    turned = oriented(weight)
    own = (addend if turned is weight else addend.turned).spectrum
    if turned.shape[0] % 16:
        return f"16 does not divide a side of {turned.shape[0]}"
    dense = own.rows.size > _MOST_PER_ROW * np.unique(own.rows).size
    return f"rows hold more than {_MOST_PER_ROW} coefficients on average" if dense else None


def oriented(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` itself where its rows are contiguous, else its transpose."""
    return weight if weight.stride(1) == 1 else weight.T


def tile_of(m: int, dtype: torch.dtype) -> Tile:
    """The tile for matrices of ``m`` rows, a multiple of 16: p near √m, as many columns as the registers hold.

    For bfloat16, 8 warps of 128 registers (as compiled for sm_90, no spills): two programs share a multiprocessor,
    and one loads while the other multiplies.
    """
    import torch

    fitting = [p for p in (64, 32, 16) if m % p == 0]
    p = next((p for p in fitting if m // p >= 16), fitting[-1])
    q = m // p
    b = 16 if p < 64 and (q % 16 == 0 or q >= 80) else 8
    return Tile(p, b, (16384 if dtype == torch.bfloat16 else 8192) // (p * b))


def prepare(
    shape: tuple[int, int],
    addends: Sequence[Addend],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Batch:
    """Put ``addends``, none of them empty and all of one axis, on ``device`` for weights [m, n] of ``dtype``.

    Raises:
        torch.OutOfMemoryError: they do not fit there.
    """
    import torch

    (m, n), axis, count = shape, addends[0].axis, len(addends)
    tile = tile or tile_of(m, dtype)
    (p, q), order = axis.output_order(m, p=tile.p)
    spectra = [a.spectrum for a in addends]
    matrix = np.repeat(np.arange(count), [s.rows.size for s in spectra])
    key = matrix * m + order[np.concatenate([s.rows for s in spectra])]
    by = np.argsort(key, kind="stable")
    key, matrix = key[by], matrix[by]
    cols = np.concatenate([s.cols for s in spectra])[by]
    values = np.concatenate([s.values.astype(np.float64) * s.factor for s in spectra])[by] * _amplitudes(axis, cols)
    first = np.flatnonzero(np.diff(key, prepend=-1))
    held = key[first]
    # each matrix is scaled so that no row of its stage exceeds 1 (√2 with cas): float16 neither over- nor underflows
    reach = np.add.reduceat(np.abs(values), first)
    largest = np.maximum.reduceat(reach, np.searchsorted(held, np.arange(count) * m))
    largest[largest == 0] = 1.0
    pairs = np.searchsorted(held, np.arange(count * p // 2 + 1) * 2 * q)
    pair_starts = pairs[np.arange(count)[:, None] * (p // 2) + np.arange(p // 2 + 1)]
    scales = np.array([a.gain for a in addends]) * largest / np.sqrt(float(m) * n)

    def there(array: Any, kind: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=kind)).to(device)

    work = torch.float16 if dtype == torch.bfloat16 else torch.float32
    return Batch(
        shape=shape,
        matrices=count,
        dtype=dtype,
        tile=tile,
        axis=axis,
        stage=torch.empty((held.size, n), dtype=work, device=device),
        starts=there(np.append(first, key.size), np.int32),
        cols=there(cols, np.int32),
        values=there(values / largest[matrix], np.float32),
        pair_starts=there(pair_starts, np.int32),
        most=there(np.diff(pair_starts, axis=1).max(axis=1), np.int32),
        local=there(held % (2 * q), np.int32),
        scales=there(scales, np.float32),
    )


def add_batch(batch: Batch, weights: Sequence[torch.Tensor], *, addresses: torch.Tensor | None = None) -> None:
    """Add ``batch`` to ``weights``, one for each of its matrices, in place; rows contiguous and equally far apart.

    ``addresses``: theirs, int64 on the device, where they are there already (a CUDA graph records no upload).
    """
    import torch
    import triton

    from ssh_deploy.transforms.cuda import kernels

    (m, n), tile, device = batch.shape, batch.tile, weights[0].device
    second, first, rows = _factors(batch.axis, m, tile.p, str(device), batch.stage.dtype)
    table, period, step, offset = _table(batch.axis, n, str(device))
    places = [w.data_ptr() for w in weights]
    q, exact = m // tile.p, batch.stage.dtype == torch.float32
    stride = weights[0].stride(0)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels.transform_rows[batch.stage.shape[0], triton.cdiv(n, _ROWS_BN)](
            batch.stage,
            batch.starts,
            batch.cols,
            batch.values,
            table,
            n,
            period,
            STEP=step,
            OFFSET=offset,
            WIDE=n * (step * n + offset) >= 2**31,
            BN=_ROWS_BN,
        )
        kernels.add_columns[triton.cdiv(q, tile.b) * triton.cdiv(n, tile.bn), batch.matrices](
            torch.tensor(places, dtype=torch.int64).to(device) if addresses is None else addresses,
            batch.stage,
            batch.pair_starts,
            batch.most,
            batch.local,
            batch.scales,
            second,
            first,
            rows,
            n,
            q,
            stride,
            P=tile.p,
            B=tile.b,
            BN=tile.bn,
            K=tile.k,
            DTYPE=kernels.DTYPES[str(batch.dtype)],
            ALIGNED=all(place % 16 == 0 for place in places),
            # tensor cores truncate as they add: too coarse for float32, unseen in float16 (Ootomo, Yokota 2022)
            PRECISION="tf32x3" if exact and batch.dtype == torch.float16 else "ieee",
            num_warps=tile.warps,
            num_stages=2,
        )


def _amplitudes(axis: Axis, cols: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
    """``√N·c_v`` of the row transform where that is not in its table."""
    return np.where(cols == 0, 1.0, np.sqrt(2.0)) if axis.name == "cosine" else 1.0


@lru_cache(maxsize=64)
def _factors(
    axis: Axis, m: int, p: int, device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``second·√m`` [p/2, 2q, 2q] and ``first`` [p, p] of `TwoStage` in ``dtype``, and int32 [m] rows of W."""
    import torch

    stages = axis.two_stage(m, p=p)
    rows = np.arange(m) if stages.permutation is None else stages.permutation
    second, first = (torch.from_numpy(a).to(device, dtype) for a in (stages.second * np.sqrt(m), stages.first))
    return second, first, torch.from_numpy(rows.astype(np.int32)).to(device)


@lru_cache(maxsize=64)
def _table(axis: Axis, n: int, device: str) -> tuple[torch.Tensor, int, int, int]:
    """float32 table of one period, the period, STEP and OFFSET of `transform_rows`."""
    import torch

    period, step, offset = (4 * n, 2, 1) if axis.name == "cosine" else (n, 1, 0)
    angle = 2 * np.pi * np.arange(period) / period
    table = np.cos(angle) if axis.name == "cosine" else np.cos(angle) + np.sin(angle)
    return torch.from_numpy(table.astype(np.float32)).to(device), period, step, offset

"""The sparse inverse transform on any torch device: fused kernels on CUDA, torch.fft elsewhere, the CPU at last.

Three ways, tried in this order, and each step down is logged:

* the kernels of `transforms.cuda`, matrices of one shape together;
* plain torch, one matrix at a time: other devices, odd sizes, float64;
* out of device memory: half as many matrices at once; one that does not fit alone is summed on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ssh_deploy.transforms.base import Axis, Separable
from ssh_deploy.transforms.cpu import add_synthesis
from ssh_deploy.transforms.cuda.fused import Addend, add_batch, oriented, prepare, refusal

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_AT_ONCE = 32 << 20  # bytes of stage in one launch: it stays in the L2 cache between the two kernels


def synthesis_torch(
    shape: tuple[int, int],
    axis: Axis,
    spectrum: Separable,
    *,
    gain: float,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``gain · factor · F_Mᵀ S F_N`` [M, N] on ``device``, in ``dtype`` (None: float32); here where it has no room.

    Computed in float64 for ``dtype=float64`` and in float32 otherwise, rounded once; halfs where `fused` is that.
    """
    import torch

    try:
        out = torch.zeros(shape, dtype=dtype or torch.float32, device=device)
    except torch.OutOfMemoryError:
        log.warning("%s is out of memory: a %d×%d matrix is made on the CPU.", device, *shape)
        out = torch.zeros(shape, dtype=dtype or torch.float32)
    add_on_device([out], [Addend(axis, spectrum, gain)])
    return out


def add_on_device(weights: Sequence[torch.Tensor], addends: Sequence[Addend]) -> None:
    """``weight += addend`` for each pair, in place, rounded once to the weight's dtype.

    Args:
        weights: [M, N], distinct, any float dtype and device; the fewer shapes the fewer launches.
        addends: one each.
    """
    import torch

    groups: dict[tuple[object, ...], list[tuple[torch.Tensor, Addend]]] = {}
    with torch.no_grad():
        for weight, addend in zip(weights, addends, strict=True):
            if addend.spectrum.rows.size == 0:
                continue
            reason = refusal(weight, addend) if _fuses(weight) else f"the device is {weight.device.type}"
            if reason is not None:
                _tell(reason)
                _add_plain(weight, addend)
                continue
            turned = oriented(weight)
            own = addend if turned is weight else addend.turned
            key = (turned.shape, turned.stride(), turned.dtype, turned.device, id(addend.axis))
            groups.setdefault(key, []).append((turned, own))
        for group in groups.values():
            rows = [min(a.spectrum.rows.size, w.shape[0]) for w, a in group]
            at_once = max(1, _AT_ONCE // (4 * max(rows) * group[0][0].shape[1]))
            for start in range(0, len(group), at_once):
                _add_fused(group[start : start + at_once])


def _fuses(weight: torch.Tensor) -> bool:
    return weight.device.type == "cuda"


@lru_cache(maxsize=64)  # once per reason: a model has hundreds of weights
def _tell(reason: str) -> None:
    log.warning("ΔW by plain torch (FFT), not by the fused kernels: %s.", reason)


def _add_fused(pairs: Sequence[tuple[torch.Tensor, Addend]]) -> None:
    """Add all ``pairs``, of one kind, at once or, where the device has no room, in ever smaller parts."""
    import torch

    weight = pairs[0][0]
    try:
        batch = prepare(
            (weight.shape[0], weight.shape[1]), [a for _, a in pairs], device=weight.device, dtype=weight.dtype
        )
    except torch.OutOfMemoryError:
        if len(pairs) == 1:
            _add_on_cpu(*pairs[0])
            return
        half = len(pairs) // 2
        log.warning("%s is out of memory: %d matrices at once instead of %d.", weight.device, half, len(pairs))
        _add_fused(pairs[:half])
        _add_fused(pairs[half:])
        return
    add_batch(batch, [w for w, _ in pairs])


def _add_plain(weight: torch.Tensor, addend: Addend) -> None:
    import torch

    try:
        delta = _plain((weight.shape[0], weight.shape[1]), addend, device=weight.device, dtype=_work(weight))
        total = delta.add_(weight)
    except torch.OutOfMemoryError:
        _add_on_cpu(weight, addend)
        return
    weight.copy_(total)


def _add_on_cpu(weight: torch.Tensor, addend: Addend) -> None:
    log.warning("%s is out of memory: a %d×%d matrix is summed on the CPU.", weight.device, *weight.shape)
    total = weight.detach().cpu().to(_work(weight), copy=True)
    add_synthesis(total.numpy(), addend.axis, addend.spectrum, gain=addend.gain)
    weight.copy_(total.to(weight.dtype))


def _work(weight: torch.Tensor) -> torch.dtype:
    import torch

    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _plain(shape: tuple[int, int], addend: Addend, *, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """ΔW [M, N] by torch.fft in ``dtype``; only the rows that hold coefficients go through the pass along N."""
    import torch

    axis, spectrum = addend.axis, addend.spectrum
    held, inverse = np.unique(spectrum.rows, return_inverse=True)
    stage = torch.zeros((held.size, shape[1]), dtype=dtype, device=device)
    values = torch.from_numpy(spectrum.values.astype(np.float64) * (addend.gain * spectrum.factor)).to(device, dtype)
    place = (torch.from_numpy(inverse).to(device), torch.from_numpy(spectrum.cols).to(device))
    stage.index_put_(place, values, accumulate=True)
    full = torch.zeros(shape, dtype=dtype, device=device)
    full[torch.from_numpy(held).to(device)] = axis.inverse(stage, 1)
    return axis.inverse(full, 0)

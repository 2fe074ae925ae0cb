"""The sparse inverse transform on any torch device, through torch.fft: the plain path beside the fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ssh_deploy.transforms.base import Axis, Separable

if TYPE_CHECKING:
    import torch


def synthesis_torch(
    shape: tuple[int, int],
    axis: Axis,
    spectrum: Separable,
    *,
    gain: float,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``gain · factor · F_Mᵀ S F_N`` [M, N] on ``device``.

    Computed in float64 for ``dtype=float64`` and in float32 otherwise, then cast once to ``dtype`` (default
    float32). Only the rows that hold coefficients go through the pass along N.
    """
    import torch

    work = torch.float64 if dtype == torch.float64 else torch.float32
    held, inverse = np.unique(spectrum.rows, return_inverse=True)
    stage = torch.zeros((held.size, shape[1]), dtype=work, device=device)
    values = torch.from_numpy(spectrum.values.astype(np.float64) * (gain * spectrum.factor)).to(device, work)
    place = (torch.from_numpy(inverse).to(device), torch.from_numpy(spectrum.cols).to(device))
    stage.index_put_(place, values, accumulate=True)
    full = torch.zeros(shape, dtype=work, device=device)
    full[torch.from_numpy(held).to(device)] = axis.inverse(stage, 1)
    result = axis.inverse(full, 0)
    return result if dtype is None else result.to(dtype)

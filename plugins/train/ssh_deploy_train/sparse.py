"""``x ΔWᵀ`` and its gradients from the sparse spectrum: two fast transforms and n multiply-adds, no dense ΔW.

With ``F`` the orthonormal 1-D transform of each side and S the sparse spectrum (math.md, "a sidecar never forms
ΔW"), for tokens as columns::

    Z = F_N Xᵀ          [N, T]
    Y = F_Mᵀ (gain·S Z) [M, T]
    ∂s_k = gain · ⟨H[u_k], Z[v_k]⟩   with H = F_M Gᵀ, G the gradient of Y
    ∂X   = (F_Nᵀ (gain·Sᵀ H))ᵀ

Saved for the backward pass: x and the n values, nothing else; Z is computed again, which costs one fast transform
and saves [N, T] numbers per layer. Tokens stand in the last axis, so that S·Z is a weighted sum of contiguous rows
(torch's embedding_bag does exactly that, in one pass and without a temporary).

Measured on 2 cores, f32, n = 750 (ms for one transform of T rows of length N; what was not taken in brackets):
N=384, T=1024: ducc0 0.3 (GEMM with F 1.6, two-stage 1.2, torch.fft 0.3–12); N=4096, T=512: 1.8 (89, 29, 8).
The product with S: 0.03 and 0.08 (CSR 0.08 and 0.24, index_add 0.25 and 0.30). Hence ducc0 on the CPU; other
devices go through torch.fft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from ssh_deploy.transforms import get_transform
from ssh_deploy.transforms.base import Axis

_CHUNK = 64  # coefficients whose rows are gathered at a time for ∂s: 64·T numbers instead of n·T


@dataclass(frozen=True, slots=True)
class Compressed:
    """S, or its transpose, in compressed rows: for output row r, entries ``offsets[r]:offsets[r+1]`` hold `columns`.

    ``entries`` numbers the coefficient each entry comes from; int64 tensors on one device.
    """

    offsets: Tensor
    columns: Tensor
    entries: Tensor

    def times(self, values: Tensor, dense: Tensor) -> Tensor:
        """S (or Sᵀ) @ ``dense`` [·, T] with the coefficients ``values`` [k]."""
        if not dense.shape[1]:  # embedding_bag refuses rows without numbers
            return dense.new_zeros(self.offsets.numel(), 0)
        return embedding_bag(self.columns, dense, self.offsets, mode="sum", per_sample_weights=values[self.entries])


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about one adapter on one weight that does not change while it trains.

    Attributes:
        shape: (M, N) = (out, in).
        axis: the 1-D transform of both sides.
        gain: factor on the orthonormal synthesis.
        source: int64 [k], which trained coefficient each separable one repeats (a joint one makes four).
        sign: [k] ±factor of each, float64.
        rows, cols: int64 [k], its place.
        by_rows, by_cols: S and Sᵀ compressed.
    """

    shape: tuple[int, int]
    axis: Axis
    gain: float
    source: Tensor
    sign: Tensor
    rows: Tensor
    cols: Tensor
    by_rows: Compressed
    by_cols: Compressed

    @staticmethod
    def make(indices: Tensor, *, shape: tuple[int, int], transform: str, gain: float) -> Plan:
        """Expand ``indices`` [2, n] into separable coefficients of ``transform`` and compress them both ways."""
        device = indices.device
        rows, cols = indices.cpu().numpy().astype(np.int64)
        # Expansions change signs only, so the numbers 1…n come out as which coefficient it was, and its sign.
        numbered = get_transform(transform).separable(rows, cols, np.arange(1, rows.size + 1), shape)
        return Plan(
            shape=shape,
            axis=get_transform(transform).axis,
            gain=gain,
            source=torch.from_numpy(np.abs(numbered.values) - 1).to(device),
            sign=torch.from_numpy(np.sign(numbered.values) * numbered.factor).to(device),
            rows=torch.from_numpy(numbered.rows).to(device),
            cols=torch.from_numpy(numbered.cols).to(device),
            by_rows=_compress(numbered.rows, numbered.cols, shape[0], device),
            by_cols=_compress(numbered.cols, numbered.rows, shape[1], device),
        )

    def weights(self, spectrum: Tensor, dtype: torch.dtype) -> Tensor:
        """Separable coefficients [k] of the trained ones [n], gain included."""
        return spectrum.to(dtype)[self.source] * (self.sign * self.gain).to(dtype)


def apply_spectrum(x: Tensor, spectrum: Tensor, plan: Plan) -> Tensor:
    """``x ΔWᵀ`` for x [..., in] → [..., out]; differentiable in x and in ``spectrum`` [n].

    Computed and returned in float32, or float64 when either is; autocast does not reach inside.
    """
    result: Tensor = _Apply.apply(x, spectrum, plan)  # type: ignore[no-untyped-call]
    return result


class _Apply(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spectrum: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(x, spectrum)
        work = _work(x, spectrum)
        z = _analyse(plan.axis, x, work)
        y = plan.by_rows.times(plan.weights(spectrum, work), z)
        return _synthesise(plan.axis, y).reshape(*x.shape[:-1], plan.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, spectrum = ctx.saved_tensors
        plan: Plan = ctx.plan
        work = _work(x, spectrum)
        h = _analyse(plan.axis, gradient, work)
        for_x = for_s = None
        if ctx.needs_input_grad[1]:
            each = _row_products(h, plan.rows, _analyse(plan.axis, x, work), plan.cols)
            each = each * (plan.sign * plan.gain).to(work)
            for_s = torch.zeros_like(spectrum, dtype=work).index_add_(0, plan.source, each).to(spectrum.dtype)
        if ctx.needs_input_grad[0]:
            back = plan.by_cols.times(plan.weights(spectrum, work), h)
            for_x = _synthesise(plan.axis, back).reshape(x.shape).to(x.dtype)
        return for_x, for_s, None


def _work(x: Tensor, spectrum: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, spectrum.dtype) else torch.float32


def _analyse(axis: Axis, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``F xᵀ``: x [..., n] to [n, T], contiguous."""
    columns = torch.empty(x.shape[-1], x.numel() // x.shape[-1], dtype=dtype, device=x.device)
    columns.copy_(x.reshape(-1, x.shape[-1]).t())
    if columns.device.type != "cpu":
        return axis.forward(columns, 0)
    if columns.numel():
        axis.forward_cpu(columns.numpy(), 0, threads=_threads(columns))
    return columns


def _synthesise(axis: Axis, columns: Tensor) -> Tensor:
    """``(Fᵀ columns)ᵀ``: [n, T], which is overwritten, to [T, n], contiguous."""
    if columns.device.type != "cpu":
        return axis.inverse(columns, 0).t().contiguous()
    if columns.numel():
        axis.inverse_cpu(columns.numpy(), 0, threads=_threads(columns))
    return columns.t().contiguous()


def _threads(columns: Tensor) -> int:
    """One below a million numbers: a second gains nothing there, and waits for torch's own when cores are busy."""
    return torch.get_num_threads() if columns.numel() > 1 << 20 else 1


def _row_products(a: Tensor, rows: Tensor, b: Tensor, cols: Tensor) -> Tensor:
    """``⟨a[rows[k]], b[cols[k]]⟩`` [k], a few rows gathered at a time."""
    step = _CHUNK if a.device.type == "cpu" else rows.numel()
    parts = [
        torch.linalg.vecdot(a[rows[i : i + step]], b[cols[i : i + step]]) for i in range(0, rows.numel(), max(step, 1))
    ]
    return torch.cat(parts)


def _compress(rows: Any, cols: Any, height: int, device: torch.device) -> Compressed:
    order = np.argsort(rows, kind="stable")
    offsets = np.searchsorted(rows[order], np.arange(height))
    return Compressed(*(torch.from_numpy(a.astype(np.int64)).to(device) for a in (offsets, cols[order], order)))

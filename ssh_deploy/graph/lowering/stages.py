"""One-dimensional transforms as MatMuls of the graph: F x on the way in, Fᵀ of prefix rows on the way out.

In two forms. Batch rows *apart*: a row's activation is turned round once and stays on its own, so that what one core
makes of it lies in that core's cache when the next step wants it. Batch rows *together*, for graphs that read single
tokens, where eight products of one column each take four times as long as one of eight columns: the first factor
forward is small products on x as it lies, and what the second needs the other way round onnxruntime fuses into its
MatMul (FusedMatMul).

The way out reads prefix sums P instead of t, ``t[u] = P[u+1] − P[u]`` (`lowering.spectral` says why): the difference is
linear, so it lives inside the first factor, which then takes 2q+1 prefix rows for 2q outputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.transforms.base import TwoStage

FLOAT = np.float32
#: Widest transform of single tokens that is one product: its matrix is read in the time of the nodes that it saves.
_DENSE = 256


def forward(emitter: Emitter, x: ir.Value, stages: TwoStage, *, one: bool) -> ir.Value:
    """F x for x [batch, tokens, n], or [batch, n] where ``one``, as [batch, .., .., tokens] in the stages' order."""
    blocks, width, _ = stages.second.shape
    if not one:
        if x.shape is None or len(x.shape) != 3:
            x = emitter.op("Reshape", x, emitter.ints(0, 0, stages.n))
        x = emitter.op("Transpose", x, perm=[0, 2, 1])
    if stages.permutation is not None:
        x = emitter.op("Gather", x, emitter.ints(*stages.permutation.tolist()), axis=1)
    if stages.p > 1:
        x = emitter.op("Reshape", x, emitter.ints(0, stages.p, -1))
        x = emitter.op("MatMul", emitter.const(stages.first, FLOAT), x)
    x = emitter.op("Reshape", x, emitter.ints(0, blocks, width, -1))
    return emitter.op("MatMul", emitter.const(stages.second, FLOAT), x)


def forward_together(emitter: Emitter, x: ir.Value, stages: TwoStage) -> ir.Value:
    """F x for x [batch, tokens, n], as [.., .., batch·tokens] in the stages' order."""
    if stages.permutation is not None:
        x = emitter.op("Reshape", x, emitter.ints(-1, stages.n))
        x = emitter.op("Gather", x, emitter.ints(*stages.permutation.tolist()), axis=1)
    if stages.p > 1:
        x = emitter.op("Reshape", x, emitter.ints(-1, stages.p, stages.q))
        x = emitter.op("MatMul", emitter.const(stages.first, FLOAT), x)
    blocks, width, _ = stages.second.shape
    x = emitter.op("Reshape", x, emitter.ints(-1, blocks, width))
    # a MatMul that reads its second factor turned round: onnxruntime fuses the two
    return emitter.op("MatMul", emitter.const(stages.second, FLOAT), emitter.op("Transpose", x, perm=[1, 2, 0]))


def backward(emitter: Emitter, prefix: ir.Value, stages: TwoStage) -> ir.Value:
    """Fᵀ t for prefix rows [batch, 1, blocks, width+1, tokens] of t, as [batch, tokens, n]."""
    y = emitter.op("MatMul", emitter.const(differenced(stages), FLOAT), prefix)
    if stages.p > 1:
        y = emitter.op("Reshape", y, emitter.ints(0, stages.p, -1))
        y = emitter.op("MatMul", emitter.const(stages.first.T, FLOAT), y)
    y = emitter.op("Reshape", y, emitter.ints(0, stages.n, -1))
    y = emitter.op("Transpose", y, perm=[0, 2, 1])
    if stages.permutation is not None:
        y = emitter.op("Gather", y, emitter.ints(*np.argsort(stages.permutation).tolist()), axis=2)
    return y


def backward_together(emitter: Emitter, prefix: ir.Value, stages: TwoStage) -> ir.Value:
    """Fᵀ t for prefix rows [1, blocks, width+1, batch, tokens] of t, as [batch·tokens, n] or with n taken apart."""
    blocks, width, _ = stages.second.shape
    if stages.n <= _DENSE:
        rows = emitter.op("Reshape", prefix, emitter.ints(blocks * (width + 1), -1))
        return emitter.op("MatMul", emitter.op("Transpose", rows, perm=[1, 0]), emitter.const(composed(stages), FLOAT))
    second, first = backward_factors(stages)
    y = emitter.op("Reshape", prefix, emitter.ints(blocks, width + 1, -1))
    y = emitter.op("MatMul", emitter.const(second, FLOAT), y)
    y = emitter.op("Transpose", emitter.op("Reshape", y, emitter.ints(stages.p, stages.q, -1)), perm=[2, 0, 1])
    if stages.p > 1:
        y = emitter.op("MatMul", emitter.const(first, FLOAT), y)
    if stages.permutation is not None:
        y = emitter.op("Reshape", y, emitter.ints(-1, stages.n))
        y = emitter.op("Gather", y, emitter.ints(*np.argsort(stages.permutation).tolist()), axis=1)
    return y


def composed(stages: TwoStage) -> NDArray[np.float64]:
    """What `backward_together` makes of prefix rows, as one matrix f64 [blocks·(width+1), n]: y = Pᵀ times it."""
    second, first = backward_factors(stages)
    blocks, width, _ = stages.second.shape
    dense = second[0].T
    if stages.p > 1:
        apart = np.zeros((2, blocks, stages.q, blocks, width + 1))  # each block reads its own window
        for block in range(blocks):
            apart[:, block, :, block] = second[:, block]
        apart = apart.reshape(stages.p, stages.q, -1)
        dense = np.einsum("op,pqr->roq", first, apart).reshape(-1, stages.n)
    return dense if stages.permutation is None else dense[:, np.argsort(stages.permutation)]


def differenced(stages: TwoStage) -> NDArray[np.float64]:
    """``second[i]ᵀ D`` f64 [blocks, width, width+1]: takes prefix rows P instead of t, ``t[u] = P[u+1] − P[u]``."""
    turned = stages.second.transpose(0, 2, 1)
    edge = np.zeros((*turned.shape[:2], 1))
    return np.concatenate([edge, turned], axis=2) - np.concatenate([turned, edge], axis=2)


def backward_factors(stages: TwoStage) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factors of Fᵀ as `backward_together` takes them.

    Returns:
        `differenced` as [2, blocks, q, width+1], the halves of each block's outputs apart ([1, n, n+1] with ``p = 1``);
        and ``firstᵀ`` [p, p], its columns in the order (half, block).
    """
    second = differenced(stages)
    if stages.p == 1:
        return second, stages.first
    blocks, width, _ = stages.second.shape
    second = second.reshape(blocks, 2, stages.q, width + 1).transpose(1, 0, 2, 3)
    return second, stages.first.T.reshape(-1, blocks, 2).transpose(0, 2, 1).reshape(stages.p, stages.p)

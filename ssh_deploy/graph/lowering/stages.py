"""One-dimensional transforms as MatMuls of the graph: F x on the way in, Fᵀ of prefix rows on the way out.

In two forms. For many tokens they are the last axis between the first product and the last, and a row's activation
stays on its own, so that what one core makes of it lies in that core's cache when the next step wants it. For one token
a batch row nothing is turned: each product is a vector's, and what counts is how few nodes there are, every one a cold
start between two layers that stream their weights through the caches. So the sites of a group share the way back, too.

The way out reads prefix sums P instead of t, ``t[u] = P[u+1] − P[u]`` (`lowering.spectral` says why): the difference is
linear, so it lives inside the first factor, which then takes 2q+1 prefix rows for 2q outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.transforms.base import TwoStage

FLOAT = np.float32


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


def forward_token(emitter: Emitter, x: ir.Value, stages: TwoStage) -> ir.Value:
    """F x for x of one token a batch row, any shape with batch·n numbers, as [batch, n] in the stages' order."""
    if stages.permutation is not None:
        x = emitter.op("Reshape", x, emitter.ints(-1, stages.n))
        x = emitter.op("Gather", x, emitter.ints(*stages.permutation.tolist()), axis=1)
    if stages.p > 1:
        x = emitter.op("Reshape", x, emitter.ints(-1, stages.p, stages.q))
        x = emitter.op("MatMul", emitter.const(stages.first, FLOAT), x)
    blocks, width, _ = stages.second.shape
    x = emitter.op("Reshape", x, emitter.ints(-1, blocks, 1, width))
    x = emitter.op("MatMul", x, emitter.const(stages.second.transpose(0, 2, 1), FLOAT))
    return emitter.op("Flatten", x, axis=1)


def backward(emitter: Emitter, prefix: ir.Value, stages: TwoStage) -> ir.Value:
    """Fᵀ t for prefix rows [batch, 1, blocks, width+1, tokens] of t, as [batch, tokens, n].

    The tokens come first again inside the first product, which onnxruntime makes one operator with the Transpose that
    it reads; the Transpose between the products then moves whole blocks. To turn the result round, number by number
    and in a single thread as Transpose runs, took as long as a product, and three times that where the cores share no
    cache.
    """
    y = emitter.op("Transpose", prefix, perm=[0, 1, 2, 4, 3])
    y = emitter.op("MatMul", y, emitter.const(differenced(stages), FLOAT))
    if stages.p > 1:
        y = emitter.op("Transpose", y, perm=[0, 1, 3, 2, 4])
        y = emitter.op("Reshape", y, emitter.ints(0, -1, stages.p, stages.q))
        y = emitter.op("MatMul", emitter.const(stages.first.T, FLOAT), y)
    y = emitter.op("Reshape", y, emitter.ints(0, -1, stages.n))
    if stages.permutation is not None:
        y = emitter.op("Gather", y, emitter.ints(*np.argsort(stages.permutation).tolist()), axis=2)
    return y


def backward_token(
    emitter: Emitter, prefix: ir.Value, sites: Sequence[TwoStage], sides: Sequence[tuple[int, ...]]
) -> Sequence[ir.Value]:
    """Fᵀ t of several sites, for prefix rows [batch, Σ blocks·(width+1)] of one token a batch row.

    Args:
        emitter: to append to.
        prefix: rows of t, those of one site after those of another.
        sites: stages of each, all of one width: they share every product.
        sides: of each, after the batch's, of the result; their product is n.
    """
    lengths, (_, width, _) = [stages.p for stages in sites], sites[0].second.shape
    if len(set(lengths)) == 1:  # of one n: the sites stand side by side like batch rows, and read the factors once
        second, first = differenced(sites[0]), sites[0].first.T
        shape, side = [len(sites), len(second)], [len(sites), lengths[0]]
    else:
        second = np.concatenate([differenced(stages) for stages in sites])
        first = _diagonal([stages.first.T for stages in sites])
        shape, side = [len(second)], [sum(lengths)]
    y = emitter.op("Reshape", prefix, emitter.ints(-1, *shape, 1, width + 1))
    y = emitter.op("MatMul", y, emitter.const(second, FLOAT))
    if lengths[0] > 1:
        y = emitter.op("Reshape", y, emitter.ints(-1, *side, sites[0].q))
        y = emitter.op("MatMul", emitter.const(first, FLOAT), y)
    natural, start = list[int](), 0
    for stages in sites:
        own = np.arange(stages.n) if stages.permutation is None else np.argsort(stages.permutation)
        natural += (start + own).tolist()
        start += stages.n
    if natural != list(range(start)):
        y = emitter.op("Gather", emitter.op("Flatten", y, axis=1), emitter.ints(*natural), axis=1)
    if len({own[1:] for own in sides}) == 1:
        counts = [own[0] for own in sides]
        y = emitter.op("Reshape", y, emitter.ints(-1, sum(counts), *sides[0][1:]))
        return emitter.ops("Split", y, emitter.ints(*counts), outputs=len(sites), axis=1) if len(sites) > 1 else [y]
    y = emitter.op("Flatten", y, axis=1)
    parts = emitter.ops("Split", y, emitter.ints(*[stages.n for stages in sites]), outputs=len(sites), axis=1)
    return [emitter.op("Reshape", part, emitter.ints(-1, *own)) for part, own in zip(parts, sides, strict=True)]


def differenced(stages: TwoStage) -> NDArray[np.float64]:
    """``Dᵀ second[i]`` f64 [blocks, width+1, width]: takes prefix rows P instead of t, ``t[u] = P[u+1] − P[u]``."""
    edge = np.zeros((len(stages.second), 1, stages.second.shape[2]))
    return np.concatenate([edge, stages.second], axis=1) - np.concatenate([stages.second, edge], axis=1)


def _diagonal(blocks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The block-diagonal matrix of square ``blocks``."""
    ends = np.cumsum([len(block) for block in blocks])
    found = np.zeros((ends[-1], ends[-1]))
    for block, end in zip(blocks, ends.tolist(), strict=True):
        found[end - len(block) : end, end - len(block) : end] = block
    return found

"""The two Triton kernels: rows that hold coefficients along N, then columns in two tensor-core products, added to W.

``W += scale · F_Mᵀ S F_N`` for a batch of matrices of one shape [M, N], M = p·q (`transforms.base.TwoStage`).

`transform_rows` writes the rows of ``S F_N`` that hold coefficients, and no others, into a stage [rows, N]. A row holds
few coefficients (n = 1000 in 4096 rows: one or two), so each is summed from a table of one period of the kernel: n·N
multiply-adds, where an FFT of every row would cost 12 times that and zero rows besides.

`add_columns` is the pass along M. One program owns a tile of W: p·B rows (B consecutive ``j2`` of every ``j1``) and BN
columns. Rows of the stage stand sorted by the pair of first-stage outputs they feed, so the first product

    Y[pair, (side, j2), y] = Σ_k second[pair, k, (side, j2)] · stage[k, y]

runs over the rows that exist (28 of 128 at n = 1000, M = 4096) instead of over all frequencies; it is one batched
`tl.dot` over the p/2 pairs. The second, ``first`` [p, p] transposed times Y as [p, B·BN], gives the tile of ΔW, which
is scaled, added to W and rounded once. ΔW is never in memory; W is read once and written once.

*What it costs* beside W's own bytes, from the L2 cache: ``2·rows·q·N·(2/BN + 1/B)`` numbers of the factors and of the
stage; hence tiles as large as the registers hold. ``tl.dot`` accumulates in float32. Operands are float16 for bf16
weights (three more bits than the result keeps; the stage is scaled so that nothing overflows), float32 else.
*Not covered:* M that no p of 16, 32 or 64 divides, and more than 64 coefficients a row (`fused` says so).
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Triton's name of torch's.
DTYPES = {"torch.bfloat16": tl.bfloat16, "torch.float16": tl.float16, "torch.float32": tl.float32}


@triton.jit
def transform_rows(
    stage,
    starts,
    cols,
    values,
    table,
    n,
    period,
    STEP: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    BN: tl.constexpr,
):
    """``stage[row, y] = Σ_c values[c] · table[cols[c]·(STEP·y + OFFSET) mod period]`` over c of the row.

    Grid (rows, N/BN). ``WIDE``: the product needs 64 bits.
    """
    row = tl.program_id(0)
    y = tl.program_id(1) * BN + tl.arange(0, BN)
    turn = STEP * y + OFFSET
    if WIDE:
        turn = turn.to(tl.int64)
    total = tl.zeros((BN,), dtype=tl.float32)
    for c in range(tl.load(starts + row), tl.load(starts + row + 1)):
        place = (tl.load(cols + c) * turn) % period
        total += tl.load(values + c) * tl.load(table + place)
    tl.store(stage + row.to(tl.int64) * n + y, total.to(stage.dtype.element_ty), mask=y < n)


@triton.jit
def add_columns(
    weights,
    stage,
    pair_starts,
    most,
    local,
    scales,
    second,
    first,
    rows,
    n,
    q,
    row_stride,
    P: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of every W of the batch; grid (tiles along j2 · tiles along N, matrices).

    Args:
        weights: int64 [matrices], addresses of W [p·q, n], rows ``row_stride`` elements apart.
        stage: [rows of all matrices, n] float16 or float32.
        pair_starts: int32 [matrices, P/2 + 1], where each pair's rows of the stage begin.
        most: int32 [matrices], most rows that one pair has.
        local: int32, place of each row of the stage within its pair's 2q.
        scales: float32 [matrices].
        second: [P/2, 2q, 2q], first: [P, P], both as in `TwoStage`, in the stage's dtype.
        rows: int32 [p·q], row of W of each output.
        n, q, row_stride: sizes.
        P, B, BN, K: the tile; K rows of the stage at a time.
        DTYPE: of W.
        ALIGNED: every address is a multiple of 16 bytes.
        PRECISION: of `tl.dot` on float32 operands.
    """
    blocks = tl.cdiv(q, B)
    tile = tl.program_id(0)
    matrix = tl.program_id(1)
    j2 = (tile % blocks) * B
    y = (tile // blocks) * BN + tl.arange(0, BN)
    pair = tl.arange(0, P // 2)
    k = tl.arange(0, K)
    both = tl.arange(0, 2 * B)
    j = j2 + both % B
    column = (both // B) * q + j
    begin = tl.load(pair_starts + matrix * (P // 2 + 1) + pair)
    end = tl.load(pair_starts + matrix * (P // 2 + 1) + pair + 1)
    turned = tl.zeros((P // 2, 2 * B, BN), dtype=tl.float32)
    for k0 in range(0, tl.load(most + matrix), K):
        row = begin[:, None] + (k0 + k)[None, :]
        held = row < end[:, None]
        place = pair[:, None] * (2 * q) + tl.load(local + row, mask=held, other=0)
        factor = tl.load(
            second + place[:, :, None] * (2 * q) + column[None, None, :],
            mask=held[:, :, None] & (j < q)[None, None, :],
            other=0.0,
        )
        values = tl.load(
            stage + row.to(tl.int64)[:, :, None] * n + y[None, None, :],
            mask=held[:, :, None] & (y < n)[None, None, :],
            other=0.0,
        )
        turned = tl.dot(tl.permute(factor, (0, 2, 1)), values, turned, input_precision=PRECISION)
    paired = tl.reshape(turned.to(stage.dtype.element_ty), (P, B * BN))
    i = tl.arange(0, P)
    change = tl.dot(tl.trans(tl.load(first + i[:, None] * P + i[None, :])), paired, input_precision=PRECISION)
    # the tile as W has it: rows j1·q + j2, of which `rows` says the place
    inner = tl.arange(0, P * B)
    own = j2 + inner % B
    out = tl.load(rows + (inner // B) * q + own, mask=own < q, other=0).to(tl.int64) * row_stride
    weight = tl.load(weights + matrix).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    places = weight + out[:, None] + y[None, :]
    mask = (own < q)[:, None] & (y < n)[None, :]
    change = tl.reshape(change, (P * B, BN)) * tl.load(scales + matrix)
    change += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, change.to(DTYPE), mask=mask)

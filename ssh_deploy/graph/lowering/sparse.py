"""Values at places of ΔW inside the graph: y[u] += Σ s·x[v] for every row of the batch with its own places.

**Layout.** As that of spectra, without transforms: `adapter_sparse_values`, `_rows`, `_cols` [adapters, sites, n] and
`_scales` [adapters, sites]; rows and columns are those of ΔW [out, in], *rows descending*, zeros at the end.

**What runs.** Per site Gather of x's columns (tokens last), Mul with the values, and the sum over equal rows as a
difference of prefix sums (`lowering.spectral` says why, and what rounding it costs): with P = CumSum(w) and c[u] = how
many values stand in rows ≥ u, ``y[u] = P[c[u]] − P[c[u+1]]``.

**Never a wrong answer.** Values out of order, places outside their weight and ids beyond the bank end in an error of
Gather.

**Many values.** That is three passes over [n, tokens] a site. A SHiRA of r = 32 has a twelfth of all numbers of W, and
then ΔW itself is quicker: where n exceeds out·in/32, values are added into zeros [batch, out, in] (ScatterElements,
which is serial and right) and x meets that in a product. At 768×768, n = 49,152, two cores: 8 ms a site for 20 at 8×64,
1 for 4 at 1×128, 0.4 for 0.9 at 1×16; they break even between n = 12,000 and 20,000. It holds 4·batch·out·in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ssh_deploy.graph.emitter import Emitter
from ssh_deploy.graph.sites import Call

INT32, INT64 = np.int32, np.int64
_DENSE = 32  # part of a weight's numbers from which on ΔW is formed


@dataclass(frozen=True, slots=True, eq=False)
class SparseBank:
    """Optional inputs of the sparse kind, and what the graph makes of them for a batch.

    ``gate`` is true when an adapter is there, and ``batch`` int64 [batch, 1] then numbers the batch's rows (else
    [0, 1]). ``count`` is n, int64 [1]; ``whole``: rows and columns int32 and scaled values f32 [batch, sites, n]. By
    row of the table: ``values`` f32 [batch, n+1, 1], one zero at the end; ``cols`` int32 [batch, n+1], places in the
    flattened [batch·in] rows of x; ``starts`` int32 [batch, out+1], places c[u] in the flattened [batch·(n+1)] rows of
    P.
    """

    gate: ir.Value
    batch: ir.Value
    count: ir.Value
    whole: tuple[ir.Value, ir.Value, ir.Value]
    values: Sequence[ir.Value]
    cols: Sequence[ir.Value]
    starts: Sequence[ir.Value]
    kind: str = "sparse"


def prepare(
    emitter: Emitter, inputs: Mapping[str, ir.Value], ids: ir.Value, *, shapes: Sequence[tuple[int, int]]
) -> SparseBank:
    """Emit what all sites share, once a run: the batch's rows of the bank, places in flat arrays, row starts.

    Args:
        emitter: of the outermost graph.
        inputs: ``values``, ``scales``, ``rows``, ``cols``.
        ids: checked rows of the bank, int64 [batch].
        shapes: (out, in) of every site.
    """
    gate = emitter.op("Greater", emitter.op("Size", inputs["rows"]), emitter.const(0, INT64))
    # outside the branch: ids beyond the bank are an error even when nothing is fed
    scales = emitter.op("Gather", inputs["scales"], ids, axis=0)
    then, other = emitter.branch("rows"), emitter.branch("none")
    size, sites = then.op("Shape", ids), len(shapes)
    count = then.op("Range", then.const(0, INT64), then.op("Squeeze", size), then.const(1, INT64))
    results = [then.op("Unsqueeze", count, then.ints(1))]
    number = then.op("Cast", then.op("Reshape", count, then.ints(-1, 1, 1)), to=ir.DataType.INT32)
    rows = then.op("Cast", then.op("Gather", inputs["rows"], ids, axis=0), to=ir.DataType.INT32)
    cols = then.op("Cast", then.op("Gather", inputs["cols"], ids, axis=0), to=ir.DataType.INT32)
    number = then.op("Add", number, _checked(then, rows, cols, shapes))
    values = then.op("Cast", then.op("Gather", inputs["values"], ids, axis=0), to=ir.DataType.FLOAT)
    values = then.op("Mul", values, then.op("Unsqueeze", scales, then.ints(2)))
    end = then.ints(0, 0, 0, 0, 0, 1)
    inner = then.const(np.array([shape[1] for shape in shapes]).reshape(1, sites, 1), INT32)
    whole = [rows, cols, values]
    cols = then.op("Add", then.op("Pad", cols, end), then.op("Mul", number, inner))
    length = then.op("Shape", rows, start=2, end=3)
    starts = _starts(then, rows, size, highest=max(shape[0] for shape in shapes), sites=sites)
    block = then.op("Add", then.op("Cast", length, to=ir.DataType.INT32), then.const([1], INT32))
    starts = then.op("Add", starts, then.op("Mul", number, block))
    values = then.op("Unsqueeze", then.op("Pad", values, end), then.ints(3))
    results += [*_by_site(then, values, sites), *_by_site(then, cols, sites)]
    for site, own in enumerate(_by_site(then, starts, sites)):
        out = then.ints(shapes[site][0] + 1)
        results.append(then.op("Slice", own, then.ints(0), out, then.ints(1)))
    results += whole
    kinds = [INT64, *[np.float32] * sites, *[INT32] * (2 * sites), INT32, INT32, np.float32]
    none = [other.op("Identity", other.const(np.zeros((0, 1)), INT64))]
    none += [other.op("Identity", other.const(np.zeros((0,)), kind)) for kind in kinds[1:]]
    for value, kind in zip([*results, *none], [*kinds, *kinds], strict=True):
        value.dtype = ir.DataType.from_numpy(np.dtype(kind))
    batch, *made, all_rows, all_cols, all_values = emitter.when(gate, then, results, other, none)
    of_values, of_cols, of_starts = (made[i * sites : (i + 1) * sites] for i in range(3))
    count = emitter.op("Shape", inputs["rows"], start=2, end=3)
    return SparseBank(gate, batch, count, (all_rows, all_cols, all_values), of_values, of_cols, of_starts)


def contribution(emitter: Emitter, bank: SparseBank, calls: Sequence[Call], table: Mapping[str, int]) -> list[ir.Value]:
    """Emit, into the branch that runs when an adapter is there, what it adds to each of ``calls``.

    Args:
        emitter: of the branch.
        bank: as `prepare` made it.
        calls: of one group: they read the same activation.
        table: row of each module in the ``sites`` dimension.

    Returns:
        f32 of the shape of each call's result.
    """
    activation, tokens, n_in = calls[0].activation, calls[0].tokens, calls[0].inputs
    x = activation if tokens else emitter.op("Unsqueeze", activation, emitter.ints(1))
    if activation.shape is not None and len(activation.shape) == 4:
        x = emitter.op("Reshape", activation, emitter.ints(0, 0, n_in))
    answers: dict[str, ir.Value] = {}
    for call in calls:
        if call.module in answers:
            continue
        few, many = emitter.branch(f"{call.module}/few"), emitter.branch(f"{call.module}/many")
        site, n_out = table[call.module], call.outputs
        terms = _summed(few, bank, x, site, n_out), _multiplied(many, bank, x, site, (n_out, n_in))
        dense = emitter.op("Greater", bank.count, emitter.ints(n_out * n_in // _DENSE))
        (y,) = emitter.when(dense, many, [terms[1]], few, [terms[0]], dtype=ir.DataType.FLOAT)
        answers[call.module] = y if tokens else emitter.op("Squeeze", y, emitter.ints(1))
    return [answers[call.module] for call in calls]


def _summed(emitter: Emitter, bank: SparseBank, x: ir.Value, site: int, n_out: int) -> ir.Value:
    """``x ΔWᵀ`` [batch, tokens, out] value by value."""
    columns = emitter.op("Flatten", emitter.op("Transpose", x, perm=[0, 2, 1]), axis=2)  # [batch·in, tokens]
    terms = emitter.op("Mul", emitter.op("Gather", columns, bank.cols[site], axis=0), bank.values[site])
    sums = emitter.op("Flatten", emitter.op("CumSum", terms, emitter.const(1, INT64), exclusive=1), axis=2)
    prefix = emitter.op("Gather", sums, bank.starts[site], axis=0)  # [batch, out+1, tokens]
    steps = (emitter.ints(0), emitter.ints(n_out)), (emitter.ints(1), emitter.ints(n_out + 1))
    here, after = (emitter.op("Slice", prefix, *ends, emitter.ints(1)) for ends in steps)
    return emitter.op("Transpose", emitter.op("Sub", here, after), perm=[0, 2, 1])


def _multiplied(emitter: Emitter, bank: SparseBank, x: ir.Value, site: int, shape: tuple[int, int]) -> ir.Value:
    """``x ΔWᵀ`` [batch, tokens, out] with ΔW formed; zeros that pad add nothing to its first number."""
    own = (emitter.op("Gather", array, emitter.ints(site), axis=1) for array in bank.whole)
    rows, cols, values = (emitter.op("Flatten", array, axis=1) for array in own)
    flat = emitter.op("Add", emitter.op("Mul", rows, emitter.const([shape[1]], INT32)), cols)
    size = emitter.op("Concat", emitter.op("Shape", x, start=0, end=1), emitter.ints(shape[0] * shape[1]), axis=0)
    zeros = emitter.op("ConstantOfShape", size, value=ir.tensor(np.zeros(1, np.float32)))
    dense = emitter.op("ScatterElements", zeros, flat, values, axis=1, reduction="add")
    dense = emitter.op("Reshape", dense, emitter.ints(-1, *shape))
    return emitter.op("MatMul", x, emitter.op("Transpose", dense, perm=[0, 2, 1]))


def _starts(emitter: Emitter, rows: ir.Value, size: ir.Value, *, highest: int, sites: int) -> ir.Value:
    """c[u], int32 [batch, sites, highest+1]: how many values of a site stand in rows ≥ u."""
    shape = emitter.op("Concat", size, emitter.ints(sites, highest + 1), axis=0)
    zeros = emitter.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, INT32)))
    ones = emitter.op("ConstantOfShape", emitter.op("Shape", rows), value=ir.tensor(np.ones(1, INT32)))
    counts = emitter.op("ScatterElements", zeros, rows, ones, axis=2, reduction="add")
    return emitter.op("CumSum", counts, emitter.const(2, INT64), reverse=1)


def _by_site(emitter: Emitter, array: ir.Value, sites: int) -> Sequence[ir.Value]:
    """``array`` [batch, sites, …] as one [batch, …] a site."""
    parts = [array] if sites == 1 else emitter.ops("Split", array, outputs=sites, axis=1, num_outputs=sites)
    return [emitter.op("Squeeze", part, emitter.ints(1)) for part in parts]


def _checked(emitter: Emitter, rows: ir.Value, cols: ir.Value, shapes: Sequence[tuple[int, int]]) -> ir.Value:
    """An int32 zero [1] that cannot be had when rows ascend or places lie outside their weights."""
    top = [emitter.const(np.array([s[i] - 1 for s in shapes]).reshape(1, -1, 1), INT32) for i in (0, 1)]
    before = emitter.op("Slice", rows, emitter.ints(0), emitter.ints(-1), emitter.ints(2))
    after = emitter.op("Slice", rows, emitter.ints(1), emitter.ints(1 << 40), emitter.ints(2))
    margins = [emitter.op("Sub", before, after), rows, emitter.op("Sub", top[0], rows), cols]
    margins.append(emitter.op("Sub", top[1], cols))
    whole = emitter.op("Concat", *margins, axis=2)
    broken = emitter.op("Less", emitter.op("ReduceMin", whole, keepdims=0), emitter.const(0, INT32))
    place = emitter.op("Reshape", emitter.op("Cast", broken, to=ir.DataType.INT64), emitter.ints(1))
    return emitter.op("Gather", emitter.const([0], INT32), place, axis=0)

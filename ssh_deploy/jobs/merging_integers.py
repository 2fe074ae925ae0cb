"""`merge --dtype int8`: weights that were trained as integers written as integers, and everything else as it is.

Only adapters whose change ends in integers (`deltas.integral`) can do that; any other would have to be rounded to 8
bits, which is a quantiser's business and not a merge's. The layout is FORMAT.md's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.orientation import is_transposed, site_weight
from ssh_deploy.checkpoints.writer import Entry, Made
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.integral import IntegralDelta
from ssh_deploy.errors import AdapterMismatchError
from ssh_deploy.jobs.rounding import Tally

SCALE = "_scale"


def integral_entries(
    checkpoint: Checkpoint, target: str, stored: str, terms: Sequence[tuple[str, Delta, float]], *, tally: Tally
) -> dict[str, Made]:
    """The weight of one module as int8 codes, and beside it the scale of each of its rows.

    Args:
        checkpoint: holds the base's weight.
        target: module that is written.
        stored: where the base holds it.
        terms: name, change and factor of every adapter that changes it.
        tally: filled while the codes are made; what "survived" is of W′ − W.

    Raises:
        AdapterMismatchError: several adapters, a factor, or a change that does not end in integers.
    """
    name, delta, weight = terms[0]
    if not isinstance(delta, IntegralDelta):
        raise AdapterMismatchError(
            f"--dtype int8: {name} changes {stored} by a {delta.kind} delta, which is no integer.",
            hint="Only what was trained on integers (IntLoRA) merges into them; merge into floats and quantise those.",
        )
    if len(terms) > 1 or weight != 1:
        raise AdapterMismatchError(
            f"--dtype int8: {stored} would be changed by {', '.join(f'{n} × {w:g}' for n, _, w in terms)}.",
            hint="Integers are one adapter's own and take no factor; merge into floats.",
        )
    transposed = is_transposed(checkpoint, stored)
    shape, out = checkpoint.shape(f"{stored}.weight"), delta.shape[0]

    def codes() -> Iterator[NDArray[Any]]:
        base = site_weight(checkpoint, stored).astype(np.float64)
        delta.check_base(base)
        found, scale, lost = delta.integers()
        change = found * scale.astype(np.float64)[:, None] - base
        tally.largest, tally.delta = float(np.abs(change).max(initial=0.0)), float(np.square(change).sum())
        tally.error, tally.moved = lost, int(np.count_nonzero(change))
        yield np.ascontiguousarray(found.T if transposed else found)

    def scales() -> Iterator[NDArray[Any]]:
        yield delta.integers()[1]

    return {
        f"{target}.weight": Made("I8", shape, codes),
        f"{target}.weight{SCALE}": Made("F32", (1, out) if transposed else (out, 1), scales),
    }


def quantization(shards: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint with these ``shards``: what compressed-tensors calls int-quantized.

    Transformers would take a method that it does not know for a remark, and codes for weights; this one it reads
    through that package, or refuses without it.
    """
    end = f".weight{SCALE}"
    scaled = sorted(name.removesuffix(end) for entries in shards.values() for name in entries if name.endswith(end))
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": scaled, "weights": weights}},
        "ignore": [],
    }


def scales_renamed(made: Mapping[str, Made], names: Mapping[str, str]) -> dict[str, Made]:
    """``made`` with each scale beside its weight, where ``names`` gives weights other names."""
    return {names.get(k.removesuffix(SCALE), k.removesuffix(SCALE)) + SCALE if k.endswith(SCALE) else k: v
            for k, v in made.items()}  # fmt: skip

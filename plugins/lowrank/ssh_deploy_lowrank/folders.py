"""What PEFT's low-rank folders have in common: matrices checked, ranks and alphas by pattern, settings refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.adapters.base import AdapterFiles, check_finite, is_finite_number
from ssh_deploy.adapters.peft_folder import CONFIG, number
from ssh_deploy.errors import AdapterFileError

#: Patterns come from files: these could make `re` backtrack for years, and PEFT's users write none of them.
_SLOW = re.compile(r"\)[*+{]|\{|\\\d|[*+].*[*+].*[*+].*[*+]", re.DOTALL)
_LONGEST = 500


def floats(where: str, parts: Mapping[str, NDArray[Any]], *, dims: int = 2) -> dict[str, NDArray[Any]]:
    """``parts`` as float16 (kept) or float32 (all other floats).

    Args:
        where: file and module, for messages.
        parts: tensors of one module by name.
        dims: how many dimensions each must have.

    Raises:
        AdapterFileError: no floats, of several dtypes, of other dimensions, empty, NaN or infinite.
    """
    seen = {name: f"{t.dtype} {list(t.shape)}" for name, t in parts.items()}
    if len({t.dtype for t in parts.values()}) > 1:
        raise AdapterFileError(f"{where} mixes dtypes: {seen}.", hint="Save the adapter again in one dtype.")
    found = {}
    for name, tensor in parts.items():
        if tensor.ndim != dims or not tensor.size or tensor.dtype.kind in "iub":
            raise AdapterFileError(
                f"{where}: {name} is {seen[name]}; expected floats of {dims} dimension{'s' * (dims > 1)}.",
                hint="Convolutions are not covered; a sharded save that was not gathered leaves such tensors too.",
            )
        check_finite(f"{where}.{name}", tensor)
        found[name] = tensor if tensor.dtype in (np.float16, np.float32) else tensor.astype(np.float32)
    return found


def all_of(where: str, parts: Mapping[str, NDArray[Any]], names: Sequence[str]) -> None:
    """Refuse a module without all of ``names``.

    Raises:
        AdapterFileError: with what it has.
    """
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterFileError(
            f"{where} has {' and '.join(sorted(parts))}, and no {' or '.join(missing)}.", hint="The file is incomplete."
        )


def alpha_and_rank(files: AdapterFiles, module: str, *, alpha: str) -> tuple[float, int]:
    """α and r of ``module`` as PEFT finds them: by ``alpha_pattern`` and ``rank_pattern``, else the config's own.

    Args:
        files: the folder.
        module: path.
        alpha: the config's field of α.

    Raises:
        AdapterFileError: missing, no numbers, r < 1, or patterns that PEFT could not have written.
    """
    a = _by_pattern(files, "alpha_pattern", module, alpha)
    r = _by_pattern(files, "rank_pattern", module, "r")
    if r < 1 or r != int(r):
        raise AdapterFileError(f"{files.folder}/{CONFIG}: rank {r:g} of {module}.", hint="A rank is 1, 2, 3, …")
    return a, int(r)


def alphas_and_ranks(modules: Mapping[str, tuple[float, int]], *, alpha: str) -> dict[str, Any]:
    """The config's fields that `alpha_and_rank` reads (scaling α/r, r) of every module from.

    Args:
        modules: (scaling, r) by path; what differs from the first goes into patterns.
        alpha: the config's field of α.
    """
    alphas = {module: scaling * r for module, (scaling, r) in modules.items()}
    ranks = {module: r for module, (_, r) in modules.items()}
    first = next(iter(modules))
    return {
        "module_shapes": None,  # the matrices tell them
        "r": ranks[first],
        alpha: alphas[first],
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alphas[first]},
    }


def _by_pattern(files: AdapterFiles, field: str, module: str, default: str) -> float:
    patterns = files.config.get(field) or {}
    where = f"{files.folder}/{CONFIG}: {field}"
    if not isinstance(patterns, dict):
        raise AdapterFileError(f"{where} is {patterns!r:.80}, no object.", hint="Save the adapter again with PEFT.")
    for pattern, value in patterns.items():
        if len(pattern) > _LONGEST or _SLOW.search(pattern):
            raise AdapterFileError(
                f"{where}: {pattern!r:.80} could take for ever to match.",
                hint=f"Write at most {_LONGEST} characters, three of * and +, and none of them after a group.",
            )
        try:
            meant = re.match(rf"(.*\.)?({pattern})$", module)  # PEFT's own rule; the first that matches wins
        except re.error as error:
            raise AdapterFileError(f"{where}: {pattern!r:.80}: {error}.", hint="Write a regular expression.") from error
        if meant:
            if not is_finite_number(value):
                raise AdapterFileError(f"{where}: {pattern!r:.80} is {value!r:.40}.", hint="Write a number.")
            return float(value)
    return number(files, default)


def refuse(files: AdapterFiles, reasons: Mapping[str, str], *, harmless: Sequence[object] = ()) -> None:
    """Refuse a folder whose config sets one of the fields in ``reasons`` ({field: why}) to what asks for something.

    Args:
        files: the folder.
        reasons: why, by field.
        harmless: values that ask for nothing, beside None, False and empty ones.

    Raises:
        AdapterFileError: with the field, its value and why.
    """
    for field, reason in reasons.items():
        value = files.config.get(field)
        if value and value not in harmless:
            raise AdapterFileError(f"{files.folder}/{CONFIG}: {field} is {value!r:.60}: {reason}", hint=_ELSE)


_ELSE = "Merge it with PEFT (merge_and_unload) and deploy the merged model."

"""Which weight of a base an adapter's module path means; success without a match is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ssh_deploy.checkpoints.architecture import base_prefix, meta_model, renaming
from ssh_deploy.errors import AdapterMismatchError, CheckpointError, near_misses


def match_modules(
    modules: Iterable[str], known: Iterable[str], *, prefix: str = "", config: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """For each module path of an adapter, the one known path it means.

    Tried in this order: equal; equal once the base model's prefix (``bert.``) is dropped from or added to either;
    equal after transformers' own renaming of either (``vit.encoder.layer`` → ``vit.layers``).

    Args:
        modules: paths as in the model that was trained.
        known: paths of a checkpoint or of a live model.
        prefix: the base model's prefix without its dot; "" takes it from ``config``, or else infers one leading
            name that makes the two sides agree.
        config: config.json of the base; without it the renaming tables are not asked.

    Raises:
        AdapterMismatchError: no modules at all, some unmatched (with near misses), one known path meant twice, or
            a path that could mean several.
    """
    wanted, there = sorted(set(modules)), sorted(set(known))
    if not wanted:
        raise AdapterMismatchError("The adapter adapts no module.", hint="Is it the right file?")
    prefix = prefix or (base_prefix(config) if config is not None else "") or _infer(wanted, there)
    found: dict[str, str] = {}
    for key in (_same, _without(prefix)):
        _match(wanted, there, key, found)
    if len(found) < len(wanted) and config is not None:
        try:
            rename = renaming(meta_model(config))
        except CheckpointError:
            rename = _same  # an architecture transformers does not know has no renaming table
        bare = _without(prefix)
        _match(wanted, there, lambda path: bare(rename(f"{path}.weight").removesuffix(".weight")), found)
    left = [module for module in wanted if module not in found]
    if left:
        listed = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
        raise AdapterMismatchError(
            f"{len(left)} of {len(wanted)} modules of the adapter match nothing in the base: {listed}.",
            hint=f"{_packed(left[0], there) or near_misses(left[0], there)} An adapter fits only the architecture it "
            "was trained on.",
        )
    twice = [path for path, count in Counter(found.values()).items() if count > 1]
    if twice:
        meant = sorted(module for module, path in found.items() if path == twice[0])
        raise AdapterMismatchError(
            f"Modules {' and '.join(meant)} of the adapter both mean {twice[0]} of the base.",
            hint="Its file mixes two namings of one model; save it again.",
        )
    return found


def canonical(module: str, config: Mapping[str, Any]) -> str:
    """``module`` without its model's prefix: the name that fingerprints and deployments use.

    Args:
        module: path as in a checkpoint or a model.
        config: config.json of the base.
    """
    return _without(base_prefix(config))(module)


def _same(path: str) -> str:
    return path


def _without(prefix: str) -> Callable[[str], str]:
    return (lambda path: path.removeprefix(f"{prefix}.")) if prefix else _same


def _match(wanted: list[str], there: list[str], key: Callable[[str], str], found: dict[str, str]) -> None:
    """Add to ``found`` what agrees under ``key``."""
    left = [module for module in wanted if module not in found]
    if not left:
        return
    index: dict[str, list[str]] = {}
    for path in there:
        index.setdefault(key(path), []).append(path)
    for module in left:
        meant = index.get(key(module), [])
        if len(meant) > 1:
            raise AdapterMismatchError(
                f"{module} of the adapter could mean {' or '.join(meant)} of the base.",
                hint="The base holds one module under two names; save it again with transformers.",
            )
        if meant:
            found[module] = meant[0]


#: Last names of weights that hold several in one, by what they hold; from transformers' models
_PACKED = {
    "query, key and value": (
        {"q_proj", "k_proj", "v_proj", "query", "key", "value"},
        {"c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv"},
    ),
    "gate and up": ({"gate_proj", "up_proj"}, {"gate_up_proj"}),
}


def _packed(module: str, there: list[str]) -> str:
    """Sentence that says which weight of the base holds ``module``'s and others in one; "" where none does."""
    for what, (parts, packs) in _PACKED.items():
        if module.rpartition(".")[2] in parts:
            layer = [part for part in module.split(".") if part.isdigit()]
            for path in there:
                if path.rpartition(".")[2] in packs and [part for part in path.split(".") if part.isdigit()] == layer:
                    return f"The base holds {what} in one weight, {path}."
    return ""


def _infer(wanted: list[str], there: list[str]) -> str:
    """The leading name that, dropped from either side, makes most modules agree; "" when none or several do."""
    candidates = {path.split(".", 1)[0] for path in (*wanted, *there)}
    scores: Counter[str] = Counter()
    for prefix in candidates:
        key = _without(prefix)
        paths = {key(path) for path in there}
        scores[prefix] = sum(key(module) in paths for module in wanted if module not in there)
    best = scores.most_common(2)
    return best[0][0] if best and best[0][1] and (len(best) == 1 or best[0][1] > best[1][1]) else ""

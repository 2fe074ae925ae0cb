"""Which slots an exported graph gets: those of the given adapters, and those reserved for adapters to come."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from ssh_deploy.checkpoints.names import canonical, match_modules
from ssh_deploy.errors import AdapterMismatchError, GraphError, UnknownNameError, near_misses
from ssh_deploy.graph.bank_file import slot_kind
from ssh_deploy.graph.lowering import LOWERINGS
from ssh_deploy.graph.slots import Plan
from ssh_deploy.graph.trace import Loaded
from ssh_deploy.jobs.export_job import Job

_ATTENTION = ("attention", "attn", "self_attn", "self_attention")


def plan_slots(job: Job, loaded: Loaded, sides: Mapping[str, tuple[int, int]]) -> tuple[Plan, dict[str, str]]:
    """The plan and, for modules of the traced model that the checkpoint holds, their canonical names."""
    options, config = job.options, job.checkpoint.config
    prefix = f"{loaded.model.base_model_prefix}."
    bare = job.task == "feature-extraction"
    body = [m for m in sides if (bare or m.startswith(prefix)) and m not in loaded.missing]
    places = match_modules(body, job.checkpoint.modules(), config=config) if body else {}
    names = {module: canonical(path, config) for module, path in places.items()}
    reverse = {name: module for module, name in names.items()}
    wanted: dict[str, None] = {}
    kinds: set[str] = set(options.kinds)
    for name, fitted in job.fitted.items():
        for module, place in fitted.places.items():
            site = canonical(place, config)
            if site not in reverse:
                raise AdapterMismatchError(
                    f"{name}: {module} has no site in the graph of task {job.task}.",
                    hint=f"{near_misses(site, reverse)} Another --task may compute it; --mode merged needs no sites.",
                )
            wanted[reverse[site]] = None
            kinds.add(slot_kind(f"{name}: {module}", fitted.adapter.deltas[module]))
        if fitted.adapter.replaced:
            kinds.add("head")
    if job.fitted and "head" in kinds and not job.headed:
        kinds.discard("head")
        job.notes.append(f"heads of the adapters are left out: task {job.task} has none")
    for selection in options.sites:
        wanted |= dict.fromkeys(_select(selection, reverse))
    if wanted and not kinds - {"head"}:
        kinds.add("hartley")
    if options.kinds and not wanted and set(options.kinds) - {"head"}:
        raise GraphError(
            "--kinds reserves slots but no site is named.", hint="Add --sites attention, linear or a glob."
        )
    heads = _head_modules(job, loaded, sides, prefix)
    ordered = tuple(kind for kind in LOWERINGS if kind in kinds and (kind != "head" or heads))
    missing = frozenset(m for m in loaded.missing if m in sides)
    dtype, required = options.adapter_dtype, options.adapter_inputs == "required"
    return Plan(tuple(m for m in sides if m in wanted), ordered, heads, missing, dtype, required), names


def _select(selection: str, sites: Mapping[str, str]) -> list[str]:
    """Modules of the traced model by ``attention``, ``linear`` or a glob over canonical names."""
    if selection == "linear":
        return list(sites.values())
    if selection == "attention":
        found = [m for name, m in sites.items() if set(name.split(".")) & set(_ATTENTION)]
    else:
        found = [m for name, m in sites.items() if fnmatch.fnmatchcase(name, selection)]
    if not found:
        raise UnknownNameError(
            f"--sites {selection} matches none of {len(sites)} linear layers.", hint=near_misses(selection, sites)
        )
    return found


def _head_modules(job: Job, loaded: Loaded, sides: Mapping[str, tuple[int, int]], prefix: str) -> tuple[str, ...]:
    if not job.headed:
        return ()
    heads = [m for m in sides if not m.startswith(prefix) or m in loaded.missing]
    for name, fitted in job.fitted.items():
        for module in fitted.adapter.replaced:
            if module not in sides:
                raise AdapterMismatchError(
                    f"{name}: it trained {module} whole, which is no linear layer of the graph.",
                    hint=f"{near_misses(module, sides)} Slots hold linear heads only; use --mode merged.",
                )
            if module not in heads:
                heads.append(module)
    return tuple(m for m in sides if m in heads)

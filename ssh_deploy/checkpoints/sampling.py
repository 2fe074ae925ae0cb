"""The fingerprint of a base: samples of the weights that an adapter names."""

from __future__ import annotations

from collections.abc import Iterable

from ssh_deploy.checkpoints.fingerprint import Fingerprint, sample
from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.names import canonical, match_modules
from ssh_deploy.checkpoints.orientation import site_weight


def fingerprint_of(checkpoint: Checkpoint, modules: Iterable[str]) -> Fingerprint:
    """Fingerprint of ``checkpoint`` over ``modules``: [out, in] samples under canonical names of the *file*.

    Names of the file and not of the model, because transformers renames models between releases while saved files
    keep their names. Reads 256 numbers a weight (a Conv1D weight is read whole, to turn it).

    Args:
        checkpoint: the base.
        modules: paths as in an adapter or in the checkpoint.

    Raises:
        AdapterMismatchError: a module that matches nothing, or no matrix.
        CheckpointError: a quantised weight.
    """
    config = checkpoint.config
    places = match_modules(modules, checkpoint.modules(), config=config)
    sites = {}
    for path in places.values():
        sites[canonical(path, config)] = sample(site_weight(checkpoint, path))
        # 256 single pages would do, but the kernel maps whole neighbourhoods: let them go before the next weight
        checkpoint.shards[checkpoint.places[f"{path}.weight"]].forget()
    return Fingerprint(str(config.get("model_type", "")), sites)

"""Does this adapter fit this base: names, shapes and fingerprint, all checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.architecture import tied_modules
from ssh_deploy.checkpoints.fingerprint import Fingerprint
from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.checkpoints.names import canonical, match_modules
from ssh_deploy.checkpoints.orientation import site_shape
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterMismatchError, FingerprintError


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """An adapter that fits a base.

    Attributes:
        adapter: as read.
        places: module path in the checkpoint by the adapter's module path.
        untied: the adapter's modules whose weight the checkpoint stores under the module it is tied to (an output
            embedding without a tensor of its own).
        fingerprint: of the base, over the adapter's modules.
        verified: the adapter stores a fingerprint and the base matches it; False is "base unverified".
    """

    adapter: Adapter
    places: Mapping[str, str]
    untied: frozenset[str]
    fingerprint: Fingerprint
    verified: bool


class BaseShapes(Mapping[str, tuple[int, int]]):
    """(out, in) of a base's weights by an adapter's own module paths; each is matched when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._found: dict[str, tuple[int, int]] = {}

    def __getitem__(self, module: str) -> tuple[int, int]:
        """Shape of ``module``'s weight.

        Raises:
            AdapterMismatchError: it matches nothing; near misses are listed.
        """
        if module not in self._found:
            places, _ = place_modules([module], self._checkpoint)
            self._found[module] = site_shape(self._checkpoint, places[module])
        return self._found[module]

    def __iter__(self) -> Iterator[str]:
        """Paths of the checkpoint."""
        return iter(self._checkpoint.modules())

    def __len__(self) -> int:
        """How many modules the checkpoint holds."""
        return len(self._checkpoint.modules())


def fit(adapter: str | Path | Adapter, checkpoint: Checkpoint, *, require_fingerprint: bool = False) -> Fitted:
    """Read ``adapter`` for ``checkpoint`` and check that every module, shape and sample agrees.

    Args:
        adapter: path of a compact file or PEFT folder, or an adapter already read.
        checkpoint: the base.
        require_fingerprint: refuse an adapter that stores none.

    Raises:
        AdapterFileError: a broken file.
        AdapterMismatchError: a module that matches nothing, or a weight of another shape.
        CheckpointError: a quantised weight.
        FingerprintError: trained on another base, or nothing to tell by though it is required.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, shapes=BaseShapes(checkpoint))
    places, untied = place_modules(adapter.deltas, checkpoint)
    for module, delta in adapter.deltas.items():
        shape = site_shape(checkpoint, places[module])
        if delta.shape != shape:
            raise AdapterMismatchError(
                f"{adapter.source}: {module} is for a weight of {delta.shape[0]}×{delta.shape[1]}; "
                f"{checkpoint.folder} has {shape[0]}×{shape[1]}.",
                hint="This adapter belongs to a base of another size.",
            )
    fingerprint = fingerprint_of(checkpoint, set(places.values()))
    verified = _verify(adapter, checkpoint, places, fingerprint, require=require_fingerprint)
    return Fitted(adapter, places, untied, fingerprint, verified)


def place_modules(modules: Iterable[str], checkpoint: Checkpoint) -> tuple[dict[str, str], frozenset[str]]:
    """Checkpoint path of each module, and which of them the checkpoint stores only under the module they are tied to.

    Raises:
        AdapterMismatchError: some match nothing.
    """
    wanted, known = list(modules), checkpoint.modules()
    try:
        return match_modules(wanted, known, config=checkpoint.config), frozenset()
    except AdapterMismatchError:
        ties = {a: b for a, b in tied_modules(checkpoint.config).items() if a in wanted and a not in known}
        if not ties:
            raise
    plain = [module for module in wanted if module not in ties]
    places = match_modules(plain, known, config=checkpoint.config) if plain else {}
    stored = match_modules(ties.values(), known, config=checkpoint.config)
    return places | {module: stored[source] for module, source in ties.items()}, frozenset(ties)


def _verify(
    adapter: Adapter, checkpoint: Checkpoint, places: Mapping[str, str], base: Fingerprint, *, require: bool
) -> bool:
    stored = adapter.fingerprint
    if stored is None:
        if require:
            raise FingerprintError(
                f"{adapter.source} stores no fingerprint of its base, and one is required.",
                hint="Store one with `ssh-deploy convert … --base BASE` once you trust the pair, or drop the flag.",
            )
        return False
    reasons = stored.differences(base)
    wanted = {canonical(path, checkpoint.config) for path in places.values()}
    reasons += [f"{site} has no samples in the adapter" for site in sorted(wanted - set(stored.sites))]
    if reasons:
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        made_on = f" (it names {adapter.base})" if adapter.base else ""
        raise FingerprintError(
            f"{adapter.source} was trained on another base than {checkpoint.folder}{made_on}: "
            f"{'; '.join(reasons[:3])}{more}.",
            hint="Use the base it was trained on; merged or fine-tuned copies of a base are other bases.",
        )
    return True

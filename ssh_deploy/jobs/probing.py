"""Random inputs for a model of an exported folder, whatever it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.runtimes.folder import Folder, read_json
from ssh_deploy.runtimes.session import Input


def probe_feeds(
    folder: Folder, inputs: Mapping[str, Input], *, rows: int = 2, tokens: int = 8, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Feeds by input name: token ids of the vocabulary [rows, tokens], nothing masked or cached; or normal pixels."""
    past = () if folder.decoder is None else folder.decoder.past
    vocabulary = int(read_json(folder.root, "config.json").get("vocab_size", 2))
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for name, entry in inputs.items():
        if name == "input_ids":
            feeds[name] = rng.integers(0, vocabulary, (rows, tokens))
        elif name == "attention_mask":
            feeds[name] = np.ones((rows, tokens), np.int64)
        elif name == "position_ids":
            feeds[name] = np.tile(np.arange(tokens), (rows, 1))
        elif name in past:
            _, heads, _, width = entry.shape
            feeds[name] = np.zeros((rows, int(heads or 0), 0, int(width or 0)), entry.dtype)
        elif name == "pixel_values":
            sides = [side if isinstance(side, int) else rows for side in entry.shape]
            feeds[name] = rng.normal(size=sides).astype(np.float32)
        else:
            feeds[name] = np.zeros((rows, tokens), entry.dtype)
    return feeds

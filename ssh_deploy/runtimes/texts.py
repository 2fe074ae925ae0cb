"""Texts to feeds: the folder's own tokenizer, with truncation and padding as its config says; no transformers.

The rule is that of `AutoTokenizer(texts, padding=True, truncation=True)`: cut to the model's length, pad to the
longest text of the batch. What tokenizer.json itself says of truncation and padding is what its last user left
there (all-MiniLM-L6-v2: always 128) and is not obeyed, as transformers does not obey it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.folder import Folder, contained, read_json
from ssh_deploy.runtimes.session import Input

_LONGEST = 1 << 20  # transformers writes 1e30 for "no limit"
_FILE = "tokenizer.json"


class Texts:
    """A tokenizer, bound to the inputs of a model."""

    def __init__(self, folder: Folder, inputs: dict[str, Input]) -> None:
        """Read ``tokenizer.json`` and the configs beside it.

        Raises:
            DeploymentError: no tokenizer, a damaged one, or a model that does not take token ids.
        """
        strange = sorted(set(inputs) - {"input_ids", "attention_mask", "token_type_ids"})
        if "input_ids" not in inputs or strange:
            raise DeploymentError(
                f"{folder.root}: the model takes {', '.join(inputs)}, which texts alone do not give.",
                hint="Give arrays: `.run(feeds, adapters=…)`.",
            )
        self._inputs = inputs
        self._tokenizer = load_tokenizer(folder.root)
        config = _config(folder.root, "tokenizer_config.json")
        model = _config(folder.root, "config.json")
        self.max_length = _max_length(folder, config, model)
        side = str(folder.padding.get("side") or config.get("padding_side") or "right")
        token, index = _pad(folder, self._tokenizer, config, model)
        kinds = {"direction": side, "pad_id": index, "pad_type_id": int(config.get("pad_token_type_id") or 0)}
        self._tokenizer.enable_padding(**kinds, **({"pad_token": token} if token is not None else {}))
        if self.max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(self.max_length, direction=str(config.get("truncation_side") or "right"))

    def feeds(self, texts: Sequence[str]) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """Arrays [texts, longest] by input name, and the mask of true tokens.

        Raises:
            DeploymentError: a text without any token.
        """
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.array([e.ids for e in encoded], dtype=np.int64).reshape(len(texts), -1)
        mask = np.array([e.attention_mask for e in encoded], dtype=np.int64).reshape(ids.shape)
        empty = np.flatnonzero(mask.sum(axis=1) == 0)
        if empty.size:
            raise DeploymentError(f"Text {empty[0]} has no token: {texts[empty[0]]!r:.80}.", hint="Leave it out.")
        all_arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.array([e.type_ids for e in encoded], dtype=np.int64).reshape(ids.shape),
        }
        return {n: a.astype(self._inputs[n].dtype) for n, a in all_arrays.items() if n in self._inputs}, mask != 0


def load_tokenizer(root: Path) -> Any:
    """The tokenizer in ``root/tokenizer.json``.

    Raises:
        DeploymentError: missing or damaged.
    """
    from tokenizers import Tokenizer

    path = contained(root, _FILE)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DeploymentError(f"{path}: not a tokenizer: {error}", hint="Export or fetch it again.") from error


def _config(root: Path, name: str) -> dict[str, Any]:
    return read_json(root, name) if (root / name).exists() else {}


def _max_length(folder: Folder, config: dict[str, Any], model: dict[str, Any]) -> int | None:
    """The tokenizer's limit, else what the model has positions for, else none."""
    for value in (folder.padding.get("max_length"), config.get("model_max_length")):
        if isinstance(value, int | float) and 0 < value <= _LONGEST:
            return int(value)
    positions = model.get("max_position_embeddings") or model.get("n_positions")
    if not isinstance(positions, int):
        return None
    # RoBERTa counts positions from its padding index on, so two of them are never used
    offset = int(model.get("pad_token_id") or 0) + 1 if "roberta" in folder.architecture else 0
    return positions - offset


def _pad(folder: Folder, tokenizer: Any, config: dict[str, Any], model: dict[str, Any]) -> tuple[str | None, int]:
    """Token and id that fill short rows; their mask is 0, so any id will do where nothing names one."""
    token = config.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and (index := tokenizer.token_to_id(token)) is not None:
        return token, int(index)
    for value in (folder.padding.get("id"), model.get("pad_token_id")):
        if isinstance(value, int) and not isinstance(value, bool):
            return None, value
    return None, 0

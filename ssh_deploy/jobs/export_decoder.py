"""What `deployment.json` says of a decoder: its cache, its context, its special tokens, its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssh_deploy.checkpoints.index import Checkpoint, contained, read_json
from ssh_deploy.errors import CheckpointError
from ssh_deploy.graph.positions import LOGITS_AT, choose_positions
from ssh_deploy.graph.sites import find_calls
from ssh_deploy.graph.trace import Traced
from ssh_deploy.jobs import folder_files as files

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
_SPECIAL = ("bos", "eos", "pad")


def add_positions(traced: Traced) -> None:
    """Give a decoder's graph the input `LOGITS_AT`; other graphs, or without one such place, stay as they are."""
    calls = [call for call in find_calls(traced.graph.graph) if call.module == traced.embedding]
    if traced.cache is not None and len(calls) == 1 and calls[0].tokens:
        choose_positions(traced.graph, calls[0])


def describe_decoder(checkpoint: Checkpoint, traced: Traced) -> dict[str, Any] | None:
    """The field ``decoder`` of `deployment.json`, None without a cache; `runtimes.folder.Decoder` says what it means.

    Special tokens are those of generation_config.json, which may name several ends, else those of config.json.

    Raises:
        CheckpointError: files beside the weights that cannot be read, special tokens that are no numbers.
    """
    cache = traced.cache
    if cache is None:
        return None
    config = checkpoint.config
    tokens = {**config, **{k: v for k, v in _json(checkpoint, GENERATION).items() if v is not None}}
    ids = {name: _numbers(checkpoint, f"{name}_token_id", tokens.get(f"{name}_token_id")) for name in _SPECIAL}
    context = next((config[key] for key in ("max_position_embeddings", "n_positions", "n_ctx") if key in config), None)
    return {
        "layers": cache.layers,
        "kv_heads": cache.kv_heads,
        "head_dim": cache.head_dim,
        "past": list(cache.inputs),
        "present": list(cache.outputs),
        "logits_at": LOGITS_AT if any(value.name == LOGITS_AT for value in traced.graph.graph.inputs) else None,
        "window": cache.window,
        "context": context,
        "bos": next(iter(ids["bos"]), None),
        "eos": ids["eos"],
        "pad": next(iter(ids["pad"]), None),
        "chat_template": TEMPLATE if _template(checkpoint) is not None else None,
    }


def copy_template(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the base's chat template as a file of its own, also where its tokenizer_config.json holds it."""
    template = _template(checkpoint)
    if template is not None:
        files.write_text(folder / TEMPLATE, template)


def _template(checkpoint: Checkpoint) -> str | None:
    if (checkpoint.folder / TEMPLATE).exists():
        path = contained(checkpoint.folder, Path(TEMPLATE))
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read as UTF-8 text ({error}).", hint="Fetch it again.") from error
    found = _json(checkpoint, "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


def _numbers(checkpoint: Checkpoint, name: str, value: Any) -> list[int]:
    """A special token's ids: none, one or several."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in found):
        raise CheckpointError(f"{checkpoint.folder}: {name} is {value!r:.80}, no token.", hint="Fetch its JSON again.")
    return found


def _json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    return read_json(checkpoint.folder, name) if (checkpoint.folder / name).exists() else {}

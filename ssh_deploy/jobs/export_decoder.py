"""What `deployment.json` says of a decoder: its cache, its context, its special tokens, its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssh_deploy.checkpoints.index import Checkpoint, contained
from ssh_deploy.graph.kv_cache import CacheShape
from ssh_deploy.jobs import folder_files as files

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"


def describe_decoder(checkpoint: Checkpoint, cache: CacheShape) -> dict[str, Any]:
    """The field ``decoder`` of `deployment.json`; `runtimes.folder.Decoder` says what its own fields mean.

    Special tokens are those of generation_config.json, which may name several ends, else those of config.json.
    """
    config = checkpoint.config
    tokens = {**config, **{k: v for k, v in _json(checkpoint, GENERATION).items() if v is not None}}
    eos = tokens.get("eos_token_id")
    context = next((config[key] for key in ("max_position_embeddings", "n_positions", "n_ctx") if key in config), None)
    return {
        "layers": cache.layers,
        "kv_heads": cache.kv_heads,
        "head_dim": cache.head_dim,
        "past": list(cache.inputs),
        "present": list(cache.outputs),
        "context": context,
        "bos": tokens.get("bos_token_id"),
        "eos": [] if eos is None else eos if isinstance(eos, list) else [eos],
        "pad": tokens.get("pad_token_id"),
        "chat_template": TEMPLATE if _template(checkpoint) is not None else None,
    }


def copy_template(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the base's chat template as a file of its own, also where its tokenizer_config.json holds it."""
    template = _template(checkpoint)
    if template is not None:
        files.write_text(folder / TEMPLATE, template)


def _template(checkpoint: Checkpoint) -> str | None:
    if (checkpoint.folder / TEMPLATE).exists():
        return contained(checkpoint.folder, Path(TEMPLATE)).read_text(encoding="utf-8")
    found = _json(checkpoint, "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


def _json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    if not (checkpoint.folder / name).exists():
        return {}
    value = json.loads(contained(checkpoint.folder, Path(name)).read_bytes())
    return value if isinstance(value, dict) else {}

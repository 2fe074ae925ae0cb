"""What transformers knows about an architecture: prefixes, renamings, ties, task classes; asked only when needed.

A checkpoint's names are not a model's names. transformers drops or adds the base model's prefix (``bert.``) when a
bare base is loaded into a task model, and since release 5 renames whole families on the way in (a ViT file says
``vit.encoder.layer.0.attention.attention.query``, the model ``vit.layers.0.attention.q_proj``). Both tables are
transformers' own; this module asks for them through models on the ``meta`` device, which hold no numbers.
No code of a checkpoint is ever run: classes come from the installed transformers alone.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ssh_deploy.errors import CheckpointError

log = logging.getLogger(__name__)

# base_model_prefix of the common ones, so that reading their names imports neither torch nor transformers
_PREFIXES = {
    "albert": "albert",
    "bert": "bert",
    "camembert": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "gemma": "model",
    "gpt2": "transformer",
    "gpt_neox": "gpt_neox",
    "llama": "model",
    "mistral": "model",
    "mpnet": "mpnet",
    "phi3": "model",
    "qwen2": "model",
    "qwen3": "model",
    "roberta": "roberta",
    "vit": "vit",
    "xlm-roberta": "roberta",
}

#: Sentinel number of labels: no head has it, so it shows where a model's shapes hold the number of labels.
SENTINEL = 7919


def base_prefix(config: Mapping[str, Any]) -> str:
    """Name under which task models hold their base (``bert``, ``transformer``, ``model``), or "" when unknown.

    Args:
        config: config.json of the base.
    """
    kind = str(config.get("model_type", ""))
    if kind not in _PREFIXES:
        try:
            import transformers
            from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

            known = MODEL_MAPPING_NAMES[kind]
            known = known if isinstance(known, str) else known[0]
            _PREFIXES[kind] = str(getattr(transformers, known).base_model_prefix)
        except (ImportError, KeyError, AttributeError) as error:
            log.info("no base prefix known for model type %r: %s", kind, error)
            _PREFIXES[kind] = ""
    return _PREFIXES[kind]


def meta_model(config: Mapping[str, Any], auto_class: str | None = None, **changes: Any) -> Any:
    """A model without numbers, of an auto class (``AutoModelForSequenceClassification``) or the config's own class.

    Args:
        config: config.json.
        auto_class: name in transformers, or None for ``architectures[0]``, else the bare base.
        changes: fields of the config to set first, such as ``num_labels``.

    Raises:
        CheckpointError: transformers does not know the architecture, or has no such class for it.
    """
    import torch

    transformers: Any = importlib.import_module("transformers")  # untyped, with lazy attributes
    kind = config.get("model_type")
    try:
        parsed = transformers.AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        for name, value in changes.items():
            setattr(parsed, name, value)
        own = (config.get("architectures") or [None])[0]
        with torch.device("meta"):
            if auto_class is not None:
                return getattr(transformers, auto_class).from_config(parsed)
            if own is not None and hasattr(transformers, own):
                return getattr(transformers, own)(parsed)
            return transformers.AutoModel.from_config(parsed)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} makes no {auto_class or 'model'} of model type {kind!r}: {error}",
            hint="Upgrade transformers; architectures that bring their own code are not supported.",
        ) from error


def renaming(model: Any) -> Callable[[str], str]:
    """Function from a tensor's name in a checkpoint file to its name in the loaded model (idempotent on the latter).

    Args:
        model: of the architecture, may be a `meta_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    # Only renamings: a module that a converter fuses or splits has no weight of its own in the file to add to
    table = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    return lambda name: str(apply_renamings(name, table))


def tied_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules whose weight is another module's, as the model names them: ``{"lm_head": "transformer.wte"}``.

    Args:
        config: config.json of the base; a bare base is asked as a causal language model.
    """
    for auto_class in (None, "AutoModelForCausalLM"):
        try:
            ties = getattr(meta_model(config, auto_class), "all_tied_weights_keys", None) or {}
        except CheckpointError:
            continue
        if ties:
            pairs = ((a, b) for a, b in ties.items() if a.endswith(".weight") and b.endswith(".weight"))
            return {a.removesuffix(".weight"): b.removesuffix(".weight") for a, b in pairs}
    return {}

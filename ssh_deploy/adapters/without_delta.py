"""PEFT types that no family reads, each with the reason: what they train is no change of a matrix."""

from __future__ import annotations

_TOKENS = "it trains vectors that are put in front of the text; no weight changes"

#: Reason by PEFT type.
REASONS: dict[str, str] = {
    "ADAMSS": (
        "which rows of a weight it changes follows from a clustering of the base's weights that PEFT repeats at every "
        "load (scikit-learn), not from the file"
    ),
    "ADAPTION_PROMPT": "it trains prompts inside the attention and a gate on them; no weight changes",
    "CARTRIDGE": "it trains a key and value cache that stands before the text; no weight changes",
    "CPT": _TOKENS,
    "LILY": "its product is chosen anew for every input by a router, which no weight can do",
    "LN_TUNING": "it trains norms, which are vectors; deltas change matrices",
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "P_TUNING": _TOKENS,
    "POLY": "its product is mixed anew for every task id of the input, which no weight can do",
    "PREFIX_TUNING": "it trains keys and values that stand before the text; no weight changes",
    "PROMPT_TUNING": _TOKENS,
    "SHADOW": "it trains a second, smaller model that runs beside the base",
    "XLORA": "it mixes LoRAs anew for every token by a classifier, which no weight can do",
}

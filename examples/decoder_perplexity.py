"""How much of an adapter's gain an exported decoder keeps: perplexity of held-out answers through ONNX Runtime.

    python examples/decoder_perplexity.py OUT                          every adapter of the folder that has test pairs
    python examples/decoder_perplexity.py OUT-F32 OUT-INT8 OUT-INT4    and what share of the first folder's gain is left
    python examples/decoder_perplexity.py OUT --adapter mine=mine.safetensors --pairs chatterbot

An adapter's gain is log(perplexity of the base / perplexity with the adapter), both on the folder's own base, quantised
or not: the mean number of nats that it saves per token of an answer. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conversations import NAMES, Pair, load_conversations
from numpy.typing import NDArray

from ssh_deploy import Deployment
from ssh_deploy.runtimes.prompts import Prompts

ROWS = 8
Tokens = tuple[list[int], list[int]]


def encoded(deployment: Deployment, pairs: Sequence[Pair]) -> list[Tokens]:
    """(tokens of the prompt by the folder's chat template, tokens of the answer and its end mark) of each pair."""
    folder, decoder = deployment.folder, deployment.folder.decoder
    if decoder is None:
        sys.exit(f"{folder.root} holds no decoder.")
    prompts, tokenizer = Prompts(folder), answer_tokenizer(folder.root)
    return [
        (
            prompts.encode(p.question, chat=True),
            [*tokenizer.encode(p.answer, add_special_tokens=False).ids, *decoder.eos[:1]],
        )
        for p in pairs
    ]


def answer_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, for text that goes on after a prompt."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def losses(deployment: Deployment, rows: Sequence[Tokens], adapter: str | None) -> NDArray[np.float64]:
    """−log p of every answer token, f64 [tokens], row after row; ``adapter`` None for the base alone."""
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    for start in range(0, len(order), ROWS):
        part = order[start : start + ROWS]
        feeds = batch(deployment, [[*rows[i][0], *rows[i][1]] for i in part])
        logits = deployment.run(feeds, adapter, outputs=["logits"])["logits"]
        for i, row in zip(part, logits, strict=True):
            prompt, answer = rows[i]
            last = len(prompt) - 1  # predicts the answer's first token
            scores = row[last : last + len(answer)].astype(np.float64)
            scores -= scores.max(axis=1, keepdims=True)
            found[i] = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(answer)), answer]
    return np.concatenate(found)


def batch(deployment: Deployment, rows: Sequence[Sequence[int]]) -> dict[str, NDArray[Any]]:
    """All inputs of the graph for rows of tokens read at once: padded on the right, no past."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
    feeds = {name: array for name, array in known.items() if name in deployment.inputs}
    decoder = deployment.folder.decoder
    for name in decoder.past if decoder else ():
        feeds[name] = np.zeros((len(rows), decoder.kv_heads, 0, decoder.head_dim), deployment.inputs[name].dtype)
    return feeds


def measure(deployment: Deployment, adapter: str, pairs: str, limit: int | None) -> dict[str, Any]:
    """Perplexity of the first ``limit`` test pairs without and with ``adapter``, and its gain."""
    rows = encoded(deployment, load_conversations(pairs).test[:limit])
    base, on = (float(losses(deployment, rows, name).mean()) for name in (None, adapter))
    return {"pairs": pairs, "base": math.exp(base), "adapter": math.exp(on), "gain": base - on}


def chosen(deployment: Deployment, wanted: Sequence[str] | None, pairs: str | None) -> dict[str, str]:
    """Adapters to measure, loaded where a file is named, and the pairs that each is measured on."""
    for given in wanted or ():
        name, _, file = given.partition("=")
        if file:
            deployment.load(name, file)
    if wanted is None:
        names = [name for name in deployment.adapters if pairs or name in NAMES]
    else:
        names = [given.partition("=")[0] for given in wanted]
    if not names:
        sys.exit(f"{deployment.folder.root} holds no adapter to measure: name one with --adapter.")
    for name in names:
        if not pairs and name not in NAMES:
            sys.exit(f"No test pairs go by the name of {name}: choose some with --pairs {'|'.join(NAMES)}.")
    return {name: pairs or name for name in names}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="from `ssh-deploy export --onnx`")
    parser.add_argument("--adapter", action="append", metavar="NAME[=FILE]", help="only this one (may be repeated)")
    parser.add_argument("--pairs", choices=NAMES, help="measure on these (default: those of the adapter's name)")
    parser.add_argument("--limit", type=int, help="only so many pairs (default: all)")
    parser.add_argument("--threads", type=int, help="of one operator (default: ONNX Runtime's choice)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure all folders and print them."""
    given = parse(arguments)
    results: dict[str, dict[str, Any]] = {}
    for folder in given.folders:
        mine = results[str(folder)] = {}
        with Deployment.open(folder, threads=given.threads) as deployment:
            for name, pairs in chosen(deployment, given.adapter, given.pairs).items():
                one = mine[name] = measure(deployment, name, pairs, given.limit)
                first = results[str(given.folders[0])].get(name)
                one["share"] = one["gain"] / first["gain"] if first else None
                if not given.json:
                    share = "" if first is None else f", {one['share']:.1%} of the first folder's"
                    gain = f"gain {one['gain']:.4f} nats per token{share}"
                    print(f"{folder} {name}: base {one['base']:.3f}, adapter {one['adapter']:.3f}, {gain}", flush=True)
    if given.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

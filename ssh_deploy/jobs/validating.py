"""An exported graph held against torch: every output, no adapter and each one, several batch and sequence shapes.

Three questions, and a no to any of them is an error: does it answer as torch does with the adapter added to the
weights; does it give the plain graph's bits when no adapter is named; does each adapter change anything at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.errors import VerificationError
from ssh_deploy.graph.bank_file import onnxruntime
from ssh_deploy.graph.kv_cache import PRESENT, decoder_inputs
from ssh_deploy.graph.trace import Loaded, example_inputs, run_torch

#: (batch, tokens) of the validation; none is the example's shape that was traced.
SHAPES = ((1, 5), (2, 16), (5, 9))
#: (batch, tokens, past) of the validation of decoders: prefill, one more token, a chunk.
DECODER_SHAPES = ((2, 12, 0), (4, 1, 9), (1, 6, 4))
#: Largest difference allowed, as a share of the spread of torch's own outputs (at least 1). Decoders are deep and their
#: logits sums over wide layers: SmolLM2's 30 layers are 5e-5 off, in another order of summation.
TOLERANCE = 1e-4
DECODER_TOLERANCE = 1e-3

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Checked:
    """Over all shapes: ``max_abs_diff``, ``spread`` of torch's outputs, ``effect`` of the adapter (base: None)."""

    max_abs_diff: float
    spread: float
    effect: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """For provenance.json."""
        return {"max_abs_diff": self.max_abs_diff, "spread": self.spread, "effect": self.effect}


def inputs_for(loaded: Loaded, *, padded: bool = True) -> list[dict[str, Any]]:
    """Torch inputs of every shape of `SHAPES`, or for decoders of `DECODER_SHAPES`, their past the model's own.

    Args:
        loaded: the model.
        padded: whether the last row of a decoder's batch is padded.
    """
    model, cache = loaded.model, loaded.cache
    if cache is None:
        return [example_inputs(model, batch=b, length=n, seed=17 + i) for i, (b, n) in enumerate(SHAPES)]
    feeds = []
    for i, (b, n, past) in enumerate(DECODER_SHAPES):
        feed = decoder_inputs(model, cache, batch=b, tokens=n, past=past, seed=17 + i)
        if not padded:
            feed["attention_mask"][:] = 1
        feeds.append(_positioned(feed, past))
        if past:  # numbers made up for a cache are like no text's, and rounding grows on them
            before = decoder_inputs(model, cache, batch=b, tokens=past, past=0, seed=71 + i)
            before["attention_mask"] = feed["attention_mask"][:, :past]
            (answer,) = torch_outputs(model, [_positioned(before, 0)], ("logits", *cache.outputs))
            feed |= zip(cache.inputs, map(_tensor, (answer[name] for name in cache.outputs)), strict=True)
    return feeds


def _positioned(feed: dict[str, Any], past: int) -> dict[str, Any]:
    """``feed``, its positions made to follow its mask."""
    if "position_ids" in feed:
        feed["position_ids"] = (feed["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, past:].contiguous()
    return feed


def _tensor(array: NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(array)


def torch_outputs(model: Any, inputs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Outputs]:
    """Torch's answer to each of ``inputs``, tensors or arrays by name."""
    import torch

    with torch.no_grad():
        feeds = [{k: torch.as_tensor(v) for k, v in feed.items()} for feed in inputs]
        return [{k: v.numpy() for k, v in run_torch(model, feed, names).items()} for feed in feeds]


class Runner:
    """A graph in plain onnxruntime, as stock users run it: `LoraAdapter` files and nothing of ours."""

    def __init__(self, path: Path, names: Sequence[str], required: Mapping[str, NDArray[Any]] | None = None) -> None:
        """``required``: what adapter inputs are fed with when no adapter is, in a graph without defaults."""
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._ort, self._names = ort, list(names)
        self._required = dict(required or {})
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        known = {value.name for value in self._session.get_inputs()}
        self._unread = {"position_ids"} - known  # graphs of onnxruntime-genai's builder count tokens themselves

    def __call__(
        self,
        inputs: Sequence[dict[str, Any]],
        *,
        adapter: Path | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
    ) -> list[Outputs]:
        """Answers to each of ``inputs``, with the adapter of a file or with arrays fed."""
        answers = []
        lent = None
        options = self._ort.RunOptions()
        if adapter is not None:
            lent = self._ort.LoraAdapter()
            lent.Load(str(adapter))
            options.add_active_adapter(lent)
        for feed in inputs:
            own = {k: np.asarray(v) for k, v in feed.items() if k not in self._unread}
            feeds = {**self._required, **own, **(arrays or {})}
            try:
                outputs = self._session.run(self._names, feeds, options)
            except Exception as error:  # ORT's classes share no root
                reason = str(error).strip().splitlines()[0]
                raise VerificationError(
                    f"onnxruntime refused the run: {reason:.400}", hint="Is the adapter made for this graph?"
                ) from error
            answers.append(dict(zip(self._names, outputs, strict=True)))
        del lent  # RunOptions does not keep it alive; until here this name does
        return answers


def compare(
    what: str,
    got: Sequence[Outputs],
    want: Sequence[Outputs],
    *,
    effect: float | None = None,
    tolerance: float | None = None,
) -> Checked:
    """Differences of ``got`` from torch's ``want``.

    Raises:
        VerificationError: shapes differ, or numbers by more than ``tolerance`` (None: `tolerance_of` the outputs).
    """
    tolerance = tolerance_of(want[0]) if tolerance is None else tolerance
    worst, spread = 0.0, 0.0
    for mine, theirs in zip(got, want, strict=True):
        for name, right in theirs.items():
            if mine[name].shape != right.shape:
                raise VerificationError(
                    f"{what}: {name} is {list(mine[name].shape)}, torch's is {list(right.shape)}.",
                    hint="Nothing was written. Please report this architecture.",
                )
            if right.size:
                diff = float(np.abs(mine[name].astype(np.float64) - right).max())
                worst, spread = max(worst, diff if np.isfinite(diff) else np.inf), max(spread, float(np.ptp(right)))
    if not worst <= tolerance * max(1.0, spread):
        raise VerificationError(
            f"{what}: the exported graph is {worst:.3g} off torch, over outputs that spread {spread:.3g} "
            f"(allowed: {tolerance} of it).",
            hint="Nothing was written. Please report this architecture.",
        )
    return Checked(worst, spread, effect)


def tolerance_of(names: Iterable[str]) -> float:
    """The tolerance for a model with outputs of these names."""
    return DECODER_TOLERANCE if any(name.startswith(PRESENT) for name in names) else TOLERANCE


def identical(what: str, got: Sequence[Outputs], want: Sequence[Outputs]) -> None:
    """Demand equal bits.

    Raises:
        VerificationError: with the output that differs.
    """
    for mine, theirs in zip(got, want, strict=True):
        for name, right in theirs.items():
            if mine[name].shape != right.shape or mine[name].tobytes() != right.tobytes():
                raise VerificationError(
                    f"{what}: without an adapter {name} is not bit-identical to the plain graph's.",
                    hint="Nothing was written. Please report this architecture and onnxruntime's version.",
                )


def effect_of(with_it: Sequence[Outputs], without: Sequence[Outputs]) -> float:
    """Largest change of an output of equal shape."""
    changes = [
        float(np.abs(a[name].astype(np.float64) - b[name]).max())
        for a, b in zip(with_it, without, strict=True)
        for name in b
        if a[name].shape == b[name].shape and b[name].size
    ]
    return max(changes, default=0.0)


def first_numbers(answers: Sequence[Outputs]) -> NDArray[np.float64]:
    """All numbers of the first output of ``answers``, one after the other, float64."""
    name = next(iter(answers[0]))
    return np.concatenate([answer[name].astype(np.float64).reshape(-1) for answer in answers])

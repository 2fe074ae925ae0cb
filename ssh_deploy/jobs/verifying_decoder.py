"""A decoder against torch: logits and perplexity of prompts, and what both write after them, token by token.

The logits are compared at every real token of every prompt, the writing runs through the cache. Tokens must be the
same; where they part, torch's first two choices must lie so close that the measured difference decides between them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.errors import VerificationError
from ssh_deploy.graph.trace import Loaded
from ssh_deploy.jobs.greedy import continue_greedily, divergences, prompt_inputs
from ssh_deploy.jobs.progress import Progress
from ssh_deploy.jobs.verdict import Run, Verdict, Written

#: What decoders are asked to continue where nobody gives texts.
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "The quick brown fox",
    "In the year 1969,",
    "My favourite food is",
    "def fibonacci(n):",
    "Roses are red, violets are",
    "The most important thing about science is that",
    "To be or not to be,",
    "Dear Sir or Madam,",
    "She opened the door and saw",
    "1, 2, 3, 4,",
    "The weather today is",
    "An apple a day",
    "Question: what is the largest planet? Answer:",
    "He whispered quietly so that nobody",
    "The train to London leaves at",
    "Ingredients: flour, sugar,",
    "Let x be a real number such that",
)
#: tokens written after each prompt
NEW = 64
#: prompts of one run: their logits are [rows, tokens, vocabulary] in float32
_ROWS = 10


def prompt_tokens(checkpoint: Checkpoint, loaded: Loaded, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of ``texts``, or of `PROMPTS`; as many random rows where there is no text and no tokenizer.

    Raises:
        VerificationError: texts without a tokenizer, one without a token, or one that leaves the context no room.
    """
    if not texts and not (checkpoint.folder / "tokenizer.json").exists():
        rng = np.random.default_rng(0)
        return [rng.integers(0, loaded.model.config.vocab_size, 3 + i).tolist() for i in range(len(PROMPTS))]
    tokenizer = load_tokenizer(checkpoint)
    prompts = [list(map(int, tokenizer(text)["input_ids"])) for text in texts or PROMPTS]
    for text, tokens in zip(texts or PROMPTS, prompts, strict=True):
        if not 0 < len(tokens) < context_of(loaded):
            raise VerificationError(
                f"{text!r:.80} is {len(tokens)} tokens; the context holds 1 to {context_of(loaded) - 1} and an answer.",
                hint="Give shorter texts.",
            )
    return prompts


def context_of(loaded: Loaded) -> int:
    """Most tokens of a row."""
    return int(getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 30)


def decoder_verdict(
    run: Run,
    torch_run: Run,
    prompts: Sequence[Sequence[int]],
    loaded: Loaded,
    *,
    share: float,
    target: str,
    progress: Progress,
    packed: bool = False,
    rms: bool = False,
) -> Verdict:
    """Compare ``run`` with ``torch_run`` on ``prompts``.

    Args:
        run: the target.
        torch_run: torch with the adapter in its weights.
        prompts: token ids.
        loaded: torch's model, for the shape of its cache and its context.
        share: of the spread of torch's logits that is allowed as difference.
        target: what it is, for people.
        progress: told of every batch.
        rms: whether the root mean square of differences counts, with ``share`` of the standard deviation of torch's.
        packed: the target takes no padding in front: its prompts are run one by one.
    """
    assert loaded.cache is not None
    shape, positions = loaded.cache, takes_positions(loaded.model)
    new = min(NEW, context_of(loaded) - max(map(len, prompts)))
    rows = 1 if packed else _ROWS
    batches = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    found = _Compared()
    for done, batch in enumerate(batches):
        progress("verify", done, 2 * len(batches))
        feeds = prompt_inputs(batch, shape, positions=positions)
        (mine,), (theirs,) = run([feeds]), torch_run([feeds])
        found.add(mine["logits"], theirs["logits"], feeds["input_ids"], feeds["attention_mask"].astype(bool))
    tolerance = share * (found.deviation if rms else max(1.0, found.high - found.low))
    same = apart = 0
    tie = min(10 * found.worst, 2 * tolerance)
    for done, batch in enumerate(batches):
        progress("verify", len(batches) + done, 2 * len(batches))
        got, want = (continue_greedily(r, batch, shape, new=new, positions=positions) for r in (run, torch_run))
        alike, unlike = divergences(got, want, tie=tie)
        same, apart = same + alike, apart + unlike
    progress("verify", 1, 1)
    written = Written(len(prompts), new, same, apart, *found.perplexities)
    # a quantised base's kernels round activations: its tokens are told, and its logits judged
    ok = found.rms <= tolerance if rms else found.worst <= tolerance and not apart
    verdict = Verdict(ok, found.worst, found.agreed / found.count, len(prompts), tolerance, target, written)
    return replace(verdict, rms_diff=found.rms if rms else None)


@dataclass(slots=True)
class _Compared:
    """Over all real tokens so far: differences, torch's range, equal first choices; losses of the told ones."""

    worst: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    agreed: int = 0
    count: int = 0
    told: int = 0
    numbers: int = 0
    total: float = 0.0
    squares: float = 0.0
    apart: float = 0.0
    loss: float = 0.0
    loss_torch: float = 0.0

    def add(self, mine: NDArray[Any], theirs: NDArray[Any], ids: NDArray[np.int64], real: NDArray[np.bool_]) -> None:
        self.loss += _loss(mine, ids, real)
        self.loss_torch += _loss(theirs, ids, real)
        self.told += int(real[:, :-1].sum())
        mine, theirs = mine[real], theirs[real]
        self.numbers += theirs.size
        self.total += float(theirs.sum(dtype=np.float64))
        self.squares += float(np.square(theirs, dtype=np.float64).sum())
        self.apart += float(np.square(mine - theirs, dtype=np.float64).sum())
        difference = float(np.abs(mine - theirs).max())
        self.worst = max(self.worst, difference if np.isfinite(difference) else math.inf)
        self.low, self.high = min(self.low, float(theirs.min())), max(self.high, float(theirs.max()))
        self.agreed += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        self.count += len(mine)

    @property
    def rms(self) -> float:
        """Root mean square of the differences."""
        return math.sqrt(self.apart / self.numbers)

    @property
    def deviation(self) -> float:
        """Standard deviation of torch's logits."""
        return math.sqrt(max(self.squares / self.numbers - (self.total / self.numbers) ** 2, 0.0))

    @property
    def perplexities(self) -> tuple[float | None, float | None]:
        if not self.told:
            return None, None
        return math.exp(self.loss / self.told), math.exp(self.loss_torch / self.told)


def takes_positions(model: Any) -> bool:
    """Whether a torch model takes ``position_ids``."""
    return "position_ids" in inspect.signature(model.forward).parameters


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, by transformers.

    Raises:
        VerificationError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise VerificationError(
            f"{checkpoint.folder}: no tokenizer ({str(error).splitlines()[0]}).", hint="Leave --texts out."
        ) from error


def _loss(logits: NDArray[Any], ids: NDArray[np.int64], real: NDArray[np.bool_]) -> float:
    """Sum over all real tokens but the first of each row of −log of their probability."""
    told = real[:, :-1]
    before = logits[:, :-1][told].astype(np.float64)
    top = before.max(-1)
    chosen = np.take_along_axis(before, ids[:, 1:][told][:, None], axis=1)[:, 0]
    return float((np.log(np.exp(before - top[:, None]).sum(-1)) + top - chosen).sum())

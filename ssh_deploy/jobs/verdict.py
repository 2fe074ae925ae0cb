"""What `ssh-deploy verify` found: how far a target is from torch, and for decoders what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssh_deploy.jobs.validating import Outputs

#: Answers to inputs by name, a batch each.
Run = Callable[[Sequence[dict[str, Any]]], list[Outputs]]


@dataclass(frozen=True, slots=True)
class Written:
    """What a decoder wrote, greedily.

    Attributes:
        prompts: how many it went on from.
        tokens: after each.
        same: prompts that torch continues with the same tokens.
        apart: prompts where torch was clearly of another mind; the rest are ties that rounding decides.
        perplexity: of the prompts by the target; None where none has two tokens.
        perplexity_torch: by torch.
    """

    prompts: int
    tokens: int
    same: int
    apart: int
    perplexity: float | None
    perplexity_torch: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison found.

    Attributes:
        ok: within ``tolerance``, and no prompt written apart.
        max_abs_diff: of outputs from torch's.
        agreement: share of rows (or tokens) with the same largest output.
        rows: compared.
        tolerance: largest difference allowed; with ``rms_diff``, largest of that.
        target: what was compared, for people.
        written: of decoders.
        quantized: of folders with a quantised base: what `deployment.json` says of it, ``drift`` of the base and
            ``effects`` of its adapters from those on the float32 base among it.
        rms_diff: of folders with a quantised base, whose kernels round activations: root mean square of differences.
    """

    ok: bool
    max_abs_diff: float
    agreement: float
    rows: int
    tolerance: float
    target: str
    written: Written | None = None
    quantized: Mapping[str, Any] | None = None
    rms_diff: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; ``written`` only of decoders, ``quantized`` only of quantised bases."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def lines(self) -> list[str]:
        """For people."""
        word = "agrees" if self.ok else "DIFFERS"
        name, value = ("max abs", self.max_abs_diff) if self.rms_diff is None else ("rms", self.rms_diff)
        distance = f"{name} diff {value:.2e} (allowed {self.tolerance:.2e})"
        lines = [f"{self.target} {word}: {distance}, agreement {self.agreement:.4f} over {self.rows} rows"]
        if (written := self.written) is not None:
            lines.append(
                f"  {written.tokens} greedy tokens: the same after {written.same} of {written.prompts} prompts, "
                f"otherwise after {written.apart}"
            )
            if written.perplexity is not None:
                lines.append(f"  perplexity {written.perplexity:.5g}, torch's {written.perplexity_torch:.5g}")
        if (stored := self.quantized) is not None:
            lines.append(f"  base in {stored['scheme']}: {stored['drift']['rms']:.1e} of its spread off float32 (rms)")
        return lines

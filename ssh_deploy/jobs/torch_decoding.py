"""The peer of `bench decode`: a checkpoint in torch with PEFT's LoRA on query and value, one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssh_deploy.errors import DependencyError
from ssh_deploy.jobs.decoder_models import RANK
from ssh_deploy.jobs.timing import spun_down


class TorchDecoder:
    """One row, its prompt read, its KV cache cut back before every step."""

    def __init__(self, checkpoint: Path, *, tokens: int, threads: int | None) -> None:
        """Load ``checkpoint`` in float32 with a random LoRA; ``tokens`` of prompt, ``threads`` None: torch's own.

        Raises:
            DependencyError: torch, transformers or peft are not installed.
        """
        try:
            import peft
            import torch
            import transformers
        except ImportError as error:
            raise DependencyError(f"PEFT is not installed ({error}).", hint="pip install peft") from error
        from ssh_deploy.graph.trace import quiet

        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        with quiet():
            base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            config = peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            self._model: Any = peft.get_peft_model(base, config).eval()
        self._torch, self._tokens = torch, tokens
        self._cache: Any = None

    def ready(self, i: int) -> None:
        """The cache holds the prompt; stepped until other sessions' threads have stopped."""
        self._read()
        spun_down(self.step, i)

    def step(self, i: int) -> None:
        """One token more."""
        if self._cache is None:
            self._read()
        self._forward([3])

    def _read(self) -> None:
        self._cache = None
        self._forward([(7 + 3 * k) % 256 for k in range(self._tokens)])

    def _forward(self, tokens: list[int]) -> None:
        with self._torch.inference_mode():
            answer = self._model(
                input_ids=self._torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = answer.past_key_values
        int(answer.logits[0, -1].argmax())

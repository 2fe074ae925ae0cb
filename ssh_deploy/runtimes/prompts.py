"""Prompts to tokens and tokens to text, with the folder's own tokenizer and chat template; no transformers."""

from __future__ import annotations

from collections.abc import Sequence

from ssh_deploy.errors import DeploymentError
from ssh_deploy.runtimes.chat import chat_prompt
from ssh_deploy.runtimes.folder import Folder
from ssh_deploy.runtimes.texts import load_tokenizer


class Prompts:
    """The tokenizer of a decoder. Whatever tokenizer.json says of truncation and padding is not obeyed."""

    def __init__(self, folder: Folder) -> None:
        """Read ``tokenizer.json`` of an exported folder.

        Raises:
            DeploymentError: no tokenizer, or a damaged one.
        """
        self._root = folder.root
        self._template = folder.decoder.chat_template if folder.decoder else None
        self._tokenizer = load_tokenizer(folder.root)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Tokens of ``prompt``, with the special ones that the tokenizer adds.

        Args:
            prompt: the text as it stands, or with ``chat`` what the user says, put into the model's chat template
                (which brings its own special tokens).
            chat: likewise.

        Raises:
            DeploymentError: an empty prompt, or no chat template.
            DependencyError: ``chat`` without jinja2.
        """
        if not prompt:
            raise DeploymentError("The prompt is empty.", hint="Give at least one character to go on from.")
        text = prompt
        if chat:
            text = chat_prompt(self._root, [{"role": "user", "content": prompt}], file=self._template)
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=not chat).ids
        if not tokens:
            raise DeploymentError(f"The prompt {prompt!r:.80} has no token.", hint="Give one that has.")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens`` without special ones; bytes that are no whole character are U+FFFD."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

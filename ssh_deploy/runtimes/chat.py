"""Messages to a prompt, by the chat template that came with the model.

Templates are Jinja, written by whoever published the model, so they run in Jinja's sandbox with what transformers
gives them, and one that tries to leave it is an error. Jinja is asked for only here. *Not covered:* a template that
loops for hours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ssh_deploy.errors import DependencyError, DeploymentError
from ssh_deploy.runtimes.folder import contained, read_json

_CONFIG = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_MOST = 1 << 20  # bytes; the longest template known has 20 kB
_JINJA = (3, 1, 6)  # the sandbox of older ones has known holes


def chat_prompt(root: Path, messages: Sequence[Mapping[str, str]], *, file: str | None) -> str:
    """The prompt for ``messages`` (``role`` and ``content`` each), ready for the assistant's answer.

    Args:
        root: exported folder.
        messages: in order.
        file: of the template in it; None: it may stand in ``tokenizer_config.json``.

    Raises:
        DeploymentError: no template, or one that fails or refuses these messages.
        DependencyError: jinja2 is not installed, or too old to be trusted.
    """
    config = read_json(root, _CONFIG) if (root / _CONFIG).exists() else {}
    source = _template(root, config, file)
    environment, error = _sandbox()
    tokens = {name: _text(config.get(name)) for name in _TOKENS}
    try:
        return str(environment.from_string(source).render(messages=messages, add_generation_prompt=True, **tokens))
    except (error, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as reason:
        raise DeploymentError(
            f"{root}: its chat template fails on these messages: {reason}", hint="Give the whole prompt instead."
        ) from reason


def _template(root: Path, config: Mapping[str, Any], file: str | None) -> str:
    if file is not None:
        path = contained(root, file)
        if path.stat().st_size > _MOST:
            raise DeploymentError(f"{path}: over {_MOST >> 20} MiB.", hint="That is no chat template.")
        return path.read_text(encoding="utf-8", errors="replace")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise DeploymentError(
            f"{root}: the model came without a chat template.", hint="Give the whole prompt, without --chat."
        )
    return found


def _sandbox() -> tuple[Any, type[Exception]]:
    """Jinja's environment for foreign templates, and the root of its errors."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DependencyError(
            f"Chat templates need jinja2 ({error}).", hint="`pip install jinja2`, or give the whole prompt."
        ) from error
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < _JINJA:
        raise DependencyError(
            f"jinja2 {jinja2.__version__} is installed, whose sandbox has known holes.",
            hint="`pip install --upgrade jinja2`, or give the whole prompt.",
        )

    class Generation(Extension):
        """``{% generation %}`` marks what a trainer counts; here it is only what stands between."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment, jinja2.TemplateError


def _text(token: Any) -> str:
    """A special token's text: as it stands, or the content of an entry."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""

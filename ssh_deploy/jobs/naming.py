"""``NAME=PATH`` on command lines: adapters by name, each name used once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ssh_deploy.errors import AdapterFileError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def named_paths(texts: Sequence[str]) -> dict[str, Path]:
    """Paths by name; without ``NAME=`` a file's stem or a folder's name is its name.

    Args:
        texts: ``PATH`` or ``NAME=PATH``. A text that is itself an existing path is a path, whatever it contains.

    Raises:
        AdapterFileError: a name with other characters than letters, digits, ``.``, ``_`` and ``-``, or used twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        path = Path(rest) if equals and not Path(text).exists() else Path(text)
        if path == Path(text):
            whole = path.resolve()
            name = whole.stem if whole.suffix == ".safetensors" else whole.name
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise AdapterFileError(
                f"{name!r} is no adapter name: 1 to 128 letters, digits, dots, dashes and underscores.",
                hint="Name it: NAME=PATH.",
            )
        if name in found:
            raise AdapterFileError(
                f"Two adapters go by {name!r}: {found[name]} and {path}.", hint="Name them: NAME=PATH."
            )
        found[name] = path
    return found

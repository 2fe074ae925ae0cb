"""Any adapter by its path: a compact file or a PEFT folder."""

from __future__ import annotations

import stat
from pathlib import Path

from ssh_deploy.adapters.base import Adapter, Shapes
from ssh_deploy.adapters.file import read_file
from ssh_deploy.adapters.peft_folder import CONFIG, WEIGHTS, read_folder
from ssh_deploy.errors import AdapterFileError


def read_adapter(path: str | Path, *, shapes: Shapes | None = None) -> Adapter:
    """Read the adapter at ``path``: a compact ``.safetensors`` file or a PEFT folder (or its config or weights file).

    Args:
        path: file or folder.
        shapes: (out, in) of the base's weights by the adapter's module paths; only PEFT folders need it.

    Raises:
        AdapterFileError: no adapter there, or a broken one.
        RegistryError: of a family that is not installed.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise AdapterFileError(
            f"{path}: no such file or folder.", hint="Give a compact .safetensors file or a PEFT folder."
        ) from error
    if stat.S_ISDIR(found.st_mode):
        return read_folder(path, shapes=shapes)
    if path.name in (CONFIG, WEIGHTS):
        return read_folder(path.parent, shapes=shapes)
    return read_file(path)

"""Many adapters of a folder as one bank file, for stock onnxruntime fed with `adapter_ids`.

The bank is an `.onnx_adapter` like any other, with a row for each adapter and an empty row 0 (in the head bank: the
base's own head). Beside it lies a JSON of the same stem that says which row each name has in which bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssh_deploy.errors import DeploymentError, OutputError, UnknownNameError, near_misses
from ssh_deploy.graph.bank_file import stack_rows, write_onnx_adapter
from ssh_deploy.jobs import folder_files as files
from ssh_deploy.jobs.folder_adapters import layout_of
from ssh_deploy.runtimes.conversion import rows_of_file
from ssh_deploy.runtimes.folder import contained, open_folder, read_json
from ssh_deploy.runtimes.session import Session


@dataclass(frozen=True, slots=True)
class PackReport:
    """The bank's file and the JSON beside it; ``ids``: row by ids input by name of adapter."""

    bank: Path
    index: Path
    ids: dict[str, dict[str, int]]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"bank": str(self.bank), "index": str(self.index), "ids": self.ids, "bytes": self.bytes}


def pack_adapters(folder: str | Path, names: Sequence[str], out: str | Path) -> PackReport:
    """Write adapters of an exported folder as one bank.

    Args:
        folder: exported.
        names: of its adapters, in the order of their ids; none means all.
        out: the bank, by convention ``NAME.onnx_adapter``; ``NAME.json`` beside it is written too.

    Raises:
        UnknownNameError: no adapter of that name.
        DeploymentError: nothing to pack, or a file whose bytes are not those of deployment.json.
        OutputError: either output exists.
    """
    opened, out = open_folder(folder), Path(out)
    index = out.with_suffix(".json")
    for path in (out, index):
        if path.exists():
            raise OutputError(f"{path} exists already.", hint="Choose another name or remove it first.")
    if out.suffix == ".json":
        raise OutputError(f"{out}: the bank's own JSON would have this name.", hint="Name it NAME.onnx_adapter.")
    names = list(dict.fromkeys(names)) or list(opened.adapters)
    if not names:
        raise DeploymentError(f"{opened.root} has no adapters to pack.", hint="Add some with `ssh-deploy add`.")
    session = Session(contained(opened.root, files.MODEL))
    rows = []
    for name in names:
        if name not in opened.adapters:
            raise UnknownNameError(f"{opened.root} has no adapter {name!r}.", hint=near_misses(name, opened.adapters))
        stored = opened.adapters[name]
        path = contained(opened.root, str(stored.path.relative_to(opened.root)))
        files.require_digest(path, stored.sha256)
        kinds = rows_of_file(path, opened, session.adapter_inputs)
        rows.append({key: array for arrays in kinds.values() for key, array in arrays.items()})
    layout = layout_of(opened.root, read_json(opened.root, files.DEPLOYMENT))
    arrays, numbers = stack_rows(rows, layout)
    ids = {name: {key: rows_[i] for key, rows_ in numbers.items()} for i, name in enumerate(names)}
    write_onnx_adapter(out, arrays, layout)
    labels = {name: list(opened.adapters[name].labels) for name in names}
    files.write_json(index, {"bank": out.name, "sha256": files.file_sha256(out), "ids": ids, "labels": labels})
    return PackReport(out, index, ids, out.stat().st_size)

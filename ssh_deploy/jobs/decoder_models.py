"""What `bench decode` measures: a decoder exported plain, with slots for spectra and for LoRA, as it is and quantised.

The base is a checkpoint of the caller's, or one of a known shape with random weights, whose time is the same. Each
export is made at its first use and kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssh_deploy import __version__
from ssh_deploy.adapters.base import Adapter
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.whole import whole_folder
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import DependencyError, UnknownNameError, near_misses
from ssh_deploy.graph.bank_file import adapter_rows, write_onnx_adapter
from ssh_deploy.graph.guard import CONTRACT
from ssh_deploy.jobs.bench_models import adapter_files, make_folder
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.folder_adapters import layout_of
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.runtimes.folder import DEPLOYMENT, open_folder, read_json

#: layers, hidden size, intermediate size, heads, heads of keys and values, vocabulary
SHAPES = {"smollm2-135m": (30, 576, 1536, 9, 3, 49152), "pico": (2, 48, 80, 4, 2, 320)}
#: sites and kinds of slots of each form of export
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), ()),
    "qv": (("*q_proj", "*v_proj"), ("hartley",)),
    "all7": (("linear",), ("hartley",)),
    "lora": (("*q_proj", "*v_proj"), ("lowrank",)),
}
PRECISIONS = ("f32", "int8", "int4")
RANK = 16
_STRENGTH = 0.02


@dataclass(frozen=True, slots=True)
class Decoders:
    """A base and where its exports are kept."""

    checkpoint: Path
    root: Path
    progress: Progress = silent

    def folder(self, form: str, precision: str = "f32") -> Path:
        """The export of one of `FORMS` in one of `PRECISIONS`.

        Raises:
            DeployError: it cannot be exported.
        """
        out = self.root / f"{form}-{precision}"
        if not out.is_dir():
            self.progress(f"export {form} {precision}", 0, 1)
            sites, kinds = FORMS[form]
            quantised: dict[str, Any] = (
                {}
                if precision == "f32"
                else {
                    "quantize": precision,
                    "calibrate": 0,  # what codes stand for costs no time
                }
            )
            options = ExportOptions(task="text-generation", sites=sites, kinds=kinds, **quantised)
            export_model(self.checkpoint, [], out, options=options)
            self.progress(f"export {form} {precision}", 1, 1)
        return out

    def adapters(self, form: str, precision: str, count: int) -> list[Path]:
        """``count`` files of different random adapters for all sites of an export."""
        folder = open_folder(self.folder(form, precision))
        if form != "lora":
            return adapter_files(self.root, folder, count, progress=self.progress)
        paths = [self.root / f"lora-{precision}-{i}.onnx_adapter" for i in range(count)]
        layout = layout_of(folder.root, read_json(folder.root, DEPLOYMENT))
        places = {site.module: site.module for site in folder.sites}
        for seed, path in enumerate(paths):
            if not path.exists():
                rows = adapter_rows(_lora([(s.module, s.out, s.inn) for s in folder.sites], seed), layout, places)
                write_onnx_adapter(path, {name: array[None] for name, array in rows.items()}, layout)
        return paths


def find_decoders(work: Path, *, base: str | Path | None, shape: str, progress: Progress = silent) -> Decoders:
    """The base to measure on: the checkpoint ``base``, or one of ``shape`` with random weights, kept under ``work``.

    Raises:
        UnknownNameError: no such shape.
        CheckpointError: no such base.
        DependencyError: torch or transformers are not installed.
        OutputError: ``work`` cannot be written.
    """
    if base is None and shape not in SHAPES:
        raise UnknownNameError(f"No shape {shape!r}.", hint=near_misses(shape, SHAPES))
    make_folder(work)
    made: list[Any] = [__version__, CONTRACT, shape]
    name = shape
    if base is not None:
        files = open_checkpoint(base).folder.resolve().glob("*")
        made += sorted([str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file())
        name = Path(base).name
    root = work / f"{name}-{hashlib.sha256(json.dumps(made).encode()).hexdigest()[:8]}"
    checkpoint = root / "checkpoint" if base is None else open_checkpoint(base).folder
    if base is None and not checkpoint.is_dir():
        make_folder(root)
        _write_checkpoint(checkpoint, SHAPES[shape])
    make_folder(root)
    return Decoders(checkpoint, root, progress)


def _write_checkpoint(path: Path, shape: Sequence[int]) -> None:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DependencyError(
            f"bench decode makes its base with torch and transformers ({error}).", hint="pip install 'ssh-deploy[cpu]'."
        ) from error
    from tokenizers import Tokenizer, models

    from ssh_deploy.graph.trace import quiet

    layers, hidden, inner, heads, kv_heads, vocabulary = shape
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with (
        quiet(),
        whole_folder(path, need=4 * vocabulary * hidden + 4 * layers * hidden * (3 * inner + 3 * hidden)) as new,
    ):
        transformers.LlamaForCausalLM(config).save_pretrained(new)
        Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(new / "tokenizer.json"))  # noqa: S106


def _lora(sites: Sequence[tuple[str, int, int]], seed: int) -> Adapter:
    """A random LoRA of rank `RANK` on ``sites`` (module, out, in)."""
    rng = np.random.default_rng(seed)
    deltas = {}
    for module, out, inn in sites:
        a = rng.standard_normal((RANK, inn), dtype=np.float32)
        b = rng.standard_normal((out, RANK), dtype=np.float32)
        deltas[module] = LowRankDelta(a, b, scaling=_STRENGTH / RANK**0.5)
    return Adapter("lora", deltas, {}, "", Path("random"))

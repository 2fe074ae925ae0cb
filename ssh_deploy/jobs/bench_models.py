"""What `bench bank` measures on: bases of known shapes with random weights, plain, with slots, and with LoRA instead.

Weights and token embeddings are random (the vocabulary is small: an embedding is a lookup): time does not depend on
them. The LoRA peers are what others serve today. ``inputs``: A and B of one adapter as optional inputs, two MatMuls
a site, as Olive exports them. ``bank``: A and B of many, gathered by each row's id, what one would write by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssh_deploy import __version__
from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.file import write_file
from ssh_deploy.checkpoints.whole import whole_folder
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import DependencyError, OutputError, UnknownNameError, near_misses
from ssh_deploy.graph.guard import CONTRACT
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.progress import Progress, silent
from ssh_deploy.runtimes.deployment import Deployment
from ssh_deploy.runtimes.folder import Folder
from ssh_deploy.runtimes.session import Session

#: layers, hidden size, intermediate size, heads
SHAPES = {"bert-base": (12, 768, 3072, 12), "minilm": (6, 384, 1536, 12), "pico": (2, 48, 96, 4)}
SITES = ("*attention.self.query", "*attention.self.value")
COEFFICIENTS = 750
PLAIN = "plain.onnx"
LORA_BANK = 100  # adapters in the peers' banks
_STRENGTH = 0.02  # root mean square of ΔW; about that of the weights


@dataclass(frozen=True, slots=True)
class Models:
    """Where the graphs of one shape are: ``plain``, the folder with ``slots``, and ``lora`` peers by (rank, form)."""

    shape: str
    plain: Path
    slots: Path
    lora: dict[tuple[int, str], Path]


def build_models(work: Path, shape: str, *, ranks: Sequence[int] = (8, 16), progress: Progress = silent) -> Models:
    """Make (or find, when this release made them) the graphs of ``shape`` under ``work``.

    Raises:
        UnknownNameError: no such shape.
        DependencyError: torch, transformers or onnx are not installed.
        OutputError: ``work`` cannot be written.
    """
    check_shape(shape)
    made = json.dumps({"release": __version__, "contract": CONTRACT, "ranks": list(ranks)})
    root = work / f"{shape}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"
    lora = {(rank, form): root / f"lora{rank}-{form}" / "model.onnx" for rank in ranks for form in ("inputs", "bank")}
    models = Models(shape, root / "plain" / PLAIN, root / "slots", lora)
    if root.is_dir():
        return models
    make_folder(work)
    with whole_folder(root, need=4 * _bytes(shape) * (2 + len(lora))) as folder:
        checkpoint = folder / "checkpoint"
        _write_checkpoint(checkpoint, shape)
        progress(f"build {shape}", 1, 3)
        options = ExportOptions(task="feature-extraction", sites=SITES, kinds=("hartley",))
        export_model(checkpoint, [], folder / "slots", options=options)
        progress(f"build {shape}", 2, 3)
        _write_plain_and_peers(folder, checkpoint, ranks)
        progress(f"build {shape}", 3, 3)
    return models


def check_shape(shape: str) -> None:
    """Refuse a name that is none of `SHAPES`.

    Raises:
        UnknownNameError: with the near ones.
    """
    if shape not in SHAPES:
        raise UnknownNameError(f"No shape {shape!r}.", hint=near_misses(shape, SHAPES))


def adapter_files(work: Path, folder: Folder, count: int, *, progress: Progress = silent) -> list[Path]:
    """``count`` compact files of different random adapters for all sites of ``folder``; those already there are kept.

    Each holds `COEFFICIENTS` float16 values a site (fewer where a weight has fewer places) and the base's fingerprint.
    """
    place = work / f"adapters-{folder.sites[0].inn}-{len(folder.sites)}"
    make_folder(place)
    paths = [place / f"a{i:05d}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            write_file(random_adapter(folder, seed=i), path, values_dtype=np.float16)
        if i % 50 == 0:
            progress("write adapters", i, count)
    progress("write adapters", count, count)
    return paths


def random_adapter(folder: Folder, *, seed: int) -> Adapter:
    """A random adapter on every site of ``folder``."""
    rng = np.random.default_rng(seed)
    deltas = {}
    first = folder.sites[0].out * folder.sites[0].inn
    for site in folder.sites:
        total = site.out * site.inn
        n = min(COEFFICIENTS, total // 2)
        places = np.unique(rng.integers(0, total, 2 * n + 16))
        places = np.sort(rng.permutation(places)[:n])  # ascending, as `convert` writes them
        rows, cols = np.divmod(places, site.inn)
        dtype = np.uint16 if max(site.out, site.inn) <= 1 << 16 else np.uint32
        # root mean square of ΔW = α/(MN) C S C is α √n / (MN) times that of the values; a file has one α
        alpha = _STRENGTH * first / math.sqrt(min(COEFFICIENTS, first // 2))
        level = _STRENGTH * total / math.sqrt(n) / alpha
        values = (rng.standard_normal(n) * level).astype(np.float16)
        deltas[site.module] = SpectralDelta(
            (site.out, site.inn), "hartley", rows.astype(dtype), cols.astype(dtype), values, alpha, "backward"
        )
    settings = {"n": COEFFICIENTS, "delta_ratio": 0.0, "seed": seed}
    return Adapter("ssh", deltas, {}, "", Path("random"), fingerprint=folder.samples(), settings=settings)


def token_feeds(model: Session | Deployment, rows: int, tokens: int) -> dict[str, NDArray[Any]]:
    """What ``model`` reads: random tokens [rows, tokens], none of them padding."""
    rng = np.random.default_rng(0)
    every = {
        "input_ids": rng.integers(5, 900, (rows, tokens)),
        "attention_mask": np.ones((rows, tokens), np.int64),
        "token_type_ids": np.zeros((rows, tokens), np.int64),
    }
    return {name: every[name] for name in model.inputs}


def lora_arrays(shape: str, rank: int, form: str, *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random A [.., in, rank] and B [.., rank, out] by input name; ``bank``: `LORA_BANK` of them, leading."""
    layers, hidden, _, _ = SHAPES[shape]
    rng = np.random.default_rng(seed)
    many = (LORA_BANK,) if form == "bank" else ()
    arrays = {}
    for i in range(2 * layers):
        arrays[f"lora_a.{i}"] = rng.standard_normal((*many, hidden, rank), dtype=np.float32) * np.float32(0.05)
        arrays[f"lora_b.{i}"] = rng.standard_normal((*many, rank, hidden), dtype=np.float32) * np.float32(0.05)
    return arrays


def make_folder(folder: Path) -> None:
    """Make ``folder`` where it is not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: {error.strerror}.", hint="Give a folder that can be written: --work DIR."
        ) from None


def _bytes(shape: str) -> int:
    layers, hidden, inner, _ = SHAPES[shape]
    return layers * (4 * hidden * hidden + 2 * hidden * inner) * 4


def _write_checkpoint(path: Path, shape: str) -> None:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DependencyError(
            f"bench bank makes its bases with torch and transformers ({error}).", hint="pip install 'ssh-deploy[cpu]'."
        ) from error
    from ssh_deploy.graph.trace import quiet

    layers, hidden, inner, heads = SHAPES[shape]
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        transformers.BertModel(config).save_pretrained(path)


def _write_plain_and_peers(folder: Path, checkpoint: Path, ranks: Sequence[int]) -> None:
    import onnx_ir as ir

    from ssh_deploy.checkpoints.index import open_checkpoint
    from ssh_deploy.graph.trace import load_torch, trace_model

    traced = trace_model(load_torch(open_checkpoint(checkpoint), "feature-extraction"))
    (folder / "plain").mkdir()
    plain = folder / "plain" / PLAIN
    ir.save(traced.graph, plain, external_data=f"{PLAIN}.data")
    for rank in ranks:
        for form in ("inputs", "bank"):
            model = ir.load(plain)
            add_lora(model, rank, banked=form == "bank")
            there = folder / f"lora{rank}-{form}"
            there.mkdir()
            ir.save(model, there / "model.onnx", external_data="model.onnx.data")


def add_lora(model: Any, rank: int, *, banked: bool) -> None:
    """Give a plain graph LoRA on query and value: y += x·A·B before the bias, A and B as inputs, in place.

    Inputs ``lora_a.<i>`` and ``lora_b.<i>`` of the i-th site, with defaults of rank 0; ``banked``: with a leading side
    of adapters, and ``lora_ids`` int64 [batch].
    """
    import onnx_ir as ir

    from ssh_deploy.graph.emitter import Constants, Emitter
    from ssh_deploy.graph.sites import find_calls

    graph = model.graph
    constants = Constants(graph, "lora")
    calls = [call for call in find_calls(graph) if call.module.endswith(("self.query", "self.value"))]

    def lent(name: str, sides: list[int | str], dtype: Any, default: Any) -> Any:
        value = ir.Value(name=name, shape=ir.Shape(sides), type=ir.TensorType(dtype))
        graph.inputs.append(value)
        value.const_value = ir.tensor(default, name=name)
        graph.register_initializer(value)
        return value

    many: list[int | str] = ["lora_adapters"] if banked else []
    lead = (1,) if banked else ()
    ids = lent("lora_ids", ["lora_requests"], ir.DataType.INT64, np.zeros(1, np.int64)) if banked else None
    for i, call in enumerate(calls):
        a = lent(
            f"lora_a.{i}", [*many, call.inputs, "rank"], ir.DataType.FLOAT, np.zeros((*lead, call.inputs, 0), "f4")
        )
        b = lent(
            f"lora_b.{i}", [*many, "rank", call.outputs], ir.DataType.FLOAT, np.zeros((*lead, 0, call.outputs), "f4")
        )
        emitter = Emitter(constants, f"lora/{i}")
        if ids is not None:
            a, b = emitter.op("Gather", a, ids, axis=0), emitter.op("Gather", b, ids, axis=0)
        term = emitter.op("MatMul", emitter.op("MatMul", call.activation, a), b)
        users = list(call.product.uses())
        total = emitter.op("Add", call.product, term)
        total.shape, total.dtype = call.product.shape, ir.DataType.FLOAT
        graph.insert_after(call.product.producer(), emitter.nodes)
        for node, place in users:
            node.replace_input_with(place, total)
    graph.sort()

"""A decoder's graph from onnxruntime-genai's own builder, its layers under their Hugging Face names.

The builder knows a list of architectures by heart and writes the fastest graph for them: grouped-query attention as one
operator with the rotation inside, fused norms. It runs in a process of its own (it imports its parts by bare names and
prints much), offline, in float32 and with query, key and value in nodes of their own; slots and quantisation are our
passes, the same as for a traced graph. Its names are its own (`/model/layers.0/attn/q_proj/MatMul`), so layers are
recognised by their numbers: a MatMul whose weight is a layer's is that layer, and says so from then on in the metadata
that `sites` reads. A weight that the builder packs or changes is no layer's, and gets no slot.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ssh_deploy.errors import DependencyError, GraphError
from ssh_deploy.graph.kv_cache import CacheShape
from ssh_deploy.graph.sites import SCOPES
from ssh_deploy.graph.trace import Loaded, Traced

PACKAGE = "onnxruntime_genai"
CONFIG = "genai_config.json"
_OPTIONS = ("disable_qkv_fusion=true", "hf_token=false")
_UNKNOWN = "is not currently supported"


def build_decoder(loaded: Loaded, folder: Path, work: Path) -> Traced:
    """Build the graph of a checkpoint.

    Args:
        loaded: its torch model, which names the layers.
        folder: the checkpoint.
        work: an empty folder; the graph keeps its weights there until it is saved, and `CONFIG` lies there.

    Raises:
        DependencyError: onnxruntime-genai is not installed.
        GraphError: the builder does not know the architecture or fails, or its graph is not a decoder with this cache.
    """
    architecture = type(loaded.model).__name__
    if loaded.cache is None:
        raise GraphError(
            f"{folder}: onnxruntime-genai builds decoders, and the task is {loaded.task}.",
            hint="Leave --builder out, or use --task text-generation.",
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise DependencyError(
            "--builder genai needs onnxruntime-genai, which is not installed.", hint="pip install onnxruntime-genai"
        )
    _run_builder(architecture, folder, work)
    model = ir.load(work / "model.onnx")
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    outputs = tuple(str(value.name) for value in model.graph.outputs)
    _check_cache(architecture, loaded.cache, inputs, outputs)
    model.metadata_props.clear()
    name_layers(model, loaded.model)
    embedding = loaded.model.get_output_embeddings()
    named = next((name for name, module in loaded.model.named_modules() if module is embedding), "")
    answers = ("logits", *loaded.cache.outputs)
    return Traced(model, inputs, answers, int(loaded.model.config.hidden_size), (), loaded.cache, named)


def name_layers(model: ir.Model, torch_model: Any) -> list[str]:
    """Write the path of its module into every MatMul of ``model`` that has a module's weight; paths that were found.

    Args:
        model: of the builder.
        torch_model: of transformers, float32.
    """
    layers: dict[tuple[Any, ...], list[str]] = {}
    for path, module in torch_model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and type(module).__name__ != "Embedding":
            array = weight.detach().numpy()
            layers.setdefault(_numbers(array if type(module).__name__ == "Conv1D" else array.T), []).append(path)
    found = []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        paths = layers.get(_numbers(weight.const_value.numpy()), [])
        if paths:
            path = paths.pop(0)  # layers of equal numbers are told apart by their order
            node.metadata_props[SCOPES] = repr(["", "model", f"model.{path}", "linear"])
            found.append(path)
    return found


def _numbers(weight: NDArray[Any]) -> tuple[Any, ...]:
    """Shape and some numbers of a weight [in, out]; no two layers of a trained model share them."""
    rows, cols = weight.shape
    places = np.linspace(0, rows * cols - 1, num=min(64, rows * cols)).astype(np.int64)
    return rows, cols, np.ascontiguousarray(weight[places // cols, places % cols], dtype=np.float32).tobytes()


def _run_builder(architecture: str, folder: Path, work: Path) -> None:
    command = [sys.executable, "-m", f"{PACKAGE}.models.builder", "-i", str(folder), "-o", str(work), "-p", "fp32"]
    command += ["-e", "cpu", "-c", str(work / "cache"), "--extra_options", *_OPTIONS]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)  # noqa: S603 own command
    if done.returncode == 0:
        return
    if _UNKNOWN in done.stderr:
        raise GraphError(
            f"onnxruntime-genai's builder does not know {architecture}.",
            hint="Leave --builder out: the graph is then traced from transformers' own model.",
        )
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
    raise GraphError(
        f"onnxruntime-genai's builder failed on {architecture} ({done.returncode}): {said[-1]:.300}",
        hint="Leave --builder out, or try another release of onnxruntime-genai.",
    )


def _check_cache(architecture: str, cache: CacheShape, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    lacks = sorted({"input_ids", "attention_mask", *cache.inputs} - set(inputs))
    lacks += sorted({"logits", *cache.outputs} - set(outputs))
    strange = sorted(set(inputs) - {"input_ids", "attention_mask", "position_ids", *cache.inputs})
    if lacks or strange:
        raise GraphError(
            f"onnxruntime-genai's graph of {architecture} lacks {', '.join(lacks[:3]) or 'nothing'} and has "
            f"{', '.join(strange[:3]) or 'nothing'} besides: it is no decoder with one KV cache.",
            hint="Leave --builder out.",
        )

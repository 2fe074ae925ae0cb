"""What `bench merge` merges: a bf16 checkpoint of the LLaMA-3.1-8B shape, as many layers as asked for, and adapters.

Numbers are random in one block that all tensors are cut from: time does not depend on them. SSH on query and value
of every layer for us, FourierFT of as many coefficients on the same for PEFT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.file import write_file
from ssh_deploy.checkpoints.index import INDEX
from ssh_deploy.checkpoints.whole import whole_folder
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.jobs.bench_models import make_folder
from ssh_deploy.jobs.progress import Progress, silent

COEFFICIENTS = 1000
_SHARDS = 4  # as the model has
_SMALL = 0.5  # gigabytes below which the layers are an eighth as wide
_STRENGTH = 0.004  # root mean square of ΔW, of weights of 0.02


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticBase:
    """A checkpoint in ``folder``, an SSH ``adapter`` file, a ``peft`` folder, and the SSH deltas by module."""

    gigabytes: float
    folder: Path
    adapter: Path
    peft: Path
    deltas: Mapping[str, SpectralDelta]
    nbytes: int


def build_base(work: Path, gigabytes: float, *, progress: Progress = silent) -> SyntheticBase:
    """Make (or find) a checkpoint of about ``gigabytes`` and its adapters under ``work``.

    Raises:
        OutputError: ``work`` cannot be written, or its disk is too small.
    """
    width = 1 if gigabytes >= _SMALL else 8
    hidden, inner, kv, vocab = 4096 // width, 14336 // width, 1024 // width, 32_000 // width
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    layer = 2 * sum(out * inn for out, inn in shapes.values())
    layers = max(_SHARDS, round((gigabytes * 1e9 - 2 * vocab * hidden) / layer))
    deltas = _deltas(layers, shapes)
    root = work / f"llama-{layers}x{hidden}"
    nbytes = layers * layer + 2 * vocab * hidden
    base = SyntheticBase(gigabytes, root / "base", root / "ssh.safetensors", root / "fourierft", deltas, nbytes)
    if root.is_dir():
        return base
    make_folder(work)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "dtype": "bfloat16",
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32, "vocab_size": vocab,
        "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    }  # fmt: skip
    with whole_folder(root, need=nbytes) as folder:
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text(json.dumps(config, indent=1))
        _write_shards(folder / "base", layers, shapes, vocab, hidden, progress)
        write_file(Adapter("ssh", deltas, {}, "", Path("random"), settings=_SETTINGS), folder / "ssh.safetensors")
        _write_fourierft(folder / "fourierft", deltas)
    return base


_SETTINGS = {"n": COEFFICIENTS, "delta_ratio": 0.0, "seed": 0}


def _deltas(layers: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, SpectralDelta]:
    rng = np.random.default_rng(0)
    found = {}
    alpha = 1000.0
    for i in range(layers):
        for part in ("self_attn.q_proj", "self_attn.v_proj"):
            shape = shapes[part]
            rows, cols = np.divmod(rng.choice(shape[0] * shape[1], COEFFICIENTS, replace=False), shape[1])
            level = _STRENGTH * shape[0] * shape[1] / math.sqrt(COEFFICIENTS) / alpha
            values = (rng.standard_normal(COEFFICIENTS) * level).astype(np.float32)
            values = values.astype(np.float16).astype(np.float32)  # what the file keeps
            places = (rows.astype(np.uint16), cols.astype(np.uint16))
            found[f"model.layers.{i}.{part}"] = SpectralDelta(shape, "hartley", *places, values, alpha, "backward")
    return found


def _write_shards(
    folder: Path, layers: int, shapes: Mapping[str, tuple[int, int]], vocab: int, hidden: int, progress: Progress
) -> None:
    rng = np.random.default_rng(1)
    most = max(vocab * hidden, *(out * inn for out, inn in shapes.values()))
    block = (rng.standard_normal(most + 4096, dtype=np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    norm = np.ones(hidden, ml_dtypes.bfloat16)
    places: dict[str, str] = {}
    for shard, numbers in enumerate(np.array_split(np.arange(layers), _SHARDS)):
        tensors = {}
        for i in numbers.tolist():
            for turn, (part, shape) in enumerate(shapes.items()):
                start = (i * 7 + turn) % 4096  # no two of a kind alike
                size = shape[0] * shape[1]
                tensors[f"model.layers.{i}.{part}.weight"] = block[start : start + size].reshape(shape)
            for part in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{i}.{part}.weight"] = norm
        if shard == 0:
            tensors["model.embed_tokens.weight"] = block[: vocab * hidden].reshape(vocab, hidden)
            tensors["model.norm.weight"] = norm
        name = f"model-{shard + 1:05}-of-{_SHARDS:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        progress("write checkpoint", shard + 1, _SHARDS)
    index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _write_fourierft(folder: Path, deltas: Mapping[str, SpectralDelta]) -> None:
    """As PEFT saves it; read by PEFT alone."""
    folder.mkdir()
    config = {
        "peft_type": "FOURIERFT", "task_type": "CAUSAL_LM", "n_frequency": COEFFICIENTS, "scaling": 150.0,
        "random_loc_seed": 777, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    tensors = {f"base_model.model.{name}.fourierft_spectrum": delta.values for name, delta in deltas.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

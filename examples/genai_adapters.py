"""Adapters of an exported folder in onnxruntime-genai: `og.Adapters` takes our `.onnx_adapter` files as they are.

    ssh-deploy export --onnx BASE NAME=ADAPTER... --builder genai -o out
    python examples/genai_adapters.py out NAME "a prompt"

Nothing of ours is imported. onnxruntime-genai has one adapter per Generator; a batch in which every row has its own is
what `ssh_deploy.Deployment` does, on the same folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime_genai as og


def generate(folder: Path, prompt: str, *, adapter: str | None = None, most: int = 40) -> str:
    """What the model writes after ``prompt``, greedily; ``adapter`` names a file of the folder."""
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    adapters = og.Adapters(model)  # must outlive the generator
    tokens = tokenizer.encode(prompt)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(tokens) + most)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters.load(str(folder / "adapters" / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    written = generator.get_sequence(0)[len(tokens) :]
    del generator
    return str(tokenizer.decode(written))


def main() -> None:
    """Print what the base writes, and what it writes with the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("prompt")
    parser.add_argument("--most", type=int, default=40, help="tokens to write")
    chosen = parser.parse_args()
    for name in (None, chosen.adapter):
        print(f"{name or 'no adapter'}: {generate(chosen.folder, chosen.prompt, adapter=name, most=chosen.most)!r}")


if __name__ == "__main__":
    main()

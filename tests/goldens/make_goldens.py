"""Write the frozen adapter files of the current format version; refuses to touch one that exists.

Run by hand, once per format version: `python tests/goldens/make_goldens.py`. Tests only ever read its output.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ssh_deploy.adapters.file import VERSION, write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.checkpoints.fingerprint import Fingerprint, sample
from ssh_deploy.testing import random_adapter
from ssh_deploy.transforms import reference

HERE = Path(__file__).parent


def main():
    rng = np.random.default_rng(20261121)
    modules = {
        "bert.encoder.layer.0.attention.self.query": (6, 10),
        "bert.encoder.layer.0.attention.self.value": (7, 10),
    }
    head = {"classifier": {"weight": rng.normal(size=(3, 10)).astype("f4"), "bias": rng.normal(size=3).astype("f4")}}
    sites = {"encoder.layer.0.attention.self.query": sample(rng.normal(size=(6, 10)).astype("f4"))}
    expected = {}
    for transform in ("hartley", "hartley-joint", "cosine"):
        adapter = random_adapter(modules, n=8, transform=transform, alpha=24.0, heads=head, base="a-base")
        adapter = replace(
            adapter, task="text-classification", labels=("a", "b", "ü"), fingerprint=Fingerprint("bert", sites)
        )
        for dtype in ("float16", "float32"):
            write_file(adapter, HERE / f"v{VERSION}-{transform}-{dtype}.safetensors", values_dtype=dtype)
        write_folder(adapter, HERE / f"v{VERSION}-{transform}-peft")
        for module, d in adapter.deltas.items():
            for dtype in ("float16", "float32"):
                values = d.values.astype(dtype)
                delta = reference.delta(transform, d.rows, d.cols, values, d.shape, alpha=d.alpha, norm=d.norm)
                expected[f"{transform}/{dtype}/{module}"] = delta
    np.savez(HERE / f"v{VERSION}-expected.npz", **expected)


if __name__ == "__main__":
    main()

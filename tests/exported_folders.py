"""Pico models exported with two adapters each: one with a head of its own, one without."""

import numpy as np

from ssh_deploy.adapters.file import write_file
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.names import match_modules
from ssh_deploy.checkpoints.orientation import site_shape
from ssh_deploy.jobs.exporting import export_model
from ssh_deploy.testing import random_adapter

#: modules adapted (by the end of their path) and head modules with the number of rows of inner ones
SITES = {
    "bert": ("query", "value"),
    "roberta": ("query", "output.dense"),
    "distilbert": ("q_lin", "lin2"),
    "vit": ("q_proj", "fc1"),
    "gpt2": ("c_attn", "attn.c_proj"),
}
HEADS = {
    "bert": {"classifier": 0},
    "roberta": {"classifier.dense": 48, "classifier.out_proj": 0},
    "distilbert": {"pre_classifier": 48, "classifier": 0},
    "vit": {"classifier": 0},
    "gpt2": {"score": 0},
}
TASK = {"vit": "image"}


def head_tensors(architecture, labels, seed):
    """Tensors of a random head of ``labels`` rows."""
    rng = np.random.default_rng(seed)
    heads = {}
    for module, rows in HEADS[architecture].items():
        heads[module] = {"weight": rng.normal(size=(rows or labels, 48)).astype(np.float32)}
        if module != "score":
            heads[module]["bias"] = rng.normal(size=rows or labels).astype(np.float32)
    return heads


def make_adapter(base, architecture, *, labels=0, seed=0, n=40, transform="hartley", sites=None, **fields):
    """A random adapter for a pico model, its spectra strong enough to show in every output."""
    checkpoint = open_checkpoint(base)
    ends = sites or SITES[architecture]
    modules = [m for m in checkpoint.modules() if m.endswith(tuple(ends))]
    if architecture == "vit":  # saved files keep the names of transformers 4, the live model has those of 5
        live = [f"vit.layers.{i}.{p}" for i in (0, 1) for p in ("attention.q_proj", "mlp.fc1")]
        modules = list(match_modules(live, checkpoint.modules(), config=checkpoint.config).values())
    shapes = {m: site_shape(checkpoint, m) for m in modules}
    heads = head_tensors(architecture, labels, seed) if labels else None
    task = "text-classification" if labels and architecture != "vit" else None
    alpha = 1.0 if transform == "cosine" else 60.0
    options = {"task": task, "labels": tuple(f"{architecture}-{i}" for i in range(labels)), **fields}
    return random_adapter(shapes, n=n, transform=transform, alpha=alpha, seed=seed, heads=heads, **options)


def write_adapter(path, *args, values_dtype=np.float16, **options):
    """`make_adapter` as a compact file; returns its path."""
    write_file(make_adapter(*args, **options), path, values_dtype=values_dtype)
    return path


def export_pico(pico, architecture, folder, **options):
    """(base, {name: adapter file}, exported folder)."""
    base = pico(architecture, TASK.get(architecture, "text-classification"))
    files = {
        "headed": write_adapter(folder / "headed.safetensors", base, architecture, labels=5, seed=1),
        "plain": write_adapter(folder / "plain.safetensors", base, architecture, seed=2, n=25),
    }
    export_model(base, [str(path) for path in files.values()], folder / "out", **options)
    return base, files, folder / "out"

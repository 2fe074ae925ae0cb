"""Deployment on what the exporter writes: every architecture, mixed batches against torch with the deltas added."""

import numpy as np
import pytest

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.testing import pico_model, random_adapter

TEXTS = ["free prize now", "what is the question", "good film", "who"]
#: module paths of two kinds of sites, by layer
PLACES = {
    "bert": ("bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.{}.output.dense"),
    "distilbert": ("distilbert.transformer.layer.{}.attention.q_lin", "distilbert.transformer.layer.{}.ffn.lin2"),
    "roberta": ("roberta.encoder.layer.{}.attention.self.value", "roberta.encoder.layer.{}.intermediate.dense"),
}


def torch_model(folder):
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def answer(model, folder, texts, adapter):
    """Logits of torch with the adapter's deltas added and its head put in."""
    import torch
    from transformers import AutoTokenizer

    modules = dict(model.named_modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        if adapter is not None:
            for module, delta in adapter.deltas.items():
                modules[module].weight.add_(delta.dense())
            for module, head in adapter.replaced.items():
                for part, tensor in head.tensors.items():
                    getattr(modules[module], part).copy_(torch.from_numpy(tensor))
        batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
        batch = {k: v for k, v in batch.items() if k != "token_type_ids"}
        logits = model(**batch).logits.numpy().copy()
        model.load_state_dict(before)
    return logits


@pytest.mark.parametrize(
    "architecture",
    [pytest.param("bert"), *(pytest.param(a, marks=pytest.mark.slow) for a in ("distilbert", "roberta"))],
)
def test_mixed_batches_answer_as_torch_does(tmp_path, architecture):
    import torch

    base = pico_model(architecture, tmp_path / "base", task="text-classification")
    model = torch_model(base)
    shapes = {
        path.format(layer): tuple(dict(model.named_modules())[path.format(layer)].weight.shape)
        for path in PLACES[architecture]
        for layer in (0, 1)
    }
    head = {"bert": "classifier", "distilbert": "classifier", "roberta": "classifier.out_proj"}[architecture]
    rng = np.random.default_rng(0)
    heads = {head: {"weight": rng.normal(size=(3, 48)).astype(np.float32), "bias": np.ones(3, np.float32)}}
    adapters = {
        "hartley": random_adapter(shapes, n=30, alpha=400.0, seed=1),
        "joint": random_adapter(
            shapes, n=11, alpha=40.0, seed=2, transform="hartley-joint", heads=heads, task="text-classification"
        ),
        "cosine": random_adapter(dict(list(shapes.items())[:1]), n=25, alpha=20.0, seed=3, transform="cosine"),
    }
    for name, adapter in adapters.items():
        write_file(adapter, tmp_path / f"{name}.safetensors", values_dtype=np.float32)
    given = [str(tmp_path / f"{name}.safetensors") for name in ("hartley", "joint", "cosine")]
    export_model(base, given, tmp_path / "out", options=ExportOptions(adapter_dtype="float32"))
    with Deployment.open(tmp_path / "out", threads=1) as deployment:
        late = random_adapter(shapes, n=50, alpha=400.0, seed=4)
        write_file(late, tmp_path / "late.safetensors", values_dtype=np.float32)
        deployment.load("late", tmp_path / "late.safetensors")  # never seen by the exporter
        everyone = {None: None, **adapters, "late": late}
        names = [*everyone, *reversed(everyone)]
        texts = [TEXTS[i % 4] for i in range(len(names))]
        got = deployment.predict(texts, names)
        with torch.no_grad():
            for name, adapter in everyone.items():
                want = answer(model, base, texts, adapter)
                alone = deployment.predict(texts, name)
                for row, owner in enumerate(names):
                    np.testing.assert_allclose(alone[row].logits, want[row], atol=1e-4)
                    if owner == name:
                        np.testing.assert_allclose(got[row].logits, want[row], atol=1e-4, err_msg=str(name))
        changed = [
            np.abs(answer(model, base, texts, a) - answer(model, base, texts, None)).max() for a in adapters.values()
        ]
        assert min(changed) > 1e-2  # the adapters do something that a wrong answer would miss

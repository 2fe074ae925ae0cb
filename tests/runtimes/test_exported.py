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
    with Deployment.open(tmp_path / "out", threads=1, max_coefficients=50) as deployment:
        late = random_adapter(shapes, n=50, alpha=400.0, seed=4)
        write_file(late, tmp_path / "late.safetensors", values_dtype=np.float32)
        deployment.load("late", tmp_path / "late.safetensors")  # never seen by the exporter
        everyone = {None: None, **adapters, "late": late}
        names = [*everyone, *everyone][:-2]  # not the same backwards
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


def test_other_rows_change_no_bit_of_a_row_with_threads(tmp_path):
    """Whatever stands in the other rows, texts and adapters, with ORT running on several threads."""
    base = pico_model("bert", tmp_path / "base", task="text-classification")
    path = "bert.encoder.layer.{}.attention.self.{}"
    shapes = {path.format(layer, part): (48, 48) for layer in (0, 1) for part in ("query", "value")}
    given = []
    for i, n in enumerate((700, 20, 300)):  # many coefficients on few rows: where a racing sum would show
        write_file(random_adapter(shapes, n=n, alpha=400.0, seed=i), tmp_path / f"a{i}.safetensors")
        given.append(str(tmp_path / f"a{i}.safetensors"))
    export_model(base, given, tmp_path / "out")
    rng = np.random.default_rng(0)
    with Deployment.open(tmp_path / "out", threads=4) as deployment:
        names = [None, "a0", "a1", "a2"]
        for name in names[1:]:
            deployment.load(name)
        feeds = {key: np.ones((6, 12), np.int64) for key in deployment._session.inputs}
        for name in names:
            mine, seen = rng.integers(4, 20, 12), set()
            for _ in range(15):
                feeds["input_ids"] = rng.integers(4, 20, (6, 12))
                feeds["input_ids"][2] = mine
                others = [names[i] for i in rng.integers(0, 4, 6)]
                others[2] = name
                seen.add(deployment.run(feeds, others)["logits"][2].tobytes())
            if name is None:  # a base row among adapters has the bits of a batch without any
                seen.add(deployment.run(feeds)["logits"][2].tobytes())
            assert len(seen) == 1, f"{name}: {len(seen)} different answers to one row"


@pytest.mark.slow
def test_names_that_transformers_changed_are_known_to_add_and_not_to_serving(tmp_path):
    import transformers

    from ssh_deploy.errors import AdapterMismatchError
    from ssh_deploy.jobs.editing import add_adapter

    base = pico_model("vit", tmp_path / "base", task="image")
    named = dict(transformers.AutoModelForImageClassification.from_pretrained(base).named_modules())
    shapes = {path: tuple(m.weight.shape) for path, m in named.items() if path.endswith("attention.q_proj")}
    assert shapes  # transformers 5's name; the checkpoint says attention.attention.query
    for name in ("one", "two"):
        adapter = random_adapter(shapes, n=40, alpha=400.0, seed=len(name) + ord(name[0]))
        write_file(adapter, tmp_path / f"{name}.safetensors")
    export_model(base, [str(tmp_path / "one.safetensors")], tmp_path / "out")
    pixels = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)}
    deployment = Deployment.open(tmp_path / "out")
    with pytest.raises(AdapterMismatchError, match=r"(?s)q_proj.*ssh-deploy add"):
        deployment.load("two", tmp_path / "two.safetensors")
    deployment.close()
    add_adapter(tmp_path / "out", f"same={tmp_path / 'one.safetensors'}")
    add_adapter(tmp_path / "out", f"two={tmp_path / 'two.safetensors'}")
    with Deployment.open(tmp_path / "out", threads=1) as deployment:
        one, same, two, none = (deployment.run(pixels, name)["logits"] for name in ("one", "same", "two", None))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - none).max() > 1e-2
    assert np.abs(one - two).max() > 1e-2

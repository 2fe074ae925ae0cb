"""Deployment: every row with its own adapter, checked against the formula in float64; loads, unloads, refusals."""

import threading

import numpy as np
import pytest
from contract_folder import SITES, add_stored, edit, expected, make_folder, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.checkpoints.fingerprint import Fingerprint, sample
from ssh_deploy.errors import (
    AdapterMismatchError,
    DeploymentError,
    FingerprintError,
    UnknownNameError,
)
from ssh_deploy.runtimes.conversion import rows_of_adapter
from ssh_deploy.testing import random_adapter

TEXTS = ["free prize now", "what is the question", "good film", "who"]


def make_adapter(seed, *, transform="hartley", labels=("p", "q"), n=9, sites=SITES, head=True, **fields):
    rng = np.random.default_rng(100 + seed)
    heads = {
        "classifier": {
            "weight": rng.normal(size=(len(labels), 8)).astype(np.float32),
            "bias": rng.normal(size=len(labels)).astype(np.float32),
        }
    }
    return random_adapter(
        sites,
        n=n,
        seed=seed,
        transform=transform,
        alpha=20.0 if transform != "cosine" else 0.5,
        heads=heads if head else None,
        labels=tuple(labels) if head else (),
        task="text-classification",
        **fields,
    )


def deltas_of(adapter):
    import torch

    return {module.removeprefix("bert."): d.dense(dtype=torch.float64).numpy() for module, d in adapter.deltas.items()}


def want(deployment, text, adapter):
    """Logits and hidden state of one text by the formula."""
    feeds, mask = deployment._tokens().feeds([text])
    head = None
    if adapter is not None and adapter.replaced:
        tensors = adapter.replaced["classifier"].tensors
        head = (tensors["weight"], tensors["bias"])
    elif deployment.folder.labels:
        count = len(deployment.folder.labels)
        head = (weights()["head"][:count], weights()["head_bias"][:count])
    logits, hidden = expected([feeds["input_ids"][0][mask[0]]], {} if adapter is None else deltas_of(adapter), head)
    return (logits[0] if logits else None), hidden[0]


@pytest.fixture
def adapters(tmp_path):
    made = {
        "square": make_adapter(1),
        "joint": make_adapter(2, transform="hartley-joint", labels=("x", "y", "z", "w"), n=5),
        "cosine": make_adapter(3, transform="cosine", labels=("only",)),
        "plain": make_adapter(4, head=False, n=30),
        "partial": make_adapter(5, sites={"bert.layer.value": (8, 10)}),
    }
    for name, adapter in made.items():
        write_file(adapter, tmp_path / f"{name}.safetensors", values_dtype=np.float32)
    return made


def opened(tmp_path, adapters, *, stored=(), **options):
    folder = make_folder(tmp_path / "out", **({"dtype": np.float32, "base_labels": 3} | options))
    if stored:
        with Deployment.open(folder, threads=1) as probe:
            for name in stored:
                rows = rows_of_adapter(adapters[name], probe.folder, probe._session.adapter_inputs)
                flat = {key: array for arrays in rows.values() for key, array in arrays.items()}
                add_stored(folder, name, flat, labels=adapters[name].labels)
    deployment = Deployment.open(folder, threads=1, max_coefficients=64)
    for name in set(adapters) - set(stored):
        deployment.load(name, tmp_path / f"{name}.safetensors")
    return deployment


@pytest.mark.parametrize("required", [False, True])
def test_every_row_answers_with_its_own_adapter_as_the_formula_says(tmp_path, adapters, required):
    deployment = opened(tmp_path, adapters, required=required, stored=("square", "joint"))
    names = [None, *adapters, None, *reversed(adapters)]
    texts = [TEXTS[i % 4] for i in range(len(names))]
    for text, name, got in zip(texts, names, deployment.predict(texts, names), strict=True):
        logits, _ = want(deployment, text, adapters.get(name))
        np.testing.assert_allclose(got.logits, logits, atol=2e-4 * max(1, np.abs(logits).max()), err_msg=str(name))
        own = adapters[name].labels if name else ()
        assert got.labels == (own or ("no", "maybe", "yes"))
        assert got.label == got.labels[int(np.argmax(logits))]
        assert got.score == pytest.approx(np.exp(logits[np.argmax(logits)]) / np.exp(logits).sum(), abs=1e-3)


def test_mixed_and_single_agree(tmp_path, adapters):
    deployment = opened(tmp_path, adapters)
    names = [*adapters, None]
    feeds, _ = deployment._tokens().feeds(["good film"] * len(names))
    mixed = deployment.run(feeds, names)
    for row, name in enumerate(names):
        single = deployment.run(feeds, name)
        for output, array in single.items():
            width = array.shape[-1]
            np.testing.assert_allclose(mixed[output][row][..., :width], array[row], atol=1e-5, err_msg=str(name))
            if output == "logits":
                assert np.all(mixed[output][row][width:] == -np.inf)


def test_threads_are_those_asked_for(tmp_path):
    folder = make_folder(tmp_path / "out")
    for threads in (1, 3):
        options = Deployment.open(folder, threads=threads)._session._session.get_session_options()
        assert options.intra_op_num_threads == threads


def test_no_adapter_is_bit_identical_to_the_plain_run(tmp_path, adapters):
    import onnxruntime as ort

    deployment = opened(tmp_path, adapters)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    plain = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), options)
    feeds, _ = deployment._tokens().feeds(TEXTS)
    ours = deployment.run(feeds, [None] * 4)
    for name, array in zip(["logits", "last_hidden_state"], plain.run(None, feeds), strict=True):
        assert ours[name].tobytes() == array.tobytes()


def test_a_base_without_head_answers_only_with_adapters_that_bring_one(tmp_path, adapters):
    deployment = opened(tmp_path, adapters, base_labels=0)
    assert deployment.predict(["who"], "square")[0].labels == ("p", "q")
    for names in ([None, "square"], [None, None], ["plain", "plain"], ["square", "plain"]):
        with pytest.raises(DeploymentError, match=r"Row [01] asks for .*base tiny has no classification head"):
            deployment.predict(["who", "who"], names)
    feeds, _ = deployment._tokens().feeds(["who", "free"])
    assert deployment.run(feeds)["logits"].shape == (2, 0)
    with pytest.raises(DeploymentError, match="no classification head"):
        deployment.run(feeds, [None, "square"])
    hidden = deployment.run(feeds, [None, "square"], outputs=["last_hidden_state"])["last_hidden_state"]
    np.testing.assert_allclose(hidden[0][:3], want(deployment, "who", None)[1], atol=1e-5)
    np.testing.assert_allclose(hidden[1][:3], want(deployment, "free", adapters["square"])[1], atol=1e-3)


def test_feature_extraction_gives_hidden_rows_cut_to_their_length(tmp_path, adapters):
    deployment = opened(tmp_path, adapters, task="feature-extraction", base_labels=0)
    rows = deployment.predict(TEXTS, [None, "square", "cosine", "plain"])
    for text, name, got in zip(TEXTS, [None, "square", "cosine", "plain"], rows, strict=True):
        _, hidden = want(deployment, text, adapters.get(name))
        assert got.shape == hidden.shape
        np.testing.assert_allclose(got, hidden, atol=1e-3)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_other_rows_change_no_bit_of_a_row(mixed_deployment, data):
    names = st.sampled_from(["square", "joint", "cosine", "plain", "partial", None])
    ids = st.lists(st.integers(0, 20), min_size=6, max_size=6)
    mine, mine_name = data.draw(ids), data.draw(names)

    def answer():
        rows = [mine, data.draw(ids), data.draw(ids)]
        feeds = {"input_ids": np.array(rows), "attention_mask": np.ones((3, 6), np.int64)}
        hidden = mixed_deployment.run(
            feeds, [mine_name, data.draw(names), data.draw(names)], outputs=["last_hidden_state"]
        )
        return hidden["last_hidden_state"][0]

    assert answer().tobytes() == answer().tobytes()


@pytest.fixture(scope="module")
def mixed_deployment(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed")
    made = {
        "square": make_adapter(1),
        "joint": make_adapter(2, transform="hartley-joint", n=5),
        "cosine": make_adapter(3, transform="cosine"),
        "plain": make_adapter(4, head=False, n=30),
        "partial": make_adapter(5, sites={"bert.layer.value": (8, 10)}),
    }
    for name, adapter in made.items():
        write_file(adapter, path / f"{name}.safetensors")
    return opened(path, made)


def test_lazy_loading_states_and_unloading(tmp_path, adapters):
    deployment = opened(tmp_path, adapters, stored=("square", "joint"))
    states = {name: entry.state for name, entry in deployment.adapters.items()}
    assert (states["square"], states["joint"], states["plain"]) == ("stored", "stored", "resident")
    deployment.predict(["who"], "square")
    assert deployment.adapters["square"].state == "resident"
    deployment.unload("square")
    assert deployment.adapters["square"].state == "unloaded"
    with pytest.raises(UnknownNameError, match=r"(?s)square was unloaded.*brings it back"):
        deployment.predict(["who"], "square")
    deployment.load("square")
    assert deployment.predict(["who"], "square")[0].labels == ("p", "q")
    with pytest.raises(UnknownNameError, match="Did you mean square"):
        deployment.predict(["who"], "sqare")
    deployment.unload("plain")
    with pytest.raises(UnknownNameError, match="no adapter 'plain'"):
        deployment.predict(["who"], ["plain"])
    with pytest.raises(UnknownNameError, match=r"(?s)joint is not loaded"):
        deployment.unload("joint")


def test_unknown_names_list_near_misses_and_paths_are_refused(tmp_path, adapters):
    deployment = opened(tmp_path, adapters)
    with pytest.raises(UnknownNameError, match=r"(?s)no adapter 'sqare'.*Did you mean square"):
        deployment.predict(["who"], "sqare")
    for name in ("../square", "a/b", "", ".", "..", "x" * 129, "a b", "ä", str(tmp_path / "square.safetensors")):
        with pytest.raises(UnknownNameError, match=r"(?s)is not the name of an adapter"):
            deployment.predict(["who"], [name])
        with pytest.raises(UnknownNameError, match="is not the name"):
            deployment.load(name, tmp_path / "square.safetensors")


def test_a_name_means_one_content(tmp_path, adapters):
    deployment = opened(tmp_path, adapters, stored=("square",))
    deployment.load("joint", tmp_path / "joint.safetensors")  # the same again: nothing happens
    with pytest.raises(DeploymentError, match=r"(?s)square is the folder's own.*another name"):
        deployment.load("square", tmp_path / "plain.safetensors")
    with pytest.raises(UnknownNameError, match="no adapter 'nobody'"):
        deployment.load("nobody")
    assert deployment.load("joint", tmp_path / "plain.safetensors").labels == ("no", "maybe", "yes")


def test_a_peft_folder_without_shapes_loads_too(tmp_path, adapters):
    import json

    deployment = opened(tmp_path, {})
    write_folder(adapters["partial"], tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    fields = json.loads(config.read_text())
    del fields["module_shapes"]
    config.write_text(json.dumps(fields))
    deployment.load("peft", tmp_path / "peft")
    logits, _ = want(deployment, "who", adapters["partial"])
    np.testing.assert_allclose(deployment.predict(["who"], "peft")[0].logits, logits, atol=1e-3)


def test_float16_graph_takes_float32_files_and_refuses_what_overflows(tmp_path, adapters):
    deployment = opened(tmp_path, adapters, dtype=np.float16)
    logits, _ = want(deployment, "who", adapters["square"])
    np.testing.assert_allclose(deployment.predict(["who"], "square")[0].logits, logits, atol=2e-2)
    big = make_adapter(9)
    big.deltas["layer.query"].values[0] = 1e6
    write_file(big, tmp_path / "big.safetensors", values_dtype=np.float32)
    with pytest.raises(AdapterMismatchError, match=r"(?s)overflow float16.*--adapter-dtype float32"):
        deployment.load("big", tmp_path / "big.safetensors")


def test_modules_shapes_kinds_and_heads_that_do_not_fit(tmp_path):
    deployment = opened(tmp_path, {}, kinds={"hartley": "adapter_"})

    def refused(adapter, pattern):
        write_file(adapter, tmp_path / "x.safetensors", overwrite=True)
        with pytest.raises(AdapterMismatchError, match=f"(?s){pattern}"):
            deployment.load("x", tmp_path / "x.safetensors")
        assert "x" not in deployment.adapters

    refused(
        make_adapter(1, sites={"layer.query": (10, 12), "layer.kwery": (8, 10)}),
        r"kwery.*Did you mean layer\..*ssh-deploy add .*--sites",
    )
    refused(
        make_adapter(1, sites={"layer.query": (12, 10)}),
        r"layer.query is for a weight of \[12, 10\], the graph's is \[10, 12\]",
    )
    refused(
        make_adapter(1, transform="cosine"), "cosine slot; the graph has hartley, head.*--kinds hartley,head,cosine"
    )
    other = random_adapter(SITES, heads={"score": {"weight": np.ones((2, 8), np.float32)}})
    refused(other, "trained 'score' whole")
    wide = random_adapter(SITES, heads={"classifier": {"weight": np.ones((2, 9), np.float32)}})
    refused(wide, r"classifier is \[2, 9\], the graph takes \[labels, 8\]")
    labels = make_adapter(1)
    refused(
        random_adapter(SITES, heads={"classifier": labels.replaced["classifier"].tensors}, labels=("a",)), "1 labels"
    )


def test_a_folder_without_slots_answers_as_the_base_and_takes_no_adapter(tmp_path, adapters):
    """What a plain or a merged export is."""
    folder = make_folder(tmp_path / "out", kinds={}, base_labels=3)
    stored = make_folder(tmp_path / "other", base_labels=3)
    with Deployment.open(folder) as deployment, Deployment.open(stored) as sidecar:
        got = deployment.predict(TEXTS)
        assert [p.label for p in got] == [p.label for p in sidecar.predict(TEXTS)]
        with pytest.raises(AdapterMismatchError, match=r"(?s)exported without slots.*--mode sidecar"):
            deployment.load("square", tmp_path / "square.safetensors")


def test_too_wide_an_adapter_is_refused_with_both_numbers(tmp_path, adapters):
    deployment = Deployment.open(make_folder(tmp_path / "out"), max_coefficients=8)
    with pytest.raises(AdapterMismatchError, match=r"(?s)30 adapter_coefficients.*holds 8.*max_coefficients=30"):
        deployment.load("plain", tmp_path / "plain.safetensors")


def test_fingerprints(tmp_path, adapters):
    from dataclasses import replace

    from safetensors.numpy import save_file

    folder = make_folder(tmp_path / "out")
    base = Fingerprint("bert", {site: sample(weights()[site]) for site in SITES})
    save_file(
        {site: s.values for site, s in base.sites.items()},
        folder / "fingerprint.safetensors",
        metadata={
            "architecture": "bert",
            "sites": __import__("json").dumps({site: list(s.shape) for site, s in base.sites.items()}),
        },
    )
    edit(folder, lambda fields: fields.update(fingerprint=base.sha256))
    deployment = Deployment.open(folder)
    write_file(replace(adapters["square"], fingerprint=base), tmp_path / "good.safetensors")
    other = Fingerprint("bert", {site: sample(weights(7)[site]) for site in SITES})
    write_file(replace(adapters["square"], fingerprint=other), tmp_path / "bad.safetensors")
    assert deployment.load("good", tmp_path / "good.safetensors").verified is True
    assert deployment.load("unknown", tmp_path / "plain.safetensors").verified is False
    with pytest.raises(FingerprintError, match=r"(?s)made for another base than tiny: layer.query differs"):
        deployment.load("bad", tmp_path / "bad.safetensors")
    edit(folder, lambda fields: fields.update(fingerprint="1" * 64))
    with pytest.raises(DeploymentError, match="do not have the sha256"):
        Deployment.open(folder).load("good", tmp_path / "good.safetensors")


def test_arguments_that_mean_nothing(tmp_path, adapters):
    deployment = opened(tmp_path, adapters)
    with pytest.raises(DeploymentError, match="2 adapters for 1 rows"):
        deployment.predict(["who"], ["square", "square"])
    with pytest.raises(DeploymentError, match="a list of texts"):
        deployment.predict("who")
    assert deployment.predict([]) == []
    feeds, _ = deployment._tokens().feeds(["who"])
    with pytest.raises(DeploymentError, match=r"(?s)takes input_ids, attention_mask.*never as feeds"):
        deployment.run({**feeds, "adapter_ids": np.zeros(1, np.int64)})
    with pytest.raises(DeploymentError, match="Feed all of them"):
        deployment.run({"input_ids": feeds["input_ids"]})
    with pytest.raises(DeploymentError, match="First sides"):
        deployment.run({**feeds, "attention_mask": np.ones((2, 3), np.int64)})
    with pytest.raises(DeploymentError, match="ONNX Runtime refused the run"):
        deployment.run({name: array.astype(np.float32) for name, array in feeds.items()})
    with pytest.raises(DeploymentError, match="ONNX Runtime refused the run"):
        deployment.run(feeds, outputs=["nothing"])


def test_nan_logits_are_no_answer(tmp_path, adapters):
    bad = make_adapter(1)
    bad.replaced["classifier"].tensors["weight"][:] = 3e38
    write_file(bad, tmp_path / "bad.safetensors")
    deployment = opened(tmp_path, {})
    deployment.load("bad", tmp_path / "bad.safetensors")
    with pytest.raises(DeploymentError, match="bad answered"):
        deployment.predict(["who"], "bad")


def test_a_closed_deployment_refuses(tmp_path, adapters):
    with opened(tmp_path, adapters) as deployment:
        feeds, _ = deployment._tokens().feeds(["who"])
    for call in (
        lambda: deployment.predict(["who"], "square"),
        lambda: deployment.run(feeds),
        lambda: deployment.load("square"),
        lambda: deployment.unload("square"),
    ):
        with pytest.raises(DeploymentError, match="was closed"):
            call()


def test_threads_that_load_and_unload_never_mix_answers(tmp_path, adapters):
    """Readers check every answer against the known ones while writers churn the banks for two seconds."""
    churned = {f"churn{i}": make_adapter(20 + i, n=5 + 7 * i) for i in range(4)}
    for name, adapter in churned.items():
        write_file(adapter, tmp_path / f"{name}.safetensors", values_dtype=np.float32)
    deployment = opened(tmp_path, adapters | churned)
    feeds, _ = deployment._tokens().feeds(["good film"] * 3)
    known = {name: deployment.run(feeds, name)["last_hidden_state"][0] for name in [*adapters, *churned, None]}
    stop, wrong, counts = threading.Event(), [], {"reads": 0, "writes": 0, "gone": 0}

    def write(name):
        while not stop.is_set():
            deployment.unload(name)
            deployment.load(name, tmp_path / f"{name}.safetensors")
            counts["writes"] += 1

    def read(seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            names = [list(known)[i] for i in rng.integers(0, len(known), 3)]
            try:
                rows = deployment.run(feeds, names, outputs=["last_hidden_state"])["last_hidden_state"]
            except UnknownNameError:
                counts["gone"] += 1
                continue
            counts["reads"] += 1
            wrong.extend(n for n, row in zip(names, rows, strict=True) if np.abs(row - known[n]).max() > 1e-5)

    threads = [threading.Thread(target=write, args=(name,)) for name in churned]
    threads += [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    stop.wait(2.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert counts["reads"] > 20
    assert counts["writes"] > 5

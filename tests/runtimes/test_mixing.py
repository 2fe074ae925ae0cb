"""Every row its own, on a graph of the exporter's: mixed batches against single runs, no bit from the neighbours."""

import numpy as np
import pytest
from contract_folder import write_onnx_adapter
from exported_folders import make_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.jobs.exporting import export_model

NAMES = ("wide", "narrow", "joint", "cosine", "headonly", "wide+0.5*cosine@head=wide", "narrow+-2*joint@head=cosine")
BARE = ("plain", "partial", "plain+0.5*partial", None)
ROWS, TOKENS = 4, 8


@pytest.fixture(scope="module")
def deployment(pico, tmp_path_factory):
    """A base without a head; adapters of every family, of different n, sites and label counts; ORT on two threads."""
    work = tmp_path_factory.mktemp("mixing")
    base = pico("bert")
    made = {
        "wide": make_adapter(base, "bert", labels=5, seed=1, n=300),
        "narrow": make_adapter(base, "bert", labels=2, seed=2, n=7),
        "joint": make_adapter(base, "bert", labels=3, seed=3, n=20, transform="hartley-joint"),
        "cosine": make_adapter(base, "bert", labels=1, seed=4, n=60, transform="cosine"),
        "plain": make_adapter(base, "bert", seed=6, n=100),
        "partial": make_adapter(base, "bert", seed=7, n=50, sites=("value",)),
    }
    for name, adapter in made.items():
        write_file(adapter, work / f"{name}.safetensors")
    given = [str(work / f"{name}.safetensors") for name in ("wide", "cosine")]
    export_model(base, given, work / "out")
    with Deployment.open(work / "out", threads=2, max_coefficients=400, max_labels=80, memory="16MiB") as opened:
        for name in made:
            opened.load(name, None if name in ("wide", "cosine") else work / f"{name}.safetensors")
        rng = np.random.default_rng(5)
        head = {
            "adapter_head.classifier.weight": rng.normal(size=(70, 48)).astype(np.float32),
            "adapter_head.classifier.bias": rng.normal(size=70).astype(np.float32),
        }
        opened.load("headonly", write_onnx_adapter(work / "h.onnx_adapter", head, guard=opened.folder.guard))
        yield opened


def feeds(rng):
    ids = rng.integers(4, 24, (ROWS, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def run(deployment, batch, names):
    return deployment.run({name: batch[name] for name in deployment.inputs}, names)


def labels_of(deployment, name):
    head = name.rpartition("@head=")[2] if "@" in name else name
    return len(deployment.adapters[head].labels)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), row=st.integers(0, ROWS - 1), mine=st.sampled_from(NAMES), data=st.data())
def test_other_rows_change_no_bit_of_a_row(deployment, seed, row, mine, data):
    """Shapes fixed: other texts and other adapters in the other rows, also the same adapter in all."""
    rng = np.random.default_rng(seed)
    text, seen = feeds(rng)["input_ids"][row], set()
    for _ in range(4):
        batch = feeds(rng)
        batch["input_ids"][row] = text
        names = [data.draw(st.sampled_from(NAMES)) for _ in range(ROWS)]
        if data.draw(st.booleans()):
            names = [mine] * ROWS
        names[row] = mine
        answers = run(deployment, batch, names)
        seen.add(
            (
                answers["logits"][row][: labels_of(deployment, mine)].tobytes(),
                answers["last_hidden_state"][row].tobytes(),
            )
        )
    assert len(seen) == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), row=st.integers(0, ROWS - 1), mine=st.sampled_from(BARE), data=st.data())
def test_nor_do_they_among_adapters_without_heads_and_the_base(deployment, seed, row, mine, data):
    rng = np.random.default_rng(seed)
    text, seen = feeds(rng)["input_ids"][row], set()
    for _ in range(4):
        batch = feeds(rng)
        batch["input_ids"][row] = text
        names = [data.draw(st.sampled_from(BARE)) for _ in range(ROWS)]
        names[row] = mine
        seen.add(run(deployment, batch, names)["last_hidden_state"][row].tobytes())
    assert len(seen) == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), names=st.lists(st.sampled_from(NAMES), min_size=ROWS, max_size=ROWS))
def test_mixed_rows_are_single_runs(deployment, seed, names):
    batch = feeds(np.random.default_rng(seed))
    mixed = run(deployment, batch, names)
    assert mixed["logits"].shape[1] == max(labels_of(deployment, name) for name in names)
    for row, name in enumerate(names):
        alone = run(deployment, {key: array[row : row + 1] for key, array in batch.items()}, name)
        count = labels_of(deployment, name)
        assert alone["logits"].shape == (1, count)
        for got, want in (
            (mixed["logits"][row][:count], alone["logits"][0]),
            (mixed["last_hidden_state"][row], alone["last_hidden_state"][0]),
        ):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, np.abs(want).max()))
        assert (mixed["logits"][row][count:] == -np.inf).all()


def test_the_adapters_differ(deployment):
    """Else the tests above prove nothing."""
    batch = feeds(np.random.default_rng(0))
    hidden = [run(deployment, batch, name)["last_hidden_state"] for name in (*NAMES, *BARE) if name != "headonly"]
    for i, one in enumerate(hidden):
        assert all(np.abs(one - other).max() > 1e-2 for other in hidden[:i])

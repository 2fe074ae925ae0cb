"""What `bench bank` measures: peers that answer rightly, files that differ, checks that would stop a wrong run."""

import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.errors import DeploymentError, OutputError, UnknownNameError, VerificationError
from ssh_deploy.jobs import bench_bank as bank_module
from ssh_deploy.jobs.bench_bank import BankOptions, check_answers, measure_bank
from ssh_deploy.jobs.bench_models import adapter_files, add_lora, build_models, lora_arrays
from ssh_deploy.runtimes.deployment import Deployment
from ssh_deploy.runtimes.folder import open_folder
from ssh_deploy.runtimes.session import Session


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def models(work):
    return build_models(work, "pico")


def feeds(rows=3, tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(5, 900, (rows, tokens)),
        "attention_mask": np.ones((rows, tokens), np.int64),
        "token_type_ids": np.zeros((rows, tokens), np.int64),
    }


def given_to(model, arrays):
    return {name: arrays[name] for name in model.inputs}


def test_graphs_are_made_once(work, models):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert build_models(work, "pico") == models
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("rank", [8, 16])
def test_lora_peers_are_the_plain_model_with_the_product_in_its_weights(models, tmp_path, rank):
    """x·A·B beside W is W + A·B: the plain graph with that put into its weights, for every row's own A and B."""
    bank = lora_arrays("pico", rank, "bank")
    session = Session(models.lora[rank, "bank"])
    arrays = given_to(session, feeds())
    mixed = session.run({**arrays, **bank, "lora_ids": np.array([4, 0, 4])})
    for row, adapter in enumerate([4, 0, 4]):
        own = {name: array[adapter] for name, array in bank.items()}
        plain = ir.load(models.plain)
        from ssh_deploy.graph.sites import find_calls

        calls = [c for c in find_calls(plain.graph) if c.module.endswith(("self.query", "self.value"))]
        assert len(calls) == 4
        for i, call in enumerate(calls):
            weight = call.nodes[0].inputs[1]
            total = weight.const_value.numpy() + own[f"lora_a.{i}"] @ own[f"lora_b.{i}"]
            weight.const_value = ir.tensor(total.astype(np.float32), name=weight.name)
        ir.save(plain, tmp_path / f"{row}.onnx", external_data=f"{row}.data")
        want = Session(tmp_path / f"{row}.onnx").run({k: v[row : row + 1] for k, v in arrays.items()})
        alone = Session(models.lora[rank, "inputs"]).run({**{k: v[row : row + 1] for k, v in arrays.items()}, **own})
        for key, value in want.items():
            np.testing.assert_allclose(mixed[key][row], value[0], atol=2e-5)
            np.testing.assert_allclose(alone[key], value, atol=2e-5)


def test_lora_peers_without_an_adapter_are_the_plain_model(models):
    plain = Session(models.plain)
    arrays = given_to(plain, feeds())
    for path in models.lora.values():
        for key, value in Session(path).run(arrays).items():
            np.testing.assert_allclose(value, plain.run(arrays)[key], atol=1e-6)


def test_lora_has_two_inputs_a_site():
    for banked, extra in ((True, 1), (False, 0)):
        model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="empty"), ir_version=10)
        add_lora(model, 8, banked=banked)
        assert len(model.graph.inputs) == extra


def test_adapter_files_differ_fit_and_are_kept(work, models):
    folder = open_folder(models.slots)
    files = adapter_files(work, folder, 5)
    stamps = [path.stat().st_mtime_ns for path in files]
    assert [p.stat().st_mtime_ns for p in adapter_files(work, folder, 5)] == stamps
    read = [read_adapter(path) for path in files]
    assert len({one.digest for one in read}) == 5
    assert all(len(one.deltas) == 4 and one.parameters == 4 * 750 for one in read)
    assert all(delta.values.dtype == np.float16 for one in read for delta in one.deltas.values())
    with Deployment.open(models.slots) as deployment:
        entry = deployment.load("a", files[0])
        assert entry.verified


def opened(models, work, **options):
    deployment = Deployment.open(models.slots, **options)
    for i, path in enumerate(adapter_files(work, deployment.folder, 3)):
        deployment.load(f"a{i}", path)
    return deployment


def test_right_answers_pass(models, work):
    plain = Session(models.plain)
    check_answers(plain, opened(models, work), given_to(plain, feeds()), ["a0", "a1", "a2"])


class Wrong:
    """A deployment that errs in one way."""

    def __init__(self, deployment, err):
        self.deployment, self.err = deployment, err

    def run(self, feeds, adapters=None):
        return self.err(self.deployment, feeds, adapters)


def nearly(deployment, feeds, adapters):
    answer = deployment.run(feeds, adapters)
    return {k: np.nextafter(v, 9) if adapters is None else v for k, v in answer.items()}


def swapped(deployment, feeds, adapters):
    return deployment.run(feeds, adapters[::-1] if isinstance(adapters, list) else adapters)


def deaf(deployment, feeds, adapters):
    return deployment.run(feeds)


@pytest.mark.parametrize(
    ("err", "said"), [(nearly, "no adapter is not"), (swapped, "row 0 is not"), (deaf, "answers as the base")]
)
def test_wrong_answers_are_never_timed(models, work, err, said):
    plain = Session(models.plain)
    wrong = Wrong(opened(models, work), err)
    with pytest.raises(VerificationError, match=said):
        check_answers(plain, wrong, given_to(plain, feeds()), ["a0", "a1", "a2"])


def test_a_wrong_peer_is_never_timed(models, work, monkeypatch):
    run = Session.run

    def first_row_of_all(self, feeds, outputs=None):
        if "lora_ids" in feeds:
            feeds = {**feeds, "lora_ids": np.zeros_like(feeds["lora_ids"])}
        return run(self, feeds, outputs)

    monkeypatch.setattr(Session, "run", first_row_of_all)
    options = BankOptions(shapes=("pico",), batches=((2, 4),), parts=("lora",), seconds=0.1)
    with pytest.raises(VerificationError, match="peer's bank"):
        measure_bank(work, options=options)


def test_a_peer_without_effect_is_never_timed(work, monkeypatch):
    nothing = {name: np.zeros_like(array) for name, array in lora_arrays("pico", 8, "bank").items()}
    monkeypatch.setattr(
        bank_module, "lora_arrays", lambda shape, rank, form: lora_arrays(shape, rank, form) if rank != 8 else (
            nothing if form == "bank" else {name: array[0] for name, array in nothing.items()}
        ),
    )  # fmt: skip
    options = BankOptions(shapes=("pico",), batches=((2, 4),), parts=("lora",), seconds=0.1)
    with pytest.raises(VerificationError, match="answers as the base"):
        measure_bank(work, options=options)


def test_a_shape_that_is_none_is_refused_before_anything_is_measured(work):
    told = []
    with pytest.raises(UnknownNameError, match="nope"):
        measure_bank(work, options=BankOptions(shapes=("pico", "nope")), grown=told.append)
    assert not told


def test_a_place_for_adapters_that_cannot_be_made(tmp_path, models):
    folder = open_folder(models.slots)
    (tmp_path / "adapters-48-4").write_text("")
    with pytest.raises(OutputError, match="adapters-48-4"):
        adapter_files(tmp_path, folder, 1)


def test_every_deployment_meets_every_plain_session():
    class Counting:
        def __init__(self, name, met):
            self.name, self.met = name, met

        def run(self, feeds, adapters=None):
            self.met.append((self.name, adapters))

    met, other = [], []
    base = bank_module._plain([Counting(i, met) for i in range(3)], {})
    ours = bank_module._adapted([Counting(i, other) for i in range(3)], {}, ["a", "b"])
    for i in range(18):
        base(i)
        ours(i)
    assert len({(a, b) for (a, _), (b, _) in zip(met, other, strict=True)}) == 9
    assert [name for _, name in other] == ["a", "b"] * 9


def test_unknown_shape_lists_the_near_ones(work):
    with pytest.raises(UnknownNameError, match="bert-base"):
        build_models(work, "bert-bse")


def test_a_budget_below_the_batch_is_refused(work):
    with pytest.raises(DeploymentError, match=r"budget of 4 adapters.*batches of 8"):
        measure_bank(work, options=BankOptions(shapes=("pico",), batches=((8, 4),), budget=4, few=2))


def test_parts_alone_fill_their_part_of_the_summary(work):
    options = BankOptions(
        shapes=("pico",), batches=((1, 4), (3, 4)), resident=(1, 6), parts=("resident", "swap"), seconds=0.1, many=9,
        sessions=1, budget=4, few=2,
    )  # fmt: skip
    told = []
    found = measure_bank(work, options=options, grown=lambda bench: told.append(dict(bench.summary)))
    assert [sorted(one) for one in told] == [["bytes_per_adapter", "ratio_6_vs_1"], sorted(found.summary)]
    found.write(work / "out.json")
    assert json.loads((work / "out.json").read_text())["summary"] == found.summary
    assert set(found.summary) == {"ratio_6_vs_1", "bytes_per_adapter", "swap_ms"}
    assert found.summary["bytes_per_adapter"] == 4 * (751 * 4 + 4 + 2 * 25 * 2)
    rows = {row["variant"]: row for row in found.results}
    assert rows["resident_6"]["bank_bytes"] == 6 * found.summary["bytes_per_adapter"]
    assert rows["resident_1"]["resident"] == 1


def test_names_of_a_batch_differ_where_there_are_enough():
    rng = np.random.default_rng(0)
    assert len(set(bank_module._draw(rng, 100, 8))) == 8
    assert set(bank_module._draw(rng, 1, 8)) == {"a00000"}


def test_the_peer_graphs_are_stock_onnx(models):
    for path in (models.plain, *models.lora.values()):
        nodes = ir.load(path).graph
        assert {node.domain for node in nodes} == {""}
        assert ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

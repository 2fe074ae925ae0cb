"""What `bench decode` measures: every part, on answers that were checked; wrong ones are never timed."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from ssh_deploy import Deployment
from ssh_deploy.cli.main import main
from ssh_deploy.errors import DeploymentError, UnknownNameError, VerificationError
from ssh_deploy.jobs import decode_rows
from ssh_deploy.jobs.bench_decode import DecodeOptions, measure_decode, peak_bytes
from ssh_deploy.jobs.decode_rows import Rows, check_rows, run_on
from ssh_deploy.jobs.decoder_models import find_decoders
from ssh_deploy.jobs.reopening import Openings

HEADLINES = {
    "on_f32", "on_all7_f32", "off_f32", "mixed8_on_f32", "mixed8_speedup", "prefill_on_f32", "lora16_f32",
    "mixed8_lora16_f32", "rss_ratio", "peft_speedup",
}  # fmt: skip
QUICK = DecodeOptions(shape="pico", seconds=0.1, sessions=1, openings=1, context=4, prompt=8)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench-decode")


@pytest.fixture(scope="module")
def quick(work):
    out = work / "out.json"
    words = ["bench", "decode", "--quick", "--precision", "f32", "--work", str(work), "--out", str(out), "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    return found


@pytest.fixture(scope="module")
def models(quick, work):
    return find_decoders(work, base=None, shape="pico")


@pytest.mark.slow
def test_quick_prints_the_form_that_every_bench_speaks(quick):
    assert quick["bench"] == "decode"
    assert quick["machine"]["versions"]["onnxruntime"]
    assert set(quick["summary"]) == HEADLINES
    assert all(math.isfinite(value) and value > 0 for value in quick["summary"].values())


@pytest.mark.slow
def test_every_figure_of_the_summary_is_a_row_of_the_results(quick):
    rows = {(row["variant"], row["rows"]): row for row in quick["results"]}
    summary = quick["summary"]
    assert summary["on_f32"] == rows["on", 1]["ratio"]
    assert summary["off_f32"] == rows["off", 1]["ratio"]
    assert summary["mixed8_on_f32"] == rows["on", 8]["ratio"]
    assert summary["on_all7_f32"] == rows["on_all7", 1]["ratio"]
    assert summary["lora16_f32"] == rows["on_lora", 1]["ratio"]
    assert summary["peft_speedup"] == rows["peft", 1]["ratio"]
    assert summary["mixed8_speedup"] == pytest.approx(8 / rows["together", 8]["ratio"], abs=1e-3)
    assert summary["rss_ratio"] == pytest.approx(
        rows["memory_on", 8]["peak_mb"] / rows["memory_base", 8]["peak_mb"], abs=1e-3
    )
    assert rows["on", 8]["tokens_per_s"] == pytest.approx(8000 / rows["on", 8]["ms"], rel=1e-3)
    assert rows["read_on", 1]["tokens_per_s"] == pytest.approx(8000 / rows["read_on", 1]["ms"], rel=1e-3)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in quick["results"] if "ratio" in row)


@pytest.mark.slow
def test_what_is_timed_is_one_token_of_each_row_at_the_same_length(models, monkeypatch):
    """Before: prompts read and two tokens or more; then one run of [rows, 1]. Reading: one run of [rows, prompt]."""
    from ssh_deploy.runtimes.session import Session

    shapes = []
    run = Session.run_kept
    monkeypatch.setattr(
        Session,
        "run_kept",
        lambda self, feeds, *a, **k: shapes.append(feeds["input_ids"].shape) or run(self, feeds, *a, **k),
    )
    monkeypatch.setattr(decode_rows, "spun_down", lambda variant, i: variant(i))
    with Deployment.open(models.folder("plain"), threads=1) as deployment:
        rows = Rows([deployment], [None] * 3, 4)
        rows.ready_to_decode(0)
        assert shapes == [(3, 4), (3, 1)]
        rows.step(0)
        assert shapes[2:] == [(3, 1)]
        rows.ready_to_read(1)
        assert shapes[3:] == [(3, 4)]
        rows.step(1)
        assert shapes[4:] == [(3, 4)]


class Turn:
    """A deployment, and its own generator, that notes when rows begin on it and when it is closed."""

    def __init__(self, name, met):
        self.name, self.met = name, met

    def generator(self, rows):
        self.met.append(self.name)
        return self

    def submit(self, *_, **__):
        pass

    def close(self):
        pass


def test_deployments_take_turns_and_meet():
    met = {stride: [] for stride in (1, 2)}
    for stride, names in met.items():
        rows = Rows([Turn(i, names) for i in range(3)], [None], 4, stride)
        for i in range(9):
            rows.fill(i)
    assert len(set(zip(met[1], met[2], strict=True))) == 9


def test_rows_let_go_before_their_deployments_are_closed():
    told = []

    def opens(stack, form):
        stack.callback(told.append, f"{form} closed")
        return Turn(form, [])

    with Openings(opens, 1) as openings:
        rows = run_on(openings, "qv", ["a"], 4)
        rows.fill(0)
        rows._generator.close = lambda: told.append("rows let go")
    assert told == ["rows let go", "qv closed"]


class Wrong:
    """A deployment that errs in one way."""

    def __init__(self, deployment, err):
        self.deployment, self.err, self.folder, self.inputs = deployment, err, deployment.folder, deployment.inputs

    def run(self, feeds, adapters=None, *, outputs=None):
        return {"logits": self.err(self.deployment, feeds, adapters)["logits"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("err", "said"),
    [
        (lambda d, f, a: {"logits": np.nextafter(d.run(f, a)["logits"], np.float32(9))}, "no adapter is not"),
        (lambda d, f, a: d.run(f, a[::-1] if isinstance(a, list) else a), "row 0 is not"),
        (lambda d, f, a: d.run(f), "answers as the base"),
        (lambda d, f, a: d.run(f, a), None),
    ],
)
def test_wrong_answers_are_never_timed(models, err, said):
    with (
        Deployment.open(models.folder("plain"), threads=1) as plain,
        Deployment.open(models.folder("qv"), threads=1, max_coefficients=750) as ours,
    ):
        names = ["a0", "a1", "a2"]
        for name, path in zip(names, models.adapters("qv", "f32", 3), strict=True):
            ours.load(name, path)
        rows = {
            "base": Rows([plain], [None] * 3, 4),
            "off": Rows([Wrong(ours, err)], [None] * 3, 4),
            "on": Rows([Wrong(ours, err)], names, 4),
        }
        if said == "answers as the base":
            del rows["off"]
        if said is None:
            check_rows(plain, rows, "f32")
            return
        with pytest.raises(VerificationError, match=said):
            check_rows(plain, rows, "f32")


@pytest.mark.slow
def test_a_process_that_fails_says_why(models):
    with pytest.raises(DeploymentError, match="no such folder"):
        peak_bytes(models.root / "nowhere", [], rows=1, options=QUICK)


@pytest.mark.slow
def test_exports_are_made_once_and_a_base_of_ones_own_is_measured(models, work, decoder):
    before = {path: path.stat().st_mtime_ns for path in models.root.rglob("*") if path.is_file()}
    again = find_decoders(work, base=None, shape="pico")
    assert again.folder("qv") == models.folder("qv")
    again.adapters("qv", "f32", 3)
    assert {path: path.stat().st_mtime_ns for path in models.root.rglob("*") if path.is_file()} == before
    told = []
    options = DecodeOptions(precisions=("f32",), parts=("mixed",), seconds=0.1, sessions=1, openings=1, context=4)
    bench = measure_decode(work, base=decoder[0], options=options, grown=lambda b: told.append(dict(b.summary)))
    assert set(bench.summary) == {"mixed8_on_f32"}
    assert told == [bench.summary]


def test_unknown_names_list_the_near_ones(tmp_path):
    for words, says in (
        (["--shape", "smollm"], "smollm2-135m"),
        (["--only", "decod"], "decode"),
        (["--precision", "int5"], "int4"),
    ):
        done = CliRunner().invoke(main, ["bench", "decode", "--work", str(tmp_path / "w"), *words])
        assert done.exit_code == 1
        assert says in done.stderr
    with pytest.raises(UnknownNameError):
        measure_decode(tmp_path, options=DecodeOptions(parts=("x",)))

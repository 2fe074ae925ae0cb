"""Generation on a pico decoder: what torch generates, whoever else is in the batch; joining, leaving, stopping."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from decoder_folders import ADAPTERS, CONTEXT, EOS, VOCABULARY, decoder_adapter, torch_tokens

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.errors import AdapterMismatchError, DeploymentError, UnknownNameError
from ssh_deploy.runtimes import language_model
from ssh_deploy.runtimes.sampling import Sampling
from ssh_deploy.runtimes.session import Session

PROMPTS = ["the quick", "when is the end of the", "h", "世界 the fox jumps over the lazy dog"]
NAMES = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def deployment(decoder):
    with Deployment.open(decoder[2], threads=1, max_coefficients=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(deployment):
    """``alone(prompt, name, **options)``: tokens of one request in a batch of its own."""
    known = {}

    def make(prompt, name, **options):
        key = (str(prompt), name, str(options))
        if key not in known:
            known[key] = list(deployment.generate([prompt], name, **options)[0].tokens)
        return known[key]

    return make


def tokens(streams):
    return [list(stream.result().tokens) for stream in streams]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_what_torch_generates(deployment, decoder, name, side):
    base, files, _ = decoder
    encoded = [deployment._prompts.encode(prompt) for prompt in PROMPTS]
    want = torch_tokens(base, encoded, adapter=files.get(name), most=24)
    with deployment.generator(padding=side) as generator:
        got = tokens([generator.submit(prompt, name, max_new_tokens=24) for prompt in PROMPTS])
    assert got == want


def test_adapters_differ_from_the_base_and_from_each_other(alone):
    said = {name: tuple(alone(PROMPTS[0], name, max_new_tokens=16)) for name in NAMES}
    assert len(set(said.values())) == len(NAMES)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_is_each_row_alone(deployment, alone, side):
    pairs = [(prompt, name) for prompt in PROMPTS for name in [*NAMES, "red+0.5*green"]]
    with deployment.generator(padding=side) as generator:
        streams = [generator.submit(*pair, max_new_tokens=16) for pair in pairs]
        generator.step()
        assert generator.running == sum(not s.ended for s in streams) > 12
        assert tokens(streams) == [alone(*pair, max_new_tokens=16) for pair in pairs]
        assert (generator.running, generator.waiting) == (0, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_who_joins_and_leaves_in_the_middle_changes_nobody(deployment, alone, side):
    """Requests of all lengths come one by one, some are cancelled, rows are few: everyone says what they say alone."""
    rng = np.random.default_rng(5)
    asked = [(PROMPTS[i % 4], NAMES[int(rng.integers(4))], int(rng.integers(1, 30))) for i in range(24)]
    with deployment.generator(rows=5, padding=side) as generator:
        streams = []
        for prompt, name, most in asked:
            streams.append(generator.submit(prompt, name, max_new_tokens=most))
            for _ in range(int(rng.integers(0, 4))):
                generator.step()
            if len(streams) in (7, 13):
                streams[-2].cancel()
        while generator.step():
            pass
        for stream, (prompt, name, most) in zip(streams, asked, strict=True):
            want = alone(prompt, name, max_new_tokens=30)[:most]
            got = stream.result()
            if got.finish == "cancelled":
                want = want[: len(got.tokens)]
            assert list(got.tokens) == want
        assert sum(s.finish == "cancelled" for s in streams) >= 1
    assert deployment._residents._pins == {}
    assert not any(content.users for content in deployment._residents._contents.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chosen", [True, False])
def test_long_prompts_are_read_in_chunks(decoder, alone, tmp_path, monkeypatch, side, chosen):
    """Three tokens of four rows at a time; logits of the last token only, or of all where a graph knows no other."""
    want = [alone(prompt, "red", max_new_tokens=12) for prompt in PROMPTS]
    out = tmp_path / "out"
    shutil.copytree(decoder[2], out)
    fields = json.loads((out / "deployment.json").read_text())
    assert fields["decoder"]["logits_at"]
    fields["decoder"]["logits_at"] = fields["decoder"]["logits_at"] if chosen else None
    (out / "deployment.json").write_text(json.dumps(fields))
    shapes = []
    run = Session.run_kept

    def watch(self, feeds, *arguments, **options):
        answer = run(self, feeds, *arguments, **options)
        shapes.append((feeds["input_ids"].shape, answer[0]["logits"].shape[1]))
        return answer

    monkeypatch.setattr(Session, "run_kept", watch)
    limit = {"_MOST_TOKENS": 12} if chosen else {"_MOST_LOGITS": 4 * 4 * VOCABULARY * 3}
    monkeypatch.setattr(language_model, *next(iter(limit.items())))
    with Deployment.open(out, threads=1) as own, own.generator(padding=side) as generator:
        assert tokens([generator.submit(p, "red", max_new_tokens=12) for p in PROMPTS]) == want
    assert shapes[:3] == [((4, 3), 1 if chosen else 3)] * 3


def test_the_cache_is_passed_on_and_not_copied(deployment, monkeypatch):
    """Between steps the model gets the very values that it gave."""
    given, taken = [], []
    run = Session.run_kept

    def watch(self, feeds, *arguments, **options):
        taken.append([value for name, value in feeds.items() if name.startswith("past")])
        answer = run(self, feeds, *arguments, **options)
        given.append(answer[1])
        return answer

    monkeypatch.setattr(Session, "run_kept", watch)
    deployment.generate(["the quick"], max_new_tokens=6)
    assert len(given) == 6
    for before, after in zip(given[:-1], taken[1:], strict=True):
        assert all(a is b for a, b in zip(before, after, strict=True))


def test_events_are_the_answer(deployment):
    text = "世界 the fox"
    with deployment.generator() as generator:
        streams = [generator.submit(text, name, max_new_tokens=40) for name in NAMES]
        for stream in streams:
            events = list(stream)
            answer = stream.result()
            assert [e.token for e in events] == list(answer.tokens)
            assert "".join(e.text for e in events) == answer.text
            assert [e.finish for e in events] == [None] * (len(events) - 1) + [answer.finish]
            own = [t for t in answer.tokens if t != EOS]
            whole = deployment._prompts.decode(deployment._prompts.encode(text) + own)
            assert answer.text == whole[len(text) :]


def test_the_end_token_is_a_token_without_text(deployment, decoder):
    answer = deployment.generate([PROMPTS[1]], "blue", max_new_tokens=30)[0]
    assert answer.finish == "stop"
    assert answer.tokens[-1] == EOS
    assert "</s>" not in answer.text


def test_the_end_token_can_be_ignored(deployment):
    ends = deployment.generate([PROMPTS[1]], "blue", max_new_tokens=30)[0]
    goes_on = deployment.generate([PROMPTS[1]], "blue", max_new_tokens=30, ignore_eos=True)[0]
    assert goes_on.tokens[: len(ends.tokens)] == ends.tokens
    assert (len(goes_on.tokens), goes_on.finish) == (30, "length")


def test_stop_strings_end_where_they_stand(deployment):
    whole = deployment.generate([PROMPTS[0]], "green", max_new_tokens=30)[0]
    for begin in range(2, 10):
        stop = whole.text[begin : begin + 3]
        got = deployment.generate([PROMPTS[0]], "green", max_new_tokens=30, stop=["never there", stop])[0]
        assert got.text == whole.text[: whole.text.find(stop)]
        assert got.finish == "stop"
        assert got.tokens == whole.tokens[: len(got.tokens)]
        assert len(got.tokens) < len(whole.tokens)


def test_stop_tokens_end_too(deployment, alone):
    said = alone(PROMPTS[0], "green", max_new_tokens=16)
    answer = deployment.generate([PROMPTS[0]], "green", max_new_tokens=16, stop_tokens=[said[5]])[0]
    assert list(answer.tokens) == said[: said.index(said[5]) + 1]
    assert answer.finish == "stop"


def test_a_seed_says_what_is_drawn_whoever_else_is_there(deployment):
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=11)
    options = {"sampling": sampling, "max_new_tokens": 16}
    first = deployment.generate(["the quick"], "red", **options)[0]
    again = deployment.generate(["the quick", "the quick", "h"], ["red", "blue", "red"], **options)
    assert again[0].tokens == first.tokens != again[1].tokens
    other = deployment.generate(["the quick"], "red", sampling=Sampling(1.0, 50, 0.95, seed=12), max_new_tokens=16)[0]
    assert other.tokens != first.tokens
    assert first.seed == 11


def test_without_a_seed_the_answer_says_which_it_was(deployment):
    drawn = [deployment.generate(["h"], sampling=Sampling(1.5), max_new_tokens=12)[0] for _ in range(2)]
    assert drawn[0].seed != drawn[1].seed
    again = deployment.generate(["h"], sampling=Sampling(1.5, seed=drawn[0].seed), max_new_tokens=12)[0]
    assert again.tokens == drawn[0].tokens


def test_tokens_are_prompts_too(deployment, alone):
    encoded = deployment._prompts.encode(PROMPTS[0])
    assert alone(encoded, "red", max_new_tokens=8) == alone(PROMPTS[0], "red", max_new_tokens=8)


def test_a_chat_is_its_template(deployment, alone):
    asked = deployment.generate(["who"], "red", chat=True, max_new_tokens=8)[0]
    assert list(asked.tokens) == alone("<s><user>who\n<assistant>", "red", max_new_tokens=8)


def test_the_context_ends_an_answer(deployment):
    prompt = [5 + i % 300 for i in range(CONTEXT - 4)]
    answer = deployment.generate([prompt], max_new_tokens=50)[0]
    assert (len(answer.tokens), answer.finish) == (4, "length")


@pytest.mark.parametrize(
    ("prompt", "options", "error", "says"),
    [
        ("", {}, DeploymentError, "empty"),
        ([], {}, DeploymentError, "no tokens"),
        ([VOCABULARY], {}, DeploymentError, "no tokens of a vocabulary of 320"),
        ([-1], {}, DeploymentError, "no tokens of a vocabulary"),
        ("x" * CONTEXT, {}, DeploymentError, f"{CONTEXT} tokens; the model's context of {CONTEXT}"),
        ("h", {"adapter": "gren"}, UnknownNameError, "no adapter 'gren'(.|\n)*green"),
        ("h", {"adapter": "red+gren"}, UnknownNameError, "no adapter 'gren'"),
        ("h", {"adapter": "../red"}, UnknownNameError, "never paths"),
        ("h", {"max_new_tokens": 0}, DeploymentError, "max_new_tokens is 0"),
        ("h", {"stop": [""]}, DeploymentError, "stop string is empty"),
    ],
)
def test_what_is_refused_before_it_waits(deployment, prompt, options, error, says):
    with deployment.generator() as generator:
        with pytest.raises(error, match=says):
            generator.submit(prompt, **options)
        assert generator.waiting == 0


def test_one_prompt_is_no_list(deployment):
    with pytest.raises(DeploymentError, match="list of prompts"):
        deployment.generate("h")
    with pytest.raises(DeploymentError, match="2 adapters for 1 rows"):
        deployment.generate(["h"], ["red", "blue"])
    with pytest.raises(DeploymentError, match=r"does not answer texts as a whole(.|\n)*--prompt"):
        deployment.predict(["h"])


def test_generators_that_cannot_be(deployment):
    with pytest.raises(DeploymentError, match="0 rows"):
        deployment.generator(rows=0)
    with pytest.raises(DeploymentError, match="padded 'middle'"):
        deployment.generator(padding="middle")


def test_a_sliding_window_counts_columns(decoder, tmp_path):
    """A gap behind a prompt would shorten what the next token sees: padding behind is refused."""
    out = tmp_path / "out"
    shutil.copytree(decoder[2], out)
    fields = json.loads((out / "deployment.json").read_text())
    fields["decoder"]["window"] = 8
    (out / "deployment.json").write_text(json.dumps(fields))
    with Deployment.open(out, threads=1) as own:
        with pytest.raises(DeploymentError, match="8 columns of the cache"):
            own.generator(padding="right")
        assert len(own.generate(["h"], max_new_tokens=3)[0].tokens) == 3


def test_an_encoder_does_not_go_on(exported):
    with Deployment.open(exported("bert")[2]) as encoder, pytest.raises(DeploymentError, match="--text"):
        encoder.generate(["h"])


def test_a_request_that_fails_takes_nobody_with_it(deployment, decoder, alone, tmp_path):
    """An adapter whose file is broken by its turn, one whose numbers overflow: the others say what they say."""
    base = decoder[0]
    wild = decoder_adapter(base, seed=7)
    for delta in wild.deltas.values():
        delta.values[:] = 6e4
    write_file(wild, tmp_path / "wild.safetensors", values_dtype=np.float16)
    wide = decoder_adapter(base, seed=8, n=200)
    write_file(wide, tmp_path / "wide.safetensors", values_dtype=np.float16)
    with Deployment.open(decoder[2], threads=1, max_coefficients=120) as own, own.generator() as generator:
        own.load("late", tmp_path / "wild.safetensors")
        good = generator.submit(PROMPTS[0], "red", max_new_tokens=12)
        late = generator.submit(PROMPTS[0], "late", max_new_tokens=12)
        shutil.copy(tmp_path / "wide.safetensors", tmp_path / "wild.safetensors")
        assert tokens([good]) == [alone(PROMPTS[0], "red", max_new_tokens=12)]
        with pytest.raises(AdapterMismatchError, match="200"):
            late.result()
        with pytest.raises(AdapterMismatchError, match="200"):
            next(late)
        assert (generator.running, generator.waiting) == (0, 0)


def test_numbers_that_overflow_end_their_request_alone(deployment, alone, monkeypatch):
    step = language_model.LanguageModel.step

    def overflow(self, *arguments):
        logits, cache = step(self, *arguments)
        logits = logits.copy()
        logits[1, 7] = np.nan
        return logits, cache

    monkeypatch.setattr(language_model.LanguageModel, "step", overflow)
    with deployment.generator() as generator:
        streams = [generator.submit(PROMPTS[0], name, max_new_tokens=12) for name in ("red", "green")]
        with pytest.raises(DeploymentError, match="overflow"):
            streams[1].result()
        monkeypatch.undo()
        assert tokens(streams[:1]) == [alone(PROMPTS[0], "red", max_new_tokens=12)]


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_a_run_that_fails_gives_every_adapter_back(deployment, monkeypatch, where):
    def fail(*_, **__):
        raise DeploymentError("no more memory")

    with deployment.generator() as generator:
        monkeypatch.setattr(language_model.LanguageModel, where, fail)
        streams = [generator.submit(PROMPTS[0], name, max_new_tokens=12) for name in ("red", "green")]
        for stream in streams:
            with pytest.raises(DeploymentError, match="no more memory"):
                stream.result()
        monkeypatch.undo()
        assert not any(content.users for content in deployment._residents._contents.values())
        assert len(generator.submit(PROMPTS[0], "red", max_new_tokens=3).result().tokens) == 3


def test_an_interruption_goes_up_and_leaves_nothing_held(deployment, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with deployment.generator() as generator:
        monkeypatch.setattr(language_model.LanguageModel, "step", interrupt)
        stream = generator.submit(PROMPTS[0], "red", max_new_tokens=12)
        with pytest.raises(KeyboardInterrupt):
            stream.result()
        with pytest.raises(DeploymentError, match="interrupted"):
            stream.result()
    assert not any(content.users for content in deployment._residents._contents.values())


def small(decoder, adapters):
    """A deployment whose budget holds ``adapters`` adapters."""
    with Deployment.open(decoder[2], threads=1) as probe:
        size = sum(probe.how_many_fit().adapter_bytes.values())
    return Deployment.open(decoder[2], threads=1, memory=adapters * size)


def test_an_adapter_in_use_is_never_evicted_and_those_without_room_wait(decoder, alone):
    with small(decoder, 2) as deployment, deployment.generator() as generator:
        streams = [generator.submit(PROMPTS[0], name, max_new_tokens=6 + i) for i, name in enumerate(ADAPTERS)]
        generator.step()
        assert (generator.running, generator.waiting) == (2, 1)
        base = generator.submit(PROMPTS[0], None, max_new_tokens=9)  # does not overtake
        generator.step()
        assert generator.waiting == 2
        assert tokens(streams) == [alone(PROMPTS[0], n, max_new_tokens=6 + i) for i, n in enumerate(ADAPTERS)]
        assert tokens([base]) == [alone(PROMPTS[0], None, max_new_tokens=9)]


def test_one_after_another_when_there_is_room_for_one(decoder, alone):
    with small(decoder, 1) as deployment:
        got = deployment.generate([PROMPTS[0]] * 3, list(ADAPTERS), max_new_tokens=8)
    assert [list(g.tokens) for g in got] == [alone(PROMPTS[0], n, max_new_tokens=8) for n in ADAPTERS]


def test_an_adapter_is_replaced_for_those_who_come_later(deployment, decoder, alone, tmp_path):
    path = tmp_path / "mine.safetensors"
    shutil.copy(decoder[1]["red"], path)
    with Deployment.open(decoder[2], threads=1) as own, own.generator() as generator:
        own.load("mine", path)
        first = generator.submit(PROMPTS[0], "mine", max_new_tokens=14)
        generator.step()
        own.load("mine", decoder[1]["green"])
        second = generator.submit(PROMPTS[0], "mine", max_new_tokens=14)
        assert tokens([first, second]) == [alone(PROMPTS[0], n, max_new_tokens=14) for n in ("red", "green")]


def test_unloading_waits_for_the_answer(decoder):
    with Deployment.open(decoder[2], threads=1) as own, own.generator() as generator:
        own.load("mine", decoder[1]["red"])
        stream = generator.submit(PROMPTS[0], "mine", max_new_tokens=14)
        generator.step()
        with pytest.raises(DeploymentError, match="in use"):
            own.unload("mine", timeout=0)
        stream.cancel()
        own.unload("mine", timeout=0)
        with pytest.raises(UnknownNameError, match="mine"):
            generator.submit(PROMPTS[0], "mine")
        assert stream.result().finish == "cancelled"
        stream.cancel()
        assert [e.finish for e in stream] == []


def test_closing_cancels_and_gives_back(decoder):
    with Deployment.open(decoder[2], threads=1) as own:
        with own.generator(rows=1) as generator:
            streams = [generator.submit(PROMPTS[0], "red") for _ in range(2)]
            generator.step()
        assert [s.result().finish for s in streams] == ["cancelled"] * 2
        assert len(streams[0].result().tokens) == 1
        with pytest.raises(DeploymentError, match="was closed"):
            generator.submit("h")
        assert not any(content.users for content in own._residents._contents.values())
        later = own.generator()
        stream = later.submit(PROMPTS[0], "red")
    with pytest.raises(DeploymentError, match="closed"):
        stream.result()


def test_many_threads_share_a_batch(deployment, alone):
    """Each thread submits and reads its own; whoever waits drives."""
    asked = [(PROMPTS[i % 4], NAMES[i % 3]) for i in range(24)]
    with deployment.generator(rows=6) as generator, ThreadPoolExecutor(8) as pool:
        start = threading.Barrier(8)

        def ask(i):
            if i < 8:
                start.wait()
            return list(generator.submit(*asked[i], max_new_tokens=12).result().tokens)

        got = list(pool.map(ask, range(24)))
    assert got == [alone(*pair, max_new_tokens=12) for pair in asked]


def test_a_graph_that_is_not_the_folders(decoder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(decoder[2], out)
    fields = json.loads((out / "deployment.json").read_text())
    for change, says in ((("kv_heads", 4), "other sides"), (("past", ["a", "b", "c", "d"]), "lacks a, b, c, d")):
        forged = {**fields, "decoder": {**fields["decoder"], change[0]: change[1]}}
        (out / "deployment.json").write_text(json.dumps(forged))
        with Deployment.open(out, threads=1) as own, pytest.raises(DeploymentError, match=says):
            own.generator()

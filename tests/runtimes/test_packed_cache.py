"""Graphs of onnxruntime-genai's builder, whose cache is packed: rows of all lengths, joining and leaving, as torch."""

import json
import shutil

import numpy as np
import pytest
from decoder_folders import export_decoder, torch_tokens

from ssh_deploy import Deployment
from ssh_deploy.errors import DeploymentError
from ssh_deploy.jobs.exporting import ExportOptions
from ssh_deploy.runtimes.cache import Cache
from ssh_deploy.runtimes.session import Session, ort_value

PROMPTS = ["the quick", "when is the end of the", "h", "世界 the fox"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(base, {name: adapter file}, folder) of a decoder out of the builder, with slots for its adapters."""
    pytest.importorskip("onnxruntime_genai.models.builder", reason="onnxruntime-genai is not installed")
    place = tmp_path_factory.mktemp("built")
    return export_decoder(place, fields={"head_dim": 16}, options=ExportOptions(builder="genai"))


@pytest.fixture(scope="module")
def want(built):
    """Tokens of every prompt by adapter, from torch."""
    base, files, out = built
    with Deployment.open(out, threads=1) as deployment:
        encoded = [deployment._prompts.encode(prompt) for prompt in PROMPTS]
    names = (None, *files)
    return {name: torch_tokens(base, encoded, adapter=files.get(name), most=24) for name in names}


def test_a_mixed_batch_of_all_lengths_is_what_torch_generates(built, want):
    pairs = [(i, name) for name in want for i in range(4)]
    with Deployment.open(built[2], threads=1) as deployment:
        assert deployment.folder.decoder.packed
        answers = deployment.generate([PROMPTS[i] for i, _ in pairs], [name for _, name in pairs], max_new_tokens=24)
        for (i, name), answer in zip(pairs, answers, strict=True):
            assert list(answer.tokens) == want[name][i]
        for name, tokens in want.items():
            assert list(deployment.generate([PROMPTS[2]], name, max_new_tokens=24)[0].tokens) == tokens[2]


def test_rows_join_and_leave(built, want):
    names = list(want)
    with Deployment.open(built[2], threads=1) as deployment, deployment.generator(rows=3) as generator:
        streams = []
        for i, prompt in enumerate(PROMPTS * 3):
            streams.append(generator.submit(prompt, names[i % 3], max_new_tokens=3 + (7 * i) % 20))
            generator.step()
            generator.step()
        for i, stream in enumerate(streams):
            assert list(stream.result().tokens) == want[names[i % 3]][i % 4][: 3 + (7 * i) % 20]


def test_a_long_prompt_is_read_in_chunks_where_it_is_alone(built, want, monkeypatch):
    from ssh_deploy.runtimes import language_model

    shapes = []
    run = Session.run_kept

    def watch(self, feeds, *arguments, **options):
        shapes.append(feeds["input_ids"].shape)
        return run(self, feeds, *arguments, **options)

    monkeypatch.setattr(Session, "run_kept", watch)
    monkeypatch.setattr(language_model, "_MOST_TOKENS", 2)
    with Deployment.open(built[2], threads=1) as deployment:
        assert list(deployment.generate([PROMPTS[1]], "red", max_new_tokens=24)[0].tokens) == want["red"][1]
        assert shapes[:3] == [(1, 2)] * 3
        shapes.clear()
        deployment.generate(PROMPTS, max_new_tokens=2)
        assert shapes[0][0] == 4
        assert shapes[0][1] > 2


def test_a_cache_of_other_sides_is_refused(built, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(built[2], out)
    fields = json.loads((out / "deployment.json").read_text())
    fields["decoder"]["kv_heads"] = 3
    (out / "deployment.json").write_text(json.dumps(fields))
    with Deployment.open(out, threads=1) as deployment, pytest.raises(DeploymentError, match="other sides"):
        deployment.generator()


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_padded_on_the_side_where_no_token_comes(packed):
    def cache(lengths, past):
        first = np.arange(past) < np.array(lengths)[:, None]
        mask = first if packed else first[:, ::-1]
        return Cache((ort_value(np.where(mask, 5.0, 0.0).astype(np.float32)[:, None, :, None]),), mask, packed)

    both = cache([3, 1], 3).beside(cache([2, 5], 5))
    assert both.lengths.tolist() == [3, 1, 2, 5]
    assert both.values[0].shape() == [4, 1, 5, 1]
    np.testing.assert_array_equal(both.values[0].numpy()[:, 0, :, 0], np.where(both.mask, 5.0, 0.0))
    few = both.only([2, 1])
    assert few.packed == packed
    assert few.values[0].shape() == [2, 1, 2, 1]
    assert few.mask.tolist() == [[True, True], [packed, not packed]]

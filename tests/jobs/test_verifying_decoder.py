"""Decoders against torch: sidecar, merged graph and merged checkpoint write what torch writes, and no other does."""

import json
import math
import shutil

import numpy as np
import pytest
from decoder_folders import decoder_adapter

from ssh_deploy.adapters.file import write_file
from ssh_deploy.cli.main import main
from ssh_deploy.errors import VerificationError
from ssh_deploy.graph.kv_cache import CacheShape
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.greedy import Greedy, continue_greedily, divergences, prompt_inputs
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.jobs.verifying import verify_target

TEXTS = ["the quick brown fox", "when is the end of", "héé世界", "of the end"]


def perplexity_of(base, adapter, texts):
    """By transformers' own loss, one text at a time."""
    import torch
    import transformers

    from ssh_deploy.adapters.reading import read_adapter
    from ssh_deploy.checkpoints.index import open_checkpoint
    from ssh_deploy.graph.patching import apply_adapter, model_places

    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    read = read_adapter(adapter)
    apply_adapter(model, read, model_places(read, model, open_checkpoint(base).config), head=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    total = count = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if ids.shape[1] == 1:
            continue
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def test_a_sidecar_writes_what_torch_writes(decoder):
    base, files, folder = decoder
    verdict = verify_target(base, files["red"], folder)
    assert verdict.ok
    assert (verdict.target, verdict.rows, verdict.agreement) == ("exported folder", 20, 1.0)
    written = verdict.written
    assert (written.prompts, written.same, written.apart) == (20, 20, 0)
    assert 30 < written.tokens <= 64
    assert verdict.max_abs_diff < 1e-3 * 20
    assert written.perplexity == pytest.approx(written.perplexity_torch, rel=1e-4)
    assert any("greedy tokens: the same after 20 of 20" in line for line in verdict.lines())


def test_perplexity_of_given_texts_is_transformers_own(decoder):
    base, files, folder = decoder
    written = verify_target(base, files["red"], folder, texts=TEXTS).written
    want = perplexity_of(base, files["red"], TEXTS)
    assert written.perplexity_torch == pytest.approx(want, rel=1e-4)
    assert written.perplexity == pytest.approx(want, rel=1e-4)
    assert written.prompts == len(TEXTS)


@pytest.mark.slow
def test_merged_graph_and_merged_checkpoint_write_the_same_and_another_adapter_does_not(decoder, tmp_path):
    base, files, folder = decoder
    export_model(base, [str(files["green"])], tmp_path / "graph", options=ExportOptions(mode="merged"))
    merge_adapters(base, [str(files["green"])], tmp_path / "checkpoint")
    for target in (tmp_path / "graph", tmp_path / "checkpoint"):
        verdict = verify_target(base, files["green"], target)
        assert verdict.ok
        assert verdict.written.same == 20
        wrong = verify_target(base, files["red"], target)
        assert not wrong.ok
        assert wrong.written.apart > 10
        assert wrong.written.perplexity != pytest.approx(wrong.written.perplexity_torch, rel=1e-2)
    fed = tmp_path / "fed.safetensors"  # not in the folder: its rows are fed into the slots
    write_file(decoder_adapter(base, seed=77), fed, values_dtype=np.float16)
    assert verify_target(base, fed, folder).written.same == 20


@pytest.mark.slow
def test_the_command_says_it_in_words_and_json(decoder, tmp_path, capsys):
    base, files, folder = decoder
    (tmp_path / "texts").write_text("\n".join(TEXTS), encoding="utf-8")
    texts = ["--texts", str(tmp_path / "texts")]
    for more, expected in (([], "greedy tokens: the same after 4 of 4 prompts"), (["--json"], '"same": 4')):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(base), str(files["blue"]), str(folder), *texts, *more])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


def test_texts_that_leave_no_room_are_refused(decoder):
    base, files, folder = decoder
    with pytest.raises(VerificationError, match=r"(?s)x x x.* tokens; the context holds 1 to 95 and an answer"):
        verify_target(base, files["red"], folder, texts=["x " * 120])


@pytest.mark.slow
def test_without_a_tokenizer_random_rows_are_compared(decoder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(decoder[0], base)
    (base / "tokenizer.json").unlink()
    verdict = verify_target(base, decoder[1]["red"], decoder[2])
    assert (verdict.ok, verdict.written.prompts, verdict.written.same) == (True, 20, 20)


def test_a_graph_that_forgets_its_cache_is_found_out():
    """Logits of prompts alone would agree: only the writing shows it."""
    shape = CacheShape(1, 1, 2)
    table = np.random.default_rng(0).normal(size=(9, 9, 9))

    def run(batches, *, remembers):
        answers = []
        for feeds in batches:
            past, ids = feeds["past_key_values.0.key"], feeds["input_ids"]
            seen = np.concatenate([past[:, 0, :, 0].astype(int) if remembers else ids[:, :0], ids], axis=1)
            logits = np.stack([table[(seen[:, : seen.shape[1] - ids.shape[1] + i + 1].sum(1)) % 9, ids[:, i]]
                               for i in range(ids.shape[1])], axis=1)  # fmt: skip
            cache = np.repeat(seen[:, None, :, None], 2, axis=3).astype(np.float32)
            answers.append({"logits": logits, "present.0.key": cache, "present.0.value": cache})
        return answers

    prompts = [[1, 2, 3], [4], [5, 6]]
    feeds = prompt_inputs(prompts, shape, positions=True)
    assert feeds["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4], [0, 5, 6]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]
    want, wrong = (
        continue_greedily(lambda f, r=r: run(f, remembers=r), prompts, shape, new=8, positions=True)
        for r in (True, False)
    )
    for prompt, tokens in zip(prompts, want.tokens.tolist(), strict=True):
        seen = list(prompt)
        for token in tokens:
            assert token == table[sum(seen) % 9, seen[-1]].argmax()
            seen.append(token)
    assert divergences(want, want, tie=0.0) == (3, 0)
    assert divergences(wrong, want, tie=0.0)[1] > 0


def test_a_tie_is_no_difference_and_all_behind_it_follows():
    want = Greedy(np.array([[1, 2, 3], [1, 2, 3]]), np.array([[1.0, 1e-6, 1.0], [1.0, 0.5, 1e-9]]))
    got = Greedy(np.array([[1, 9, 7], [1, 9, 3]]), want.gaps)
    assert divergences(got, want, tie=1e-5) == (0, 1)
    assert divergences(got, want, tie=0.6) == (0, 0)


def test_a_headless_adapter_on_a_headless_base_has_nothing_to_compare(pico, tmp_path):
    from exported_folders import write_adapter

    base = pico("bert")
    headed = write_adapter(tmp_path / "headed.safetensors", base, "bert", labels=4, seed=3)
    headless = write_adapter(tmp_path / "headless.safetensors", base, "bert", seed=4)
    export_model(base, [str(headed)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "deployment.json").read_text())["task"] == "text-classification"
    with pytest.raises(
        VerificationError, match=r"(?s)Neither .*headless\.safetensors has a head for text-class.*--task"
    ):
        verify_target(base, headless, tmp_path / "out")

"""Perplexity through an exported folder is torch's, with each adapter and without."""

import json
import sys

import numpy as np
import pytest

from ssh_deploy import Deployment

PAIRS = [("the quick", "brown fox"), ("when is the end", "the lazy dog jumps over the end"), ("h", "世界")] * 4


@pytest.fixture(scope="module")
def script(root):
    sys.path.insert(0, str(root / "examples"))
    try:
        import decoder_perplexity

        yield decoder_perplexity
    finally:
        sys.path.remove(str(root / "examples"))


@pytest.fixture(scope="module")
def rows(script, decoder):
    with Deployment.open(decoder[2]) as deployment:
        return script.encoded(deployment, [script.Pair(*pair) for pair in PAIRS])


def torch_losses(base, rows, adapter):
    """−log p of every answer token, one row at a time, by transformers with the adapter in its weights."""
    import torch
    import transformers

    from ssh_deploy.adapters.reading import read_adapter
    from ssh_deploy.checkpoints.index import open_checkpoint
    from ssh_deploy.graph.patching import apply_adapter, model_places

    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        read = read_adapter(adapter)
        apply_adapter(model, read, model_places(read, model, open_checkpoint(base).config), head=False)
    found = []
    with torch.no_grad():
        for prompt, answer in rows:
            scores = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            found.append(-scores[places, torch.tensor(answer)])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("name", [None, "red", "blue"])
def test_losses_are_those_of_torch(script, decoder, rows, name):
    base, files, out = decoder
    with Deployment.open(out) as deployment:
        found = script.losses(deployment, rows, name)
    np.testing.assert_allclose(found, torch_losses(base, rows, files.get(name)), rtol=1e-3, atol=1e-3)


def test_rows_hold_the_chat_template_the_answer_and_its_end(rows):
    assert len(rows) == len(PAIRS)
    assert all(prompt and answer[-1] == 1 for prompt, answer in rows)
    assert rows[0] == rows[3]
    assert rows[0][0] != rows[1][0]


def test_prints_gain_and_what_share_of_the_first_is_left(script, decoder, capsys):
    out = str(decoder[2])
    script.main([out, out, "--adapter", "red", "--pairs", "chatterbot", "--limit", "3", "--json"])
    found = json.loads(capsys.readouterr().out)[out]["red"]
    assert found["share"] == pytest.approx(1)
    assert found["gain"] == pytest.approx(np.log(found["base"] / found["adapter"]))
    assert found["pairs"] == "chatterbot"
    script.main([out, "--adapter", "red", "--pairs", "chatterbot", "--limit", "3"])
    assert "red: base" in capsys.readouterr().out


def test_an_adapter_from_a_file_and_by_the_name_of_its_pairs(script, decoder, capsys):
    _, files, out = decoder
    script.main([str(out), "--adapter", f"pirate={files['red']}", "--limit", "2", "--json"])
    one = json.loads(capsys.readouterr().out)[str(out)]["pirate"]
    script.main([str(out), "--adapter", "red", "--pairs", "pirate", "--limit", "2", "--json"])
    assert one == json.loads(capsys.readouterr().out)[str(out)]["red"]
    assert one["adapter"] != one["base"]


def test_a_folder_without_such_adapters(script, decoder):
    with pytest.raises(SystemExit, match="no adapter to measure"):
        script.main([str(decoder[2])])


def test_an_adapter_without_pairs_of_its_own(script, decoder):
    with pytest.raises(SystemExit, match="--pairs chatterbot"):
        script.main([str(decoder[2]), "--adapter", "red"])

"""Decoders exported with their cache: five shapes of them held against torch, mixed batches, padding on either side."""

import json
import shutil

import numpy as np
import onnxruntime as ort
import pytest

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.fitting import fit
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.orientation import site_shape
from ssh_deploy.errors import AdapterMismatchError, CheckpointError, DeploymentError, GraphError
from ssh_deploy.graph.bank_file import stack_rows
from ssh_deploy.graph.kv_cache import CacheShape
from ssh_deploy.graph.patching import apply_adapter, model_places, rounded
from ssh_deploy.graph.trace import load_torch
from ssh_deploy.jobs.editing import add_adapter
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.folder_adapters import layout_of, rows_of
from ssh_deploy.jobs.greedy import prompt_inputs
from ssh_deploy.jobs.validating import torch_outputs
from ssh_deploy.jobs.verifying import verify_target
from ssh_deploy.runtimes.folder import open_folder
from ssh_deploy.testing import random_adapter

#: what the linear layers of each architecture are called; llama itself is in `decoder_folders`
LINEARS = {
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "llama-bias": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mistral": ("k_proj", "o_proj", "up_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33, 34], [5, 6, 7, 8, 9, 10, 11, 12]]


def adapter_of(base, ends, *, seed, n=30):
    checkpoint = open_checkpoint(base)
    shapes = {m: site_shape(checkpoint, m) for m in checkpoint.modules() if m.endswith(ends)}
    return random_adapter(shapes, n=n, alpha=90.0, seed=seed, task="causal-lm")


def written(folder, name, adapter):
    path = folder / f"{name}.safetensors"
    write_file(adapter, path, values_dtype=np.float16)
    return str(path)


def torch_model(base, adapter):
    checkpoint = open_checkpoint(base)
    model = load_torch(checkpoint, "text-generation").model
    if adapter is not None:
        adapter = rounded(adapter, "float16")
        apply_adapter(model, adapter, model_places(adapter, model, checkpoint.config), head=False)
    return model


def session(folder):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def runner(folder, **fixed):
    opened = session(folder)
    names = [o.name for o in opened.get_outputs()]

    def run(feeds):
        return dict(zip(names, opened.run(names, {**feeds, **fixed}), strict=True))

    return run


def behind(prompts, shape):
    """Inputs padded behind, where `prompt_inputs` pads in front."""
    longest = max(map(len, prompts))
    mask = np.array([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
    ids = np.array([p + [0] * (longest - len(p)) for p in prompts])
    feeds = prompt_inputs([[0] * longest] * len(prompts), shape, positions=True)
    return feeds | {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def after(feeds, answer, tokens, shape):
    """One more token behind what ``answer`` left in the cache."""
    mask = np.pad(feeds["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
    cache = {past: answer[present] for past, present in zip(shape.inputs, shape.outputs, strict=True)}
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": mask.sum(1, keepdims=True) - 1} | cache


def shape_of(folder):
    decoder = open_folder(folder).decoder
    return CacheShape(decoder.layers, decoder.kv_heads, decoder.head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(LINEARS))
def test_each_row_of_a_mixed_batch_answers_as_torch_alone(pico, tmp_path, architecture):
    base = pico(architecture, "causal-lm")
    adapters = [adapter_of(base, LINEARS[architecture], seed=i) for i in (1, 2)]
    files = [written(tmp_path, name, a) for name, a in zip("ab", adapters, strict=True)]
    report = export_model(base, files, tmp_path / "out")
    assert (report.task, report.sites) == ("text-generation", 2 * len(LINEARS[architecture]))
    assert all(checked.effect > 0.01 for name, checked in report.validation.items() if name)
    checkpoint, shape = open_checkpoint(base), shape_of(tmp_path / "out")
    layout = layout_of(tmp_path / "out", json.loads((tmp_path / "out" / "deployment.json").read_text()))
    banks, ids = stack_rows([rows_of(fit(path, checkpoint), layout, checkpoint) for path in files], layout)
    assert ids == {"adapter_ids": [1, 2]}
    models = [torch_model(base, adapter) for adapter in (None, *adapters)]
    run = runner(tmp_path / "out", adapter_ids=np.array([0, 1, 2, 1]), **banks)
    sides = [(prompt_inputs(PROMPTS, shape, positions=True), lambda p: slice(9 - len(p), 9))]
    window = open_folder(tmp_path / "out").decoder.window
    assert window == (6 if architecture == "mistral" else None)
    if window is None:  # which counts the gap behind a prompt
        sides.append((behind(PROMPTS, shape), lambda p: slice(0, len(p))))
    else:
        with Deployment.open(tmp_path / "out") as deployment, pytest.raises(DeploymentError, match="see 6 columns"):
            deployment.generator(padding="right")
    for feeds, first in sides:
        answer = run(feeds)
        chosen = np.array([[answer["logits"][i, first(p).stop - 1].argmax()] for i, p in enumerate(PROMPTS)])
        following = run(after(feeds, answer, chosen, shape))
        for row, prompt in enumerate(PROMPTS):
            alone = prompt_inputs([prompt], shape, positions=True)
            (want,) = torch_outputs(models[(0, 1, 2, 1)[row]], [alone], ("logits", *shape.outputs))
            limit = 1e-4 * max(1.0, float(np.ptp(want["logits"])))
            np.testing.assert_allclose(answer["logits"][row, first(prompt)], want["logits"][0], rtol=0, atol=limit)
            (want,) = torch_outputs(
                models[(0, 1, 2, 1)[row]], [after(alone, want, chosen[[row]], shape)], ("logits", *shape.outputs)
            )
            np.testing.assert_allclose(following["logits"][row], want["logits"][0], rtol=0, atol=limit)


def test_the_folder_says_what_generation_needs(decoder):
    base, _, out = decoder
    folder = open_folder(out)
    assert folder.task == "text-generation"
    assert folder.inputs[:4] == ("input_ids", "attention_mask", "position_ids", "past_key_values.0.key")
    found = folder.decoder
    assert (found.layers, found.kv_heads, found.head_dim, found.logits_at) == (2, 2, 12, "logits_at")
    assert found.past == tuple(f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value"))
    assert found.present == tuple(name.replace("past_key_values", "present") for name in found.past)
    config = json.loads((base / "config.json").read_text())
    assert (found.bos, found.eos, found.pad) == (0, (config["eos_token_id"],), 2)
    assert found.context == config["max_position_embeddings"]
    assert (out / found.chat_template).read_text() == (base / "chat_template.jinja").read_text()
    sides = {i.name: i.shape for i in session(out).get_inputs()}
    assert sides["attention_mask"] == ["batch", "past + tokens"]
    assert sides["past_key_values.1.value"] == ["batch", 2, "past", 12]
    assert [o.name for o in session(out).get_outputs()] == ["logits", *found.present]


@pytest.mark.slow
def test_special_tokens_from_wherever_they_are_in_a_graph_of_halves_with_required_inputs(decoder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(decoder[0], base)
    (base / "chat_template.jinja").rename(tmp_path / "template")
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": "{{ 'hé' }}"}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "bos_token_id": None}))
    options = ExportOptions(adapter_inputs="required", dtype="float16")
    export_model(base, [str(decoder[1]["red"])], tmp_path / "out", options=options)
    found = open_folder(tmp_path / "out").decoder
    assert (found.eos, found.bos, found.chat_template) == ((1, 7), 0, "chat_template.jinja")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'hé' }}"
    assert found.logits_at is None  # bindings that drop optional inputs get none
    assert session(tmp_path / "out").get_overridable_initializers() == []
    full, half = ((out / "model.onnx.data").stat().st_size for out in (decoder[2], tmp_path / "out"))
    assert half < 0.6 * full
    assert verify_target(base, decoder[1]["red"], tmp_path / "out").ok


def test_tied_embeddings_are_stored_once(decoder):
    base, _, out = decoder
    assert "lm_head.weight" not in open_checkpoint(base).names()
    weights = sum(open_checkpoint(base).read(name).nbytes for name in open_checkpoint(base).names())
    assert (out / "model.onnx.data").stat().st_size < weights + (320 * 48 * 4) // 2


@pytest.mark.slow
def test_without_an_adapter_it_has_the_bits_of_the_plain_export_also_when_positions_are_asked_for(decoder, tmp_path):
    base, _, out = decoder
    export_model(base, [], tmp_path / "plain")
    shape = shape_of(out)
    feeds = prompt_inputs(PROMPTS, shape, positions=True)
    mine, plain = runner(out)(feeds), runner(tmp_path / "plain")(feeds)
    assert all(mine[name].tobytes() == plain[name].tobytes() for name in plain)
    following = after(feeds, mine, np.full((4, 1), 9), shape)
    assert runner(out)(following)["logits"].tobytes() == runner(tmp_path / "plain")(following)["logits"].tobytes()
    at = np.array([[8, 0], [8, 7], [8, 6], [7, 8]])
    some, plain = (runner(folder, logits_at=at)(feeds)["logits"] for folder in (out, tmp_path / "plain"))
    assert some.tobytes() == plain.tobytes()
    assert some.shape == (4, 2, 320)
    np.testing.assert_allclose(some, np.take_along_axis(mine["logits"], at[..., None], axis=1), rtol=0, atol=1e-5)


def test_positions_that_are_not_there_are_an_error(decoder):
    feeds = prompt_inputs(PROMPTS, shape_of(decoder[2]), positions=True)
    for wrong in ([[9]] * 4, [[-10]] * 4, [[0]] * 3):
        with pytest.raises(Exception, match=r"(?i)invalid|index|batch"):
            runner(decoder[2], logits_at=np.array(wrong))(feeds)


def test_an_adapter_for_parts_of_a_packed_weight_is_refused_with_the_reason(pico, tmp_path):
    path = written(tmp_path, "a", random_adapter({"transformer.h.1.attn.q_proj": (48, 48)}))
    with pytest.raises(
        AdapterMismatchError, match=r"(?s)q_proj.*query, key and value in one weight, .*h\.1\.attn\.c_attn"
    ):
        export_model(pico("gpt2", "causal-lm"), [path], tmp_path / "out")
    path = written(tmp_path, "b", random_adapter({"model.layers.0.mlp.up_proj": (80, 48)}))
    with pytest.raises(AdapterMismatchError, match=r"gate and up in one weight, .*layers\.0\.mlp\.gate_up_proj"):
        export_model(pico("phi3", "causal-lm"), [path], tmp_path / "out")


def test_a_quantised_checkpoint_is_refused(decoder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(decoder[0], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"(?s)the base is quantised \(gptq\).*unquantised"):
        export_model(base, [], tmp_path / "out")


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32}


@pytest.mark.parametrize(
    ("stem", "head", "fields", "message"),
    [
        ("Mamba", "ForCausalLM", {"state_size": 4}, "MambaForCausalLM takes no past_key_values"),
        ("Bert", "LMHeadModel", {"num_attention_heads": 2, "intermediate_size": 20}, "BertLMHeadModel is not causal"),
    ],
)
def test_models_that_keep_something_else_than_keys_and_values_are_refused(tmp_path, stem, head, fields, message):
    import transformers

    model = getattr(transformers, stem + head)(getattr(transformers, f"{stem}Config")(**SMALL, **fields))
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(GraphError, match=message):
        export_model(tmp_path / "base", [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_added_without_exporting_again(decoder, tmp_path):
    base, _, out = decoder
    shutil.copytree(out, tmp_path / "out")
    path = written(tmp_path, "late", adapter_of(base, ("q_proj", "down_proj"), seed=5))
    report = add_adapter(tmp_path / "out", path)
    assert report.adapters[-1] == "late"
    assert verify_target(base, path, tmp_path / "out").ok
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| late | ssh | 30 |" in card
    assert '--prompt "…"' in card


def test_an_architecture_that_torch_cannot_trace_says_so_and_leaves_nothing(pico, tmp_path, monkeypatch):
    import torch

    def refuse(*args, **options):
        raise RuntimeError("data-dependent branch\nand a page of stack")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(
        GraphError, match=r"(?s)cannot export LlamaForCausalLM: RuntimeError: data-dependent branch\n.*upgr"
    ):
        export_model(pico("llama", "causal-lm"), [], tmp_path / "out")
    assert not list(tmp_path.iterdir())

"""SSH and LoRA trained by PEFT on a decoder: sidecar, merged graph and merged checkpoint write what PEFT writes."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from ssh_deploy_train import SSHConfig
from transformers import AutoModelForCausalLM

from ssh_deploy.graph.kv_cache import CacheShape
from ssh_deploy.jobs.exporting import ExportOptions, export_model
from ssh_deploy.jobs.greedy import continue_greedily
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.jobs.validating import Runner
from ssh_deploy.runtimes.folder import open_folder
from ssh_deploy.testing import pico_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [[5, 6, 7, 8, 9], [20, 21], [30, 31, 32], [40]]
NEW = 64


def trained(base, config, folder, *, scale):
    """A PEFT model on ``base`` with random numbers where it trains, saved; returns it."""
    torch.manual_seed(11)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return model


def generated(model, prompts):
    """What ``generate`` appends to each prompt alone."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=-1
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def written(folder, prompts, *, adapter: Path | None = None):
    """What a graph writes in stock onnxruntime."""
    decoder = open_folder(folder).decoder
    shape = CacheShape(decoder.layers, decoder.kv_heads, decoder.head_dim)
    runner = Runner(folder / "model.onnx", ["logits", *shape.outputs])
    done = continue_greedily(lambda f: runner(f, adapter=adapter), prompts, shape, new=NEW, positions=True)
    return done.tokens.tolist()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (SSHConfig(n_frequency=40, target_modules=SEVEN, scaling=60.0, task_type="CAUSAL_LM"), 1.0),
        (peft.LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"), 0.2),
    ],
    ids=["ssh", "lora"],
)
def test_all_three_write_what_peft_writes(tmp_path, config, scale):
    base = pico_model("llama", tmp_path / "base", task="causal-lm")
    plain = generated(AutoModelForCausalLM.from_pretrained(base).eval(), PROMPTS)
    want = generated(trained(base, config, tmp_path / "a", scale=scale), PROMPTS)
    assert np.mean(np.array(want) != np.array(plain)) > 0.5
    given = [str(tmp_path / "a")]
    export_model(base, given, tmp_path / "sidecar", options=ExportOptions(adapter_dtype="float32"))
    assert len(open_folder(tmp_path / "sidecar").sites) == 14
    assert written(tmp_path / "sidecar", PROMPTS, adapter=tmp_path / "sidecar" / "adapters" / "a.onnx_adapter") == want
    assert written(tmp_path / "sidecar", PROMPTS) == plain
    export_model(base, given, tmp_path / "graph", options=ExportOptions(mode="merged"))
    assert written(tmp_path / "graph", PROMPTS) == want
    merge_adapters(base, given, tmp_path / "checkpoint")
    assert generated(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval(), PROMPTS) == want

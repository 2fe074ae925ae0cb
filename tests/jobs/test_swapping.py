"""Hot swap: what a merge would write, and afterwards the base's own bits; on pico models and on a real one."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from triton_here import needs_cuda

import ssh_deploy
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.deltas.diagonal import DiagonalDelta
from ssh_deploy.deltas.lowrank import LowRankDelta
from ssh_deploy.errors import AdapterMismatchError, FingerprintError, VerificationError
from ssh_deploy.jobs import swapping
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.jobs.swapping import held_by, swap
from ssh_deploy.testing import random_adapter

BERT = {f"encoder.layer.{i}.attention.self.{part}": (48, 48) for i in (0, 1) for part in ("query", "value")}


def bits(model):
    """Every tensor of the model, as its bytes."""
    return {
        name: tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def assert_same(model, merged):
    """Equal but for ties: a merge sums ΔW in other blocks, so that float32 sums differ in their last bits."""
    for (name, ours), theirs in zip(model.state_dict().items(), merged.state_dict().values(), strict=True):
        close = torch.isclose(ours, theirs, rtol=torch.finfo(ours.dtype).eps, atol=1e-6 * theirs.abs().max().item())
        assert close.all(), name
        if ours.dtype != torch.float32:
            assert (ours != theirs).float().mean() < 1e-3, name


def stored(adapter, path):
    write_file(adapter, path, values_dtype=np.float32)
    return str(path)


def head(labels, width=48, seed=3):
    rng = np.random.default_rng(seed)
    return {
        "classifier": {
            "weight": rng.normal(size=(labels, width)).astype(np.float32),
            "bias": rng.normal(size=labels).astype(np.float32),
        }
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_real_minilm_holds_what_a_merge_writes_and_then_its_own_bits(minilm_path, tmp_path, dtype):
    modules = {f"encoder.layer.{i}.attention.self.{part}": (384, 384) for i in range(6) for part in ("query", "value")}
    checkpoint = open_checkpoint(minilm_path)
    known = fingerprint_of(checkpoint, modules)
    one, two = (
        stored(random_adapter(modules, n=750, seed=seed, fingerprint=known), tmp_path / f"{seed}.safetensors")
        for seed in (1, 2)
    )
    model = AutoModel.from_pretrained(minilm_path, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "base")  # in this dtype: what a merge adds to is what the model holds
    base, addresses = bits(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    for before, after in ((None, one), (one, two)):
        report = swap(model, before, after)
        out = f"{after}-merged"
        merge_adapters(tmp_path / "base", [after], out, device="cpu")
        assert_same(model, AutoModel.from_pretrained(out, dtype=getattr(torch, dtype)))
        assert (report.weights, report.verified, report.heads) == (12, True, 0)
        assert report.weight_bytes == 12 * 384 * 384 * getattr(torch, dtype).itemsize
        assert 0 < report.undo_bytes < report.weight_bytes / 2  # far from a copy
    assert held_by(model).digest == read_adapter(two).digest
    report = swap(model, two, None)
    assert (report.weights, report.undo_bytes, report.verified) == (0, 0, None)
    assert bits(model) == base
    assert held_by(model) is None
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses  # in place, no copy


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("gpt2", {"h.0.attn.c_attn": (144, 48), "h.1.attn.c_proj": (48, 48)}),  # Conv1D: stored [in, out]
        ("llama", {"model.layers.1.mlp.down_proj": (48, 80)}),
        ("vit", {"vit.encoder.layer.0.attention.attention.query": (48, 48)}),  # renamed by transformers
    ],
)
def test_layouts_and_names(pico, tmp_path, architecture, modules):
    auto = AutoModelForCausalLM if architecture == "llama" else AutoModel
    folder = pico(architecture, task="causal-lm" if architecture == "llama" else "base")
    adapter = stored(random_adapter(modules), tmp_path / "a.safetensors")
    model = auto.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = bits(model)
    swap(model, None, adapter)
    merge_adapters(tmp_path / "base", [adapter], tmp_path / "merged", device="cpu")
    assert_same(model, auto.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16))
    swap(model, adapter, None)
    assert bits(model) == base


def test_heads_and_labels_come_and_go(pico, tmp_path):
    """From a base with three labels to adapters with five and two, and back: sizes, names, the very same parameters."""
    model = AutoModelForSequenceClassification.from_pretrained(pico("bert", "text-classification", labels=3)).eval()
    base, parameter = bits(model), model.classifier.weight
    names = model.config.id2label
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    modules = {f"bert.{module}": shape for module, shape in BERT.items()}
    five = random_adapter(modules, heads=head(5), labels=tuple("abcde"), seed=1, digest="5")
    two = random_adapter(modules, heads=head(2), seed=2, digest="2")
    report = swap(model, None, five)
    assert report.labels == tuple("abcde") == tuple(model.config.id2label[i] for i in range(5))
    assert (report.heads, model.num_labels, model.config.num_labels, model.classifier.out_features) == (2, 5, 5, 5)
    assert model(**inputs).logits.shape == (1, 5)
    assert swap(model, five, two).labels == ("LABEL_0", "LABEL_1")
    assert model(**inputs, labels=torch.tensor([1])).loss.isfinite()
    reference = AutoModelForSequenceClassification.from_pretrained(pico("bert", "text-classification", labels=3))
    for name, delta in two.deltas.items():
        delta.add_to(reference.get_submodule(name).weight.data)
    for name, tensor in two.replaced["classifier"].tensors.items():
        setattr(reference.classifier, name, torch.nn.Parameter(torch.from_numpy(tensor)))
    reference.num_labels = 2
    assert torch.equal(model(**inputs).logits, reference.eval()(**inputs).logits)
    assert swap(model, two, None).labels == tuple(names.values())
    assert bits(model) == base
    assert model.classifier.weight is parameter
    assert (model.num_labels, model.config.num_labels, model.classifier.out_features) == (3, 3, 3)
    assert swap(model, None, five, head=False).heads == 0
    assert model.num_labels == 3


def test_every_kind_of_change(pico):
    """Products of thin matrices, and changes that read the weight and move its bias, in one adapter."""
    rng = np.random.default_rng(0)
    first, second, *_ = BERT
    adapter = random_adapter(BERT, digest="x")
    deltas = dict(adapter.deltas)
    deltas[first] = LowRankDelta(
        rng.normal(size=(4, 48)).astype(np.float32), rng.normal(size=(48, 4)).astype(np.float32), 0.1
    )
    scales = {"scale": rng.normal(size=48).astype(np.float32), "shift": rng.normal(size=48).astype(np.float32)}
    deltas[second] = relative = DiagonalDelta((48, 48), scales, outer=scales["scale"], shift=scales["shift"])
    adapter = replace(adapter, deltas=deltas)
    model = AutoModel.from_pretrained(pico("bert"), dtype=torch.bfloat16)
    module = model.get_submodule(second)
    base, weight, bias = bits(model), module.weight.detach().clone(), module.bias
    swap(model, None, adapter)
    assert torch.equal(module.weight, relative.add_to(weight.clone()))
    want = scales["scale"].astype(np.float64) * bias.double().detach().numpy() + scales["shift"]
    assert torch.equal(module.bias, torch.from_numpy(want).bfloat16())
    swap(model, adapter, None)
    assert bits(model) == base
    assert module.bias is bias
    assert bias.requires_grad


def test_a_weight_that_would_lose_most_of_its_bits_is_kept(pico):
    """ΔW a million times W: every bit is lost, and the weight itself is what brings it back."""
    model = AutoModel.from_pretrained(pico("bert"), dtype=torch.bfloat16)
    base = bits(model)
    adapter = random_adapter(BERT, alpha=1e9, n=2000, digest="x")
    report = swap(model, None, adapter)
    assert report.undo_bytes == report.weight_bytes
    swap(model, adapter, None)
    assert bits(model) == base


def test_nan_and_minus_zero_come_back(pico):
    model = AutoModel.from_pretrained(pico("bert"))
    weight = model.get_submodule(next(iter(BERT))).weight.data
    weight[0, :3] = torch.tensor([torch.nan, -0.0, torch.inf])
    base = bits(model)
    adapter = random_adapter(BERT, digest="x")
    swap(model, None, adapter)
    swap(model, adapter, None)
    assert bits(model) == base


def test_what_the_model_holds_must_be_said(pico, tmp_path):
    model = AutoModel.from_pretrained(pico("bert"))
    one, two = (random_adapter(BERT, seed=seed, digest=str(seed)) for seed in (1, 2))
    path = stored(one, tmp_path / "one.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"holds the base, not .*one.safetensors"):
        swap(model, path, two)
    swap(model, None, path)
    held = bits(model)
    with pytest.raises(AdapterMismatchError, match=r"holds .*one.safetensors, not the base"):
        swap(model, None, two)
    with pytest.raises(AdapterMismatchError, match=r"holds .*one.safetensors, not random"):
        swap(model, two, None)
    assert bits(model) == held
    swap(model, read_adapter(path), None)  # the same content by another way


@pytest.mark.hostile
def test_what_cannot_be_swapped_is_refused_before_anything_changes(pico, tmp_path):
    adapter = random_adapter(BERT, digest="x")
    model = AutoModel.from_pretrained(pico("bert"))
    base = bits(model)
    with pytest.raises(AdapterMismatchError, match="match nothing"):
        swap(model, None, random_adapter({"encoder.layer.7.attention.self.query": (48, 48)}))
    with pytest.raises(AdapterMismatchError, match="48×80; the model has 48×48"):
        swap(model, None, random_adapter({next(iter(BERT)): (48, 80)}))
    with pytest.raises(AdapterMismatchError, match=r"head classifier.*nothing there.*\n.*AutoModelForSequence"):
        swap(model, None, random_adapter(BERT, heads=head(2)))
    foreign = fingerprint_of(open_checkpoint(pico("bert", seed=1)), BERT)
    with pytest.raises(FingerprintError, match="trained on another base than this model"):
        swap(model, None, random_adapter(BERT, fingerprint=foreign))
    elsewhere = fingerprint_of(open_checkpoint(pico("gpt2")), ["h.0.attn.c_attn"])
    with pytest.raises(FingerprintError, match="trained on another base"):
        swap(model, None, random_adapter(BERT, fingerprint=elsewhere))
    with pytest.raises(AdapterMismatchError, match="no torch model"):
        swap(torch.nn.Linear(2, 2), None, adapter)
    assert bits(model) == base
    with torch.device("meta"):
        ghost = AutoModel.from_config(model.config)
    with pytest.raises(AdapterMismatchError, match="on the meta device"):
        swap(ghost, None, adapter)
    packed = AutoModel.from_pretrained(pico("bert"))
    packed.encoder.layer[0].attention.self.query.weight = torch.nn.Parameter(
        torch.zeros(48, 48, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(AdapterMismatchError, match=r"torch.uint8: the model is quantised"):
        swap(packed, None, adapter)
    tied = AutoModelForCausalLM.from_pretrained(pico("llama", task="causal-lm"))
    with pytest.raises(
        AdapterMismatchError, match=r"lm_head.weight is model.embed_tokens.weight too \(they are tied\)"
    ):
        swap(tied, None, random_adapter({"lm_head": (64, 48)}))
    sharded = AutoModel.from_pretrained(pico("bert"))
    sharded.encoder.layer[0].attention.self.query.weight.device_mesh = "2 ranks"
    with pytest.raises(AdapterMismatchError, match="is sharded"):
        swap(sharded, None, adapter)


def test_a_fingerprint_is_of_the_base_also_while_another_adapter_is_in(pico):
    known = fingerprint_of(open_checkpoint(pico("bert")), BERT)
    one, two = (random_adapter(BERT, alpha=3000.0, seed=s, digest=str(s), fingerprint=known) for s in (1, 2))
    model = AutoModel.from_pretrained(pico("bert"))
    assert swap(model, None, one).verified
    assert swap(model, one, two).verified


def test_weights_that_others_changed_are_noticed(pico):
    model = AutoModel.from_pretrained(pico("bert"))
    adapter = random_adapter(BERT, digest="x")
    swap(model, None, adapter)
    model.get_submodule(list(BERT)[-1]).weight.data[3, 5] += 1.0
    with pytest.raises(VerificationError, match=r"not what swap left there.*\n.*load the model again"):
        swap(model, adapter, None)


def test_a_failure_on_the_way_leaves_the_base(pico, monkeypatch):
    model = AutoModelForSequenceClassification.from_pretrained(pico("bert", "text-classification"))
    base = bits(model)
    adapter = random_adapter({f"bert.{m}": s for m, s in BERT.items()}, heads=head(5), digest="x")
    calls = iter(range(100))
    undo_of = swapping.undo_of

    def failing(*args):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return undo_of(*args)

    monkeypatch.setattr(swapping, "undo_of", failing)
    with pytest.raises(torch.OutOfMemoryError):
        swap(model, None, adapter)
    assert bits(model) == base
    assert held_by(model) is None


def test_nothing_outlives_the_model(pico):
    model = AutoModel.from_pretrained(pico("bert"))
    swap(model, None, random_adapter(BERT, digest="x"))
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
    assert not [m for m in swapping._held if m is None]


def test_the_base_to_the_base_is_nothing(pico):
    report = swap(AutoModel.from_pretrained(pico("bert")), None, None)
    assert (report.weights, report.undo_bytes) == (0, 0)


def test_it_is_public():
    assert ssh_deploy.swap is swap


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(minilm_path, dtype):
    """The same through the fused kernels, twelve matrices in one launch; exact again and again."""
    modules = {f"encoder.layer.{i}.attention.self.{part}": (384, 384) for i in range(6) for part in ("query", "value")}
    one, two = (random_adapter(modules, n=750, seed=s, digest=str(s)) for s in (1, 2))
    model = AutoModel.from_pretrained(minilm_path, dtype=dtype).cuda()
    base = bits(model)
    for _ in range(3):
        swap(model, None, one)
        held = bits(model)
        swap(model, one, two)
        swap(model, two, one)
        assert bits(model) == held
        swap(model, one, None)
        assert bits(model) == base

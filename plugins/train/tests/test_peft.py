"""The methods as PEFT uses them: made, trained, saved, loaded, merged, switched and mixed."""

import importlib
import json
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import ssh_deploy_train
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.numpy import load_file
from ssh_deploy_train import SDCTFTConfig, SSHConfig, SSHLayer
from torch import nn

from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.transforms import reference

# PEFT 0.21 still asks transformers 5 for the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TARGETS = ["first", "second"]
CONFIGS = [
    pytest.param(SSHConfig, {"transform": "hartley"}, id="hartley"),
    pytest.param(SSHConfig, {"transform": "hartley-joint"}, id="hartley-joint"),
    pytest.param(SDCTFTConfig, {"scaling": 0.7}, id="cosine"),
]


def adapted(model, kind=SSHConfig, *, n=30, seed=0, name="default", fill=True, **fields):
    made = get_peft_model(model, kind(n_frequency=n, target_modules=TARGETS, seed=seed, **fields), adapter_name=name)
    if fill:
        randomise(made, name, seed)
    return made


def randomise(model, name, seed=0):
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for layer in layers(model):
            spectrum = layer.ssh_spectrum[name]
            spectrum.copy_(torch.randn(spectrum.shape, generator=generator))


def layers(model):
    return [module for module in model.modules() if isinstance(module, SSHLayer)]


def dense(layer, name="default"):
    """ΔW by the definition, float64."""
    config = layer.ssh_configs[name]
    rows, cols = layer.ssh_indices[name].numpy()
    shape = (layer.out_features, layer.in_features)
    values = layer.ssh_spectrum[name].detach().double().numpy()
    return reference.delta(config.transform, rows, cols, values, shape, alpha=config.scaling, norm=config.norm)


def inputs(rows=6, width=20, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- registry ---------------------------------------------------------------------------------------------------


def test_importing_registers_both_types():
    for name, config in (("SSH", SSHConfig), ("SDCTFT", SDCTFTConfig)):
        assert PeftType(name) is PeftType[name] is getattr(PeftType, name)
        assert PeftType[name] in list(PeftType)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] is config
    assert issubclass(PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SSH], peft.tuners.tuners_utils.BaseTuner)
    assert len({str(member.value) for member in PeftType}) == len(list(PeftType))


def test_importing_again_changes_nothing():
    before = list(PeftType)
    code = "import ssh_deploy_train, importlib; importlib.reload(ssh_deploy_train); import ssh_deploy_train"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
    importlib.reload(ssh_deploy_train)
    assert list(PeftType) == before


def test_a_type_that_another_package_holds_is_refused():
    from ssh_deploy_train.register import register_methods

    with pytest.raises(RuntimeError, match=r"SSH is already registered by ssh_deploy_train\.config\.SSHConfig"):
        register_methods({"SSH": (SDCTFTConfig, ssh_deploy_train.SDCTFTModel)})


# --- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (SSHConfig, {"n_frequency": 0}, "n_frequency is 0"),
        (SSHConfig, {"n_frequency": -3}, "n_frequency is -3"),
        (SSHConfig, {"n_frequency": 7.5}, "n_frequency is 7.5"),
        (SSHConfig, {"n_frequency": True}, "n_frequency is True"),
        (SSHConfig, {"transform": "cosine"}, "SSH knows hartley, hartley-joint"),
        (SSHConfig, {"transform": "wavelet"}, "'wavelet'"),
        (SDCTFTConfig, {"transform": "hartley"}, "SDCTFT knows cosine"),
        (SSHConfig, {"delta_ratio": 1.5}, r"delta_ratio is 1\.5"),
        (SSHConfig, {"delta_ratio": -0.1}, r"delta_ratio is -0\.1"),
        (SSHConfig, {"delta_ratio": float("nan")}, "delta_ratio is nan"),
        (SSHConfig, {"scaling": float("inf")}, "scaling is inf"),
        (SSHConfig, {"seed": -1}, "seed is -1"),
        (SSHConfig, {"target_modules": "a.*", "layers_to_transform": [1]}, "layers_to_transform"),
        (SSHConfig, {"layers_pattern": "layer"}, "layers_pattern needs"),
    ],
)
def test_bad_configs_say_what_and_which(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_more_coefficients_than_a_weight_has_places(two_layers):
    with pytest.raises(ValueError, match=r"n_frequency is 261, but first is 13×20 = 260"):
        get_peft_model(two_layers(), SSHConfig(n_frequency=261, target_modules=["first"]))
    made = get_peft_model(two_layers(), SSHConfig(n_frequency=260, target_modules=["first"]))
    places = layers(made)[0].ssh_indices["default"]
    assert len({tuple(place) for place in places.T.tolist()}) == 260


def test_an_unsupported_layer_is_refused():
    with pytest.raises(TypeError, match="Embedding is not supported"):
        get_peft_model(nn.Sequential(nn.Embedding(5, 5)), SSHConfig(n_frequency=2, target_modules=["0"]))


# --- forward and training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fields"), CONFIGS)
def test_an_untrained_adapter_changes_nothing_and_only_it_trains(two_layers, kind, fields):
    base = two_layers()
    want = base(inputs())
    model = adapted(base, kind, fill=False, **fields)
    assert torch.equal(model(inputs()), want)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {f"base_model.model.{target}.ssh_spectrum.default" for target in TARGETS}


@pytest.mark.parametrize(("kind", "fields"), CONFIGS)
def test_forward_is_the_dense_definition(two_layers, kind, fields):
    model = adapted(two_layers(), kind, **fields)
    x = inputs()
    for layer, width in zip(layers(model), (20, 13), strict=True):
        x = inputs(width=width)
        want = layer.base_layer(x).double() + x.double() @ torch.from_numpy(dense(layer)).T
        torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), torch.from_numpy(dense(layer)), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(("kind", "fields"), CONFIGS)
def test_training_lowers_the_loss(two_layers, kind, fields):
    model = adapted(two_layers(), kind, fill=False, **fields)
    x, y = inputs(32), torch.arange(32) % 3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_a_float32_spectrum(two_layers, tmp_path, dtype):
    model = adapted(two_layers(dtype), fill=False)
    spectra = [layer.ssh_spectrum["default"] for layer in layers(model)]
    assert all(spectrum.dtype == torch.float32 for spectrum in spectra)
    randomise(model, "default")
    out = model(inputs(dtype=dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(spectrum.grad is not None and spectrum.grad.dtype == torch.float32 for spectrum in spectra)
    layer = layers(model)[0]
    x = inputs(dtype=dtype)
    want = layer.base_layer(x).double() + x.double() @ torch.from_numpy(dense(layer)).T
    with torch.no_grad():
        assert float((layer(x).double() - want).abs().max()) < 0.02 * float(want.abs().max())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(two_layers(dtype), tmp_path)
    for mine, theirs in zip(layers(model), layers(again), strict=True):
        assert theirs.ssh_spectrum["default"].dtype == torch.float32
        assert torch.equal(mine.ssh_spectrum["default"], theirs.ssh_spectrum["default"])


def test_autocast_and_gradient_through_frozen_inputs(two_layers):
    model = adapted(two_layers())
    x = inputs().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(layer.ssh_spectrum["default"].grad.abs().sum() > 0 for layer in layers(model))


# --- places -----------------------------------------------------------------------------------------------------


def test_places_follow_the_base_spectrum_and_the_seed(two_layers):
    from ssh_deploy.transforms import get_transform

    first = layers(adapted(two_layers(), n=100, delta_ratio=0.7, seed=5))[0]
    same = layers(adapted(two_layers(), n=100, delta_ratio=0.7, seed=5))[0]
    other = layers(adapted(two_layers(), n=100, delta_ratio=0.7, seed=6))[0]
    places = {tuple(place) for place in first.ssh_indices["default"].T.tolist()}
    assert torch.equal(first.ssh_indices["default"], same.ssh_indices["default"])
    assert not torch.equal(first.ssh_indices["default"], other.ssh_indices["default"])
    energy = np.abs(get_transform("hartley").analyze(first.base_layer.weight.detach().numpy()))
    largest = np.argsort(energy, axis=None)[::-1][:70]
    assert {(int(i) // 20, int(i) % 20) for i in largest} <= places


def test_two_weights_of_one_shape_draw_their_own_random_places():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    made = get_peft_model(model, SSHConfig(n_frequency=40, delta_ratio=0.0, target_modules=["0", "1"]))
    a, b = layers(made)
    assert not torch.equal(a.ssh_indices["default"], b.ssh_indices["default"])


def test_joint_places_come_from_the_joint_spectrum(two_layers):
    separable = layers(adapted(two_layers(), n=60, delta_ratio=1.0))[0]
    joint = layers(adapted(two_layers(), n=60, delta_ratio=1.0, transform="hartley-joint"))[0]
    assert not torch.equal(separable.ssh_indices["default"], joint.ssh_indices["default"])


# --- saving and loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fields"), CONFIGS)
def test_save_and_load_is_bit_exact(two_layers, tmp_path, kind, fields):
    model = adapted(two_layers(), kind, modules_to_save=["head"], **fields)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.first.ssh_spectrum"].dtype == np.float32
    assert saved["base_model.model.first.ssh_indices"].dtype == np.int32
    assert saved["base_model.model.first.ssh_indices"].shape == (2, 30)
    assert set(saved) == {
        *(f"base_model.model.{t}.ssh_{part}" for t in TARGETS for part in ("spectrum", "indices")),
        "base_model.model.head.weight",
        "base_model.model.head.bias",
    }
    again = PeftModel.from_pretrained(two_layers(), tmp_path, adapter_name="other")
    for mine, theirs in zip(layers(model), layers(again), strict=True):
        assert torch.equal(mine.ssh_spectrum["default"], theirs.ssh_spectrum["other"])
        assert torch.equal(mine.ssh_indices["default"], theirs.ssh_indices["other"])
        assert theirs.ssh_indices["other"].dtype == torch.int32
        assert not theirs.ssh_spectrum["other"].requires_grad
    assert torch.equal(model(inputs()), again(inputs()))


def test_a_loaded_adapter_can_train_on(two_layers, tmp_path):
    adapted(two_layers()).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(two_layers(), tmp_path, is_trainable=True)
    want = PeftModel.from_pretrained(two_layers(), tmp_path)(inputs())
    assert torch.equal(again(inputs()), want)
    again(inputs()).sum().backward()
    assert all(layer.ssh_spectrum["default"].grad.abs().sum() > 0 for layer in layers(again))


def test_loading_onto_meta_parameters(two_layers, tmp_path):
    model = adapted(two_layers())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(two_layers(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(model(inputs()), again(inputs()))


def test_places_loaded_over_used_ones_are_used(two_layers, tmp_path):
    """The plan of a layer is made again when its places change under it."""
    model = adapted(two_layers(), seed=1)
    model.save_pretrained(tmp_path)
    want = model(inputs())
    other = adapted(two_layers(), seed=2)
    assert not torch.allclose(other(inputs()), want)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(other(inputs()), want)


def test_the_core_reads_what_is_saved(two_layers, tmp_path):
    model = adapted(
        two_layers(), modules_to_save=["head"], scaling=12.5, delta_ratio=0.5, seed=4, labels=["a", "b", "c"]
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "SSH"
    assert config["module_shapes"] == {"first": [13, 20], "second": [13, 13]}
    adapter = read_adapter(tmp_path)
    assert set(adapter.deltas) == set(TARGETS)
    assert adapter.labels == ("a", "b", "c")
    assert set(adapter.replaced) == {"head"}
    assert adapter.settings == {"n": 30, "delta_ratio": 0.5, "seed": 4}
    for layer, target in zip(layers(model), TARGETS, strict=True):
        got = adapter.deltas[target].dense(dtype=torch.float64).numpy()
        np.testing.assert_allclose(got, dense(layer), atol=1e-12)


def test_labels_come_from_the_model(pico_bert):
    fields = {"n_frequency": 20, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    named = pico_bert({0: "no", 1: "yes", 2: "maybe"})
    assert get_peft_model(named, SSHConfig(**fields)).peft_config["default"].labels == ["no", "yes", "maybe"]
    assert get_peft_model(pico_bert(None), SSHConfig(**fields)).peft_config["default"].labels is None


# --- several adapters, merging ----------------------------------------------------------------------------------


@pytest.fixture
def three(two_layers):
    """A model with adapters a, b (its own n and α) and c (on one layer only)."""
    model = adapted(two_layers(), name="a", seed=1)
    model.add_adapter("b", SSHConfig(n_frequency=50, scaling=60.0, target_modules=TARGETS, seed=2))
    model.add_adapter("c", SSHConfig(n_frequency=10, target_modules=["second"], seed=3))
    for seed, name in enumerate("ab"):
        randomise(model, name, seed)
    with torch.no_grad():
        layers(model)[1].ssh_spectrum["c"].fill_(0.5)
    return model.eval()


def alone(model, name):
    model.set_adapter(name)
    with torch.no_grad():
        return model(inputs())


def base_of(model):
    with model.disable_adapter(), torch.no_grad():
        return model(inputs())


def test_switching_and_disabling(three, two_layers):
    results = [alone(three, name) for name in "abc"]
    assert not any(torch.allclose(results[i], results[j]) for i in range(3) for j in range(i))
    with torch.no_grad():
        assert torch.equal(base_of(three), two_layers()(inputs()))
    assert torch.equal(alone(three, "a"), results[0])


def test_active_adapters_add_up(three):
    three.base_model.set_adapter(["a", "b"])
    layer = layers(three)[0]
    x = inputs()
    want = layer.base_layer(x).double() + x.double() @ torch.from_numpy(dense(layer, "a") + dense(layer, "b")).T
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-5)


def test_adapter_names_give_each_row_its_own(three):
    names = ["a", "__base__", "b", "c", "a", "__base__"]
    wanted = {name: alone(three, name) for name in "abc"} | {"__base__": base_of(three)}
    with torch.no_grad():
        mixed = three(inputs(), adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], wanted[name][row], rtol=0, atol=1e-6)


def test_adapter_names_reach_replaced_heads(two_layers):
    model = adapted(two_layers(), name="a", seed=1, modules_to_save=["head"])
    model.add_adapter("b", SSHConfig(n_frequency=30, target_modules=TARGETS, seed=2, modules_to_save=["head"]))
    randomise(model, "b", 5)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["b"].bias.add_(3.0)
    model.eval()
    wanted = {name: alone(model, name) for name in "ab"} | {"__base__": base_of(model)}
    names = ["b", "a", "__base__", "b", "a", "a"]
    with torch.no_grad():
        mixed = model(inputs(), adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], wanted[name][row], rtol=0, atol=1e-6)


def test_adapter_names_that_cannot_be_served_are_refused(three):
    with pytest.raises(ValueError, match="asks for nobody; there is a, b, c"):
        three(inputs(), adapter_names=["nobody"] * 6)
    with pytest.raises(ValueError, match="2 names for 6 rows"):
        three(inputs(), adapter_names=["a", "b"])
    three.train()
    with pytest.raises(ValueError, match="training mode"):
        three(inputs(), adapter_names=["a"] * 6)
    three.eval()
    three.set_adapter("a")
    three.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        three(inputs(), adapter_names=["a"] * 6)
    three.unmerge_adapter()
    three(inputs())  # no hook is left behind by the refusals


def test_deleting_an_adapter(three):
    want = alone(three, "b")
    three.delete_adapter("a")
    assert torch.equal(alone(three, "b"), want)
    for layer in layers(three):
        assert "a" not in layer.ssh_spectrum
        assert "a" not in layer.ssh_indices
        assert "a" not in layer.ssh_configs
    with pytest.raises(ValueError, match="a"):
        three.set_adapter("a")


def test_deleting_and_adding_again_under_one_name(two_layers):
    model = adapted(two_layers(), name="a", seed=1)
    model.add_adapter("b", SSHConfig(n_frequency=30, target_modules=TARGETS, seed=2))
    model(inputs())
    model.delete_adapter("b")
    model.add_adapter("b", SSHConfig(n_frequency=44, target_modules=TARGETS, seed=9))
    randomise(model, "b")
    model.set_adapter("b")
    layer = layers(model)[0]
    want = layer.base_layer(inputs()).double() + inputs().double() @ torch.from_numpy(dense(layer, "b")).T
    torch.testing.assert_close(layer(inputs()).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(("kind", "fields"), CONFIGS)
def test_merging_gives_the_same_and_unmerging_the_base(two_layers, kind, fields, safe):
    model = adapted(two_layers(), kind, **fields).eval()
    before = [layer.base_layer.weight.clone() for layer in layers(model)]
    with torch.no_grad():
        want = model(inputs())
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(inputs()), want, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        for layer, weight in zip(layers(model), before, strict=True):
            torch.testing.assert_close(layer.base_layer.weight, weight, rtol=0, atol=1e-6)
        plain = model.merge_and_unload(safe_merge=safe)
        assert not layers(plain)
        assert isinstance(plain.first, nn.Linear)
        torch.testing.assert_close(plain(inputs()), want, rtol=0, atol=1e-5)


def test_merging_several_and_disabling_while_merged(three):
    base = base_of(three)
    three.base_model.set_adapter(["a", "b"])
    with torch.no_grad():
        want = three(inputs())
        three.merge_adapter(["a", "b"])
        torch.testing.assert_close(three(inputs()), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(base_of(three), base, rtol=0, atol=1e-5)


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight(two_layers):
    model = adapted(two_layers())
    layer = layers(model)[0]
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.ssh_spectrum["default"][3] = float("nan")
    with pytest.raises(ValueError, match="Merging adapter default gives NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_merge_is_one_rounding_of_the_exact_sum(two_layers, dtype):
    model = adapted(two_layers(dtype))
    layer = layers(model)[0]
    exact = layer.base_layer.weight.detach().double() + torch.from_numpy(dense(layer))
    model.merge_adapter()
    assert layer.base_layer.weight.dtype == dtype
    off = (layer.base_layer.weight.double() - exact).abs()
    assert float((off - exact.abs() * torch.finfo(dtype).eps * 0.51).max()) < 1e-6


def test_unloading_gives_the_base_back(two_layers):
    model = adapted(two_layers())
    assert torch.equal(model.unload()(inputs()), two_layers()(inputs()))


# --- transformers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pico_bert():
    from transformers import BertConfig, BertForSequenceClassification

    def make(names):
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
        labels = (
            {"num_labels": 3} if names is None else {"id2label": names, "label2id": {v: k for k, v in names.items()}}
        )
        return BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, **labels)).eval()

    return make


def test_conv1d_of_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=64, bos_token_id=2, eos_token_id=3)).eval()

    ids = torch.arange(12).reshape(2, 6)
    model = get_peft_model(gpt2(), SSHConfig(n_frequency=60, task_type="CAUSAL_LM"))
    randomise(model, "default")
    model.eval()
    layer = layers(model)[0]
    assert (layer.out_features, layer.in_features) == (144, 48)  # c_attn, three times as tall as wide
    x = inputs(width=48)
    want = layer.base_layer(x).double() + x.double() @ torch.from_numpy(dense(layer)).T
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-5)
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        again = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
        assert torch.equal(again(ids).logits, logits)
        with again.disable_adapter():
            assert torch.equal(again(ids).logits, gpt2()(ids).logits)
        torch.testing.assert_close(again.merge_and_unload()(ids).logits, logits, rtol=0, atol=1e-5)
    assert read_adapter(tmp_path).task == "causal-lm"
    generated = model.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 9)


def test_adapter_names_in_beam_search():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_layer=1, n_head=4, n_positions=64, vocab_size=64, bos_token_id=2, eos_token_id=3)
    model = get_peft_model(
        GPT2LMHeadModel(config), SSHConfig(n_frequency=60, target_modules=["c_attn"]), adapter_name="a"
    )
    with torch.no_grad():
        for layer in layers(model):
            layer.ssh_spectrum["a"].normal_(std=5.0)
    model.eval()
    ids = torch.arange(4, 16).reshape(2, 6)
    fields = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["a", "__base__"], **fields)
    assert torch.equal(mixed[:1, :], model.generate(input_ids=ids[:1], **fields))
    with model.disable_adapter():
        assert torch.equal(mixed[1:, :], model.generate(input_ids=ids[1:], **fields))


def test_layers_to_transform_and_default_targets(pico_bert):
    made = get_peft_model(pico_bert(None), SSHConfig(n_frequency=9, target_modules=["query"], layers_to_transform=[1]))
    assert list(made.peft_config["default"].module_shapes) == ["bert.encoder.layer.1.attention.self.query"]
    made = get_peft_model(pico_bert(None), SSHConfig(n_frequency=9))
    assert sorted({path.rsplit(".", 1)[1] for path in made.peft_config["default"].module_shapes}) == ["query", "value"]


def test_gradient_checkpointing(pico_bert):
    ids = torch.arange(12).reshape(2, 6)
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(pico_bert(None), SSHConfig(n_frequency=20, target_modules=["query", "value"]))
        randomise(model, "default")
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(ids).logits.sum().backward()
        gradients.append([layer.ssh_spectrum["default"].grad.clone() for layer in layers(model)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)

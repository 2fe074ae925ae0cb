"""IntLoRA against the released layers' formulas in float64; merged into floats and into int8; and what is refused."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from transformers import AutoModel

from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.cli.main import main
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy.testing import FamilyContract, write_peft_example

SHAPES = {"encoder.0.q": (6, 10), "encoder.1.v": (8, 8)}
RANK = 2
CODES = "base_model.model.encoder.0.q.ori_weight_round"


def trained(rng, weight, *, variant="mul", bits=8):
    """Tensors of one module as the released layer saves them, for a base ``weight`` [out, in]."""
    out, inn = weight.shape
    top, span = 2**bits - 1, np.abs(weight).max(axis=1, keepdims=True)
    part = {"aux_R": (0.2 * span * rng.laplace(size=weight.shape)).astype(np.float32)}
    apart = weight - part["aux_R"]
    low, high = apart.min(axis=1, keepdims=True), apart.max(axis=1, keepdims=True)
    part["weight_quant_delta"] = ((high - low) / top).astype(np.float32)
    part["weight_quant_zero_point"] = np.rint(-low / part["weight_quant_delta"]).astype(np.float32)
    codes = np.rint(apart / part["weight_quant_delta"]) + part["weight_quant_zero_point"]
    part["ori_weight_round"] = np.clip(codes, 0, top).astype(np.float32)
    part["loraA.weight"] = rng.normal(size=(RANK, inn)).astype(np.float32)
    part["loraB.weight"] = (0.1 * span * rng.normal(size=(out, RANK))).astype(np.float32)
    if variant == "mul":
        v = factor(part)
        part["double_quant_delta"] = ((v.max(axis=1, keepdims=True) - v.min(axis=1, keepdims=True)) / top).astype("f4")
        part["double_quant_zero_point"] = np.rint(-v.min(axis=1, keepdims=True) / part["double_quant_delta"])
        part["double_quant_zero_point"] = part["double_quant_zero_point"].astype(np.float32)
    return part


def factor(part):
    p = {name: tensor.astype(float) for name, tensor in part.items()}
    integers = p["ori_weight_round"] - p["weight_quant_zero_point"]
    change = (p["aux_R"] + p["loraB.weight"] @ p["loraA.weight"]) / np.where(integers == 0, 1, integers)
    return p["weight_quant_delta"] + change


def definition(part, *, bits=8):
    """W′ float64, as the released forward passes simulate it."""
    integers = part["ori_weight_round"].astype(float) - part["weight_quant_zero_point"]
    v = factor(part)
    if "double_quant_delta" in part:
        step, zero = part["double_quant_delta"].astype(float), part["double_quant_zero_point"]
        return step * (np.clip(np.rint(v / step) + zero, 0, 2**bits - 1) - zero) * integers
    return np.sign(v) * 2.0 ** np.rint(np.log2(np.abs(v) + 1e-16)) * integers


class IntLoRAContract(FamilyContract):
    family, variant, bits = "intlora", "mul", 8

    def example(self, rng):
        weights = {module: np.random.default_rng(8).normal(size=shape) for module, shape in SHAPES.items()}
        parts = {m: trained(rng, w, variant=self.variant, bits=self.bits) for m, w in weights.items()}
        tensors = {f"base_model.model.{m}.{name}": t for m, part in parts.items() for name, t in part.items()}
        config = {"peft_type": "INTLORA", "variant": self.variant, "n_bits": self.bits, "r": RANK}
        want = {m: lambda w, part=part: definition(part, bits=self.bits) - w for m, part in parts.items()}
        return config, tensors, SHAPES, want


class TestMultiply(IntLoRAContract):
    pass


class TestShift(IntLoRAContract):
    variant = "shift"


class TestFourBits(IntLoRAContract):
    bits = 4


def read(tmp_path, contract=TestMultiply, change=lambda tensors: tensors, **config):
    fields, tensors, shapes, _ = contract().example(np.random.default_rng(7))
    folder = write_peft_example(tmp_path / "a", {**fields, **config}, change(tensors))
    return read_folder(folder, shapes=shapes)


@pytest.mark.parametrize("contract", [TestMultiply, TestShift, TestFourBits])
def test_the_product_is_whole_and_eight_bits_of_it_are_within_half_a_step(tmp_path, contract):
    _, tensors, _, _ = contract().example(np.random.default_rng(7))
    for module, delta in read(tmp_path, contract).deltas.items():
        part = {name.rpartition(f"{module}.")[2]: t for name, t in tensors.items() if f".{module}." in name}
        numbers, scale = delta.product()
        want = definition(part, bits=contract.bits)
        np.testing.assert_allclose(numbers * scale[:, None], want, rtol=1e-12, atol=1e-15)
        codes, step, lost = delta.integers()
        assert (codes.dtype, step.dtype, np.abs(codes).max()) == (np.int8, np.float32, 127)
        error = np.abs(codes * step.astype(float)[:, None] - want)
        assert (error <= 0.5001 * step[:, None]).all()
        assert lost == pytest.approx(np.square(error).sum(), rel=1e-6)


def test_powers_far_apart_stay_in_sixty_four_bits(tmp_path):
    def vanishing(tensors):  # s + R/W_int = 0 at one place, or what float32 leaves of it
        part = {name: tensors[f"base_model.model.encoder.0.q.{name}"] for name in ("loraB.weight", "aux_R")}
        step, zero = (tensors[f"base_model.model.encoder.0.q.weight_quant_{x}"] for x in ("delta", "zero_point"))
        part["loraB.weight"][0] = 0
        part["aux_R"][0] = 0
        part["aux_R"][0, 0] = -step[0, 0] * (tensors[CODES][0, 0] - zero[0, 0])
        return tensors

    numbers, scale = read(tmp_path, TestShift, vanishing).deltas["encoder.0.q"].product()
    assert np.isfinite(scale).all()
    assert np.abs(numbers[0, 0]) * scale[0] < 1e-6 < 1e-3 < np.abs(numbers[0, 1]) * scale[0]


@pytest.mark.parametrize("contract", [TestMultiply, TestShift])
def test_written_and_read_again_it_is_the_same(tmp_path, contract):
    adapter = read(tmp_path, contract)
    write_folder(adapter, tmp_path / "again")
    again = read_folder(tmp_path / "again")
    for module, delta in adapter.deltas.items():
        weight = torch.from_numpy(np.random.default_rng(8).normal(size=SHAPES[module]))
        assert torch.equal(delta.change(weight), again.deltas[module].change(weight))
        assert again.deltas[module].parameters == delta.parameters


def test_zeros_that_were_trained_with_fractions_are_the_nearest_whole_ones(tmp_path):
    key = "base_model.model.encoder.0.q.double_quant_zero_point"
    plain = read(tmp_path, TestMultiply).deltas["encoder.0.q"].product()[0]
    moved = read(tmp_path / "b", TestMultiply, lambda t: {**t, key: t[key] + np.float32(0.3)}).deltas["encoder.0.q"]
    np.testing.assert_array_equal(moved.product()[0], plain)


SITES = [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]


@pytest.fixture(scope="module")
def merging(bases, tmp_path_factory):
    """A base, an adapter of it, and W′ of its modules."""
    folder, base = tmp_path_factory.mktemp("intlora"), bases("bert")
    stored, rng = load_file(base / "model.safetensors"), np.random.default_rng(2)
    parts = {site: trained(rng, stored[f"{site}.weight"]) for site in SITES}
    tensors = {f"base_model.model.{m}.{name}": t for m, part in parts.items() for name, t in part.items()}
    write_peft_example(folder / "int", {"peft_type": "INTLORA", "variant": "mul", "r": RANK}, tensors)
    return folder, base, stored, {site: definition(part) for site, part in parts.items()}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_merged_into_floats(merging, tmp_path):
    folder, base, stored, want = merging
    done = run("merge", base, folder / "int", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for site, weight in want.items():
        error = np.abs(merged[f"{site}.weight"] - weight).max()
        assert error / np.abs(weight).max() <= 1e-6
        assert np.abs(weight - stored[f"{site}.weight"]).max() > 0.01


def test_merged_into_integers(merging, tmp_path):
    folder, base, stored, want = merging
    done = run("merge", base, folder / "int", "-o", tmp_path / "out", "--dtype", "int8", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["dtype"] == "int8"
    assert 0.9 < report["survival"] < 1
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for site, weight in want.items():
        codes, scale = merged.pop(f"{site}.weight"), merged.pop(f"{site}.weight_scale")
        assert (codes.dtype, scale.shape) == (np.int8, (48, 1))
        assert (np.abs(codes * scale.astype(float) - weight) <= 0.5001 * scale).all()
    assert set(merged) == set(stored) - {f"{site}.weight" for site in SITES}
    assert all(np.array_equal(tensor, stored[name]) for name, tensor in merged.items())
    done = run("merge", tmp_path / "out", folder / "int", "-o", tmp_path / "twice")
    assert done.exit_code == 1
    assert "the base is quantised" in done.output
    with pytest.raises(ImportError, match=r"compressed.tensors"):  # not read as if codes were weights
        AutoModel.from_pretrained(tmp_path / "out")


def test_scales_are_named_as_the_task_model_names_their_weights(merging, tmp_path):
    folder, base, _, _ = merging
    config = json.loads((folder / "int" / "adapter_config.json").read_text())
    config |= {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    tensors = {k.replace("model.encoder", "model.bert.encoder"): t for k, t in load_file(
        folder / "int" / "adapter_model.safetensors").items()}  # fmt: skip
    head = {"classifier.weight": np.ones((3, 48), "f4"), "classifier.bias": np.zeros(3, "f4")}
    write_peft_example(tmp_path / "headed", config, tensors | {f"base_model.model.{k}": t for k, t in head.items()})
    done = run("merge", base, tmp_path / "headed", "-o", tmp_path / "out", "--dtype", "int8")
    assert done.exit_code == 0, done.output
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"bert.{site}.weight{end}" for site in SITES for end in ("", "_scale")} <= set(merged)
    assert not [name for name in merged if name.startswith("encoder.")]
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["config_groups"]["group_0"]["targets"] == [f"bert.{site}" for site in SITES]


def test_no_slot_and_no_sum_and_no_other_family_in_integers(merging, tmp_path, bases):
    folder, base, _, _ = merging
    said = " ".join(run("export", "--onnx", base, folder / "int", "-o", tmp_path / "x").output.split())
    assert "no slot can hold a intlora delta: it changes a weight by what that weight is" in said
    words = ["merge", base, folder / "int", "-o", tmp_path / "x", "--dtype", "int8"]
    said = " ".join(run(*words, "--weight", "0.5").output.split())
    assert "would be changed by int × 0.5. Integers are one adapter's own and take no factor" in said
    said = " ".join(run(*words, f"again={folder / 'int'}").output.split())
    assert "would be changed by int × 1, again × 1." in said
    lora = {"r": 1, "lora_alpha": 1, "peft_type": "LORA"}
    ab = {"lora_A.weight": np.ones((1, 48), "f4"), "lora_B.weight": np.ones((48, 1), "f4")}
    write_peft_example(tmp_path / "lora", lora, {f"base_model.model.{SITES[0]}.{k}": t for k, t in ab.items()})
    done = run("merge", base, tmp_path / "lora", "-o", tmp_path / "x", "--dtype", "int8")
    assert done.exit_code == 1
    assert "changes encoder.layer.0.attention.self.query by a lowrank delta, which is no integer" in done.output
    assert not (tmp_path / "x").exists()


def test_another_base_is_refused(merging, tmp_path):
    from ssh_deploy.testing import pico_model

    folder = merging[0]
    other = pico_model("bert", tmp_path / "other", seed=9)
    for extra in ([], ["--dtype", "int8"]):
        done = run("merge", other, folder / "int", "-o", tmp_path / "out", *extra)
        assert done.exit_code == 1
        assert "away from the weight they should stand for" in done.output
        assert not (tmp_path / "out").exists()


Q = "base_model.model.encoder.0.q."


def replacing(name, change):
    return lambda tensors: {**tensors, Q + name: change(tensors[Q + name])}


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != Q + name}


BAD = [
    ({"variant": None}, None, r"(?s)variant is None\..*multiplies \(mul\) or shifts"),
    ({"variant": "shift"}, None, "has double_quant_delta, which a shifting IntLoRA has not"),
    ({"n_bits": 9}, None, "n_bits is 9"),
    ({"n_bits": 4}, None, "no whole number of 0…15"),
    ({"symmetric": True}, None, "symmetric is True: its codes have no zero points"),
    ({"r": 3}, None, r"loraA\.weight is \[2, 10\]; with r = 3"),
    ({}, without("aux_R"), "and no aux_R"),
    ({}, without("double_quant_zero_point"), "and no double_quant_zero_point"),
    ({}, replacing("ori_weight_round", lambda t: t + np.float32(0.5)), "no whole number"),
    ({}, replacing("ori_weight_round", lambda t: t[:5]), r"ori_weight_round is \[5, 10\]"),
    ({}, replacing("ori_weight_round", lambda t: t * np.float32("nan")), "NaN or infinite"),
    ({}, replacing("weight_quant_delta", lambda t: -t), "weight_quant_delta is not above zero"),
    ({}, replacing("aux_R", lambda t: t.astype(np.float16)), "mixes dtypes"),
    ({}, replacing("loraA.weight", lambda t: t * np.inf), "NaN or infinite"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("config", "change", "message"), BAD)
def test_what_cannot_be_meant_is_refused(tmp_path, config, change, message):
    with pytest.raises((AdapterFileError, AdapterMismatchError), match=message):
        read(tmp_path, TestMultiply, change or (lambda tensors: tensors), **config)

"""Every family against its float64 definition, through the contract suite; and what each refuses."""

import numpy as np
import pytest
import torch

from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy.jobs.merging import merge_adapters
from ssh_deploy.testing import FamilyContract, write_peft_example

SHAPES = {"encoder.0.q": (6, 10), "encoder.1.v": (8, 8)}
TALLER = {"encoder.0.q": (12, 10), "encoder.1.v": (8, 8)}  # a product of rank 4 is thin in both
PREFIX = "base_model.model."


def normal(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


class LowRankContract(FamilyContract):
    """Modules of `SHAPES`; subclasses give `parts`: one module's tensors and ΔW/scaling."""

    config: dict
    scaling = 1.0
    shapes = SHAPES

    def parts(self, rng, shape):
        raise NotImplementedError

    def shared(self, rng):
        return {}

    def example(self, rng):
        tensors, want = dict(self.shared(rng)), {}
        for module, shape in self.shapes.items():
            parts, dense = self.parts(rng, shape)
            tensors |= {f"{PREFIX}{module}.{name}": part for name, part in parts.items()}
            want[module] = self.scaling * dense
        return {"peft_type": self.family.upper(), **self.config}, tensors, self.shapes, want


class TestLoRA(LowRankContract):
    family, config, scaling = "lora", {"r": 3, "lora_alpha": 12, "bias": "none"}, 4.0

    def parts(self, rng, shape):
        a, b = normal(rng, 3, shape[1]), normal(rng, shape[0], 3)
        return {"lora_A.weight": a, "lora_B.weight": b}, b.astype(float) @ a


class TestRankStabilised(TestLoRA):
    config, scaling = {"r": 3, "lora_alpha": 12, "use_rslora": True}, 12 / np.sqrt(3)


class TestLoHa(LowRankContract):
    family, config, scaling = "loha", {"r": 2, "alpha": 6}, 3.0
    shapes = TALLER

    def parts(self, rng, shape):
        w = {f"hada_w{i}_{x}": normal(rng, *s) for i in (1, 2) for x, s in (("a", (shape[0], 2)), ("b", (2, shape[1])))}
        one, two = (w[f"hada_w{i}_a"].astype(float) @ w[f"hada_w{i}_b"] for i in (1, 2))
        return w, one * two


class TestLoKr(LowRankContract):
    family, config, scaling = "lokr", {"r": 1, "alpha": 2}, 2.0

    def parts(self, rng, shape):
        w1, a, b = normal(rng, 2, 2), normal(rng, shape[0] // 2, 1), normal(rng, 1, shape[1] // 2)
        return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, np.kron(w1.astype(float), a.astype(float) @ b)


class TestLoKrBoth(LowRankContract):
    family, config, scaling = "lokr", {"r": 1, "alpha": 2}, 2.0

    def parts(self, rng, shape):
        a, b, w2 = normal(rng, 2, 1), normal(rng, 1, 2), normal(rng, shape[0] // 2, shape[1] // 2)
        return {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": w2}, np.kron(a.astype(float) @ b, w2.astype(float))


class TestVeRA(LowRankContract):
    family, config = "vera", {"r": 4}

    def shared(self, rng):
        return {"base_model.vera_A": normal(rng, 4, 10), "base_model.vera_B": normal(rng, 8, 4)}

    def parts(self, rng, shape):
        a, b = self.shared(np.random.default_rng(7)).values()  # the contract's own seed draws them first
        rows, rank = normal(rng, shape[0]), normal(rng, 4)
        dense = (rows[:, None] * b[: shape[0]].astype(float)) @ (rank[:, None] * a[:, : shape[1]].astype(float))
        return {"vera_lambda_b": rows, "vera_lambda_d": rank}, dense


def read(tmp_path, contract, change=None, **config):
    fields, tensors, shapes, _ = contract().example(np.random.default_rng(7))
    fields |= config
    tensors = change(tensors) if change else tensors
    kept = {key: value for key, value in fields.items() if value != "left out"}
    return read_folder(write_peft_example(tmp_path / "a", kept, tensors), shapes=shapes)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float64])
def test_floats_of_any_width_are_read(tmp_path, dtype):
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    adapter = read(tmp_path, TestLoRA, lambda t: {name: tensor.astype(kind) for name, tensor in t.items()})
    delta = adapter.deltas["encoder.0.q"]
    assert delta.a.dtype == (np.float16 if kind == np.float16 else np.float32)
    _, tensors, _, _ = TestLoRA().example(np.random.default_rng(7))
    np.testing.assert_array_equal(
        delta.a.astype(np.float32), tensors[f"{PREFIX}encoder.0.q.lora_A.weight"].astype(kind).astype(np.float32)
    )


def test_patterns_choose_rank_and_alpha_as_peft_does(tmp_path):
    def widen(tensors):
        rng = np.random.default_rng(0)
        return tensors | {
            f"{PREFIX}encoder.1.v.lora_A.weight": normal(rng, 5, 8),
            f"{PREFIX}encoder.1.v.lora_B.weight": normal(rng, 8, 5),
        }

    patterns = {"rank_pattern": {"v": 5}, "alpha_pattern": {r"encoder\.\d+\.v": 20, "v": 1, "q": 6}}
    deltas = read(tmp_path, TestLoRA, widen, **patterns).deltas
    assert (deltas["encoder.1.v"].rank, deltas["encoder.1.v"].scaling) == (5, 4.0)
    assert (deltas["encoder.0.q"].rank, deltas["encoder.0.q"].scaling) == (3, 2.0)


@pytest.mark.parametrize("contract", [TestLoRA, TestRankStabilised, TestLoHa, TestLoKr, TestLoKrBoth, TestVeRA])
def test_written_and_read_again_it_is_the_same(tmp_path, contract):
    adapter = read(tmp_path, contract)
    write_folder(adapter, tmp_path / "again")
    again = read_folder(tmp_path / "again", shapes=contract.shapes)
    assert again.family == adapter.family
    for module, delta in adapter.deltas.items():
        other = again.deltas[module]
        assert torch.equal(delta.dense(dtype=torch.float64), other.dense(dtype=torch.float64))
        assert other.parameters == delta.parameters > 0


def test_different_ranks_are_written_as_patterns(tmp_path):
    def widen(tensors):
        rng = np.random.default_rng(0)
        a, b = normal(rng, 5, 8), normal(rng, 8, 5)
        return tensors | {f"{PREFIX}encoder.1.v.lora_A.weight": a, f"{PREFIX}encoder.1.v.lora_B.weight": b}

    adapter = read(tmp_path, TestLoRA, widen, rank_pattern={"encoder.1.v": 5})
    write_folder(adapter, tmp_path / "again")
    again = read_folder(tmp_path / "again")
    assert [d.rank for _, d in sorted(again.deltas.items())] == [3, 5]
    assert [d.scaling for _, d in sorted(again.deltas.items())] == pytest.approx([4.0, 2.4], rel=1e-15)


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


def with_(name, tensor, module="encoder.0.q"):
    return lambda tensors: tensors | {f"{PREFIX}{module}.{name}": np.asarray(tensor, dtype=np.float32)}


def nan(name):
    def change(tensors):
        spoilt = {key: tensor.copy() for key, tensor in tensors.items()}
        next(t for key, t in spoilt.items() if key.endswith(name)).flat[0] = np.nan
        return spoilt

    return change


def half(name):
    return lambda tensors: {k: t.astype(np.float16) if k.endswith(name) else t for k, t in tensors.items()}


TENSORS = [
    (TestLoRA, without("q.lora_B.weight"), "has lora_A.weight, and no lora_B.weight"),
    (TestLoRA, without(".weight"), "no tensor of a LORA adapter in it"),
    (TestLoRA, half("q.lora_B.weight"), "mixes dtypes"),
    (TestLoRA, nan("q.lora_A.weight"), r"lora_A\.weight: 1 of 30 values are NaN"),
    (TestLoRA, with_("lora_A.weight", np.ones((2, 10))), r"rank 3 in the config, lora_A\.weight is \[2, 10\]"),
    (TestLoRA, with_("lora_B.weight", np.ones((6, 4))), r"rank 3 in the config.*lora_B\.weight \[6, 4\]"),
    (TestLoRA, with_("lora_A.weight", np.ones((3, 10, 1, 1))), r"(?s)lora_A\.weight is .*Convolutions"),
    (TestLoRA, with_("lora_A.weight", np.ones((0,))), r"lora_A\.weight is .*\[0\]"),
    (TestLoRA, with_("lora_embedding_A", np.ones((3, 10))), "adapts an embedding"),
    (TestLoRA, with_("lora_B.bias", np.ones(6)), "belongs to no adapted module"),
    (TestLoRA, with_("lora_magnitude_vector", np.ones(6)), "use_dora is None, with 1 magnitude"),
    (TestLoHa, without("q.hada_w2_b"), "and no hada_w2_b"),
    (TestLoHa, nan("hada_w1_a"), "NaN"),
    (TestLoHa, half("hada_w1_a"), "mixes dtypes"),
    (TestLoHa, with_("hada_w2_a", np.ones((7, 2))), "not two products of rank 2"),
    (TestLoHa, with_("hada_t1", np.ones((2, 2, 3, 3))), "belongs to no adapted module"),
    (TestLoKr, without("q.lokr_w1"), "has nothing for lokr_w1"),
    (TestLoKr, without("q.lokr_w2_a"), "has lokr_w2_b for lokr_w2"),
    (TestLoKr, with_("lokr_w1_a", np.ones((2, 1))), "has lokr_w1 and lokr_w1_a for lokr_w1"),
    (TestLoKr, with_("lokr_w2_a", np.ones((3, 4))), r"rank 1 in the config, lokr_w2 is made of \[3, 4\]"),
    (TestLoKr, with_("lokr_t2", np.ones((1, 1, 3, 3))), "adapts a convolution"),
    (TestLoKr, nan("lokr_w1"), "NaN"),
    (TestVeRA, without("vera_A"), "(?s)not both in the file.*save_projection=True"),
    (TestVeRA, without("q.vera_lambda_d"), "and no vera_lambda_d"),
    (TestVeRA, with_("vera_lambda_b", np.ones(5)), "5 and 4 numbers with projections"),
    (TestVeRA, with_("vera_lambda_d", np.ones(3)), "6 and 3 numbers with projections"),
    (TestVeRA, lambda t: t | {"base_model.vera_A": t["base_model.vera_A"][:, :9]}, r"projections of \[4, 9\]"),
    (TestVeRA, lambda t: t | {"base_model.vera_B": t["base_model.vera_B"][:5]}, r"and \[5, 4\] for a weight of 6×10"),
    (TestVeRA, nan("vera_A"), "NaN"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("contract", "change", "message"), TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path, contract, change, message):
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, contract, change)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match=r"encoder\.0\.q\.lora_A\.weight is there with and without"):
        read(tmp_path, TestLoRA, lambda t: t | {"encoder.0.q.lora_A.weight": np.ones((3, 10), np.float32)})


def test_a_weight_of_another_shape_is_refused(bases, tmp_path):
    from ssh_deploy.adapters.fitting import fit
    from ssh_deploy.checkpoints.index import open_checkpoint

    config, tensors, _, _ = TestLoRA().example(np.random.default_rng(7))
    named = {k.replace("encoder.0.q", "encoder.layer.0.attention.self.query"): t for k, t in tensors.items()}
    kept = {k: t for k, t in named.items() if "encoder.1" not in k}
    with pytest.raises(AdapterMismatchError, match=r"is for a weight of 6×10; .* has 48×48"):
        fit(write_peft_example(tmp_path / "a", config, kept), open_checkpoint(bases("bert")))


CONFIGS = [
    ({"r": "left out"}, "r is None, not a finite number"),
    ({"lora_alpha": "left out"}, "lora_alpha is None"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"r": 0}, "rank 0 of encoder"),
    ({"r": 2.5}, r"rank 2\.5 of encoder"),
    ({"r": 4}, "rank 4 in the config"),
    ({"bias": "lora_only"}, "(?s)bias is 'lora_only': it changes biases.*merge_and_unload"),
    ({"lora_bias": True}, "changes biases"),
    ({"init_lora_weights": "pissa_niter_4"}, "this start changes the base's weights too"),
    ({"init_lora_weights": "loftq"}, "this start changes the base's weights too"),
    ({"layer_replication": [[0, 2]]}, "copies that the base does not have"),
    ({"target_parameters": ["experts.w"]}, "experts"),
    ({"trainable_token_indices": [1]}, "rows of the embedding"),
    ({"alora_invocation_tokens": [5]}, "active on some tokens only"),
    ({"arrow_config": {"top_k": 3}}, "chooses among adapters"),
    ({"use_dora": True}, "use_dora is True, with 0 magnitude vectors"),
    ({"rank_pattern": [1]}, "rank_pattern is .*no object"),
    ({"rank_pattern": {"(a+)+": 3}}, "could take for ever"),
    ({"rank_pattern": {".*.*.*.*q": 3}}, "could take for ever"),
    ({"rank_pattern": {"a" * 501: 3}}, "could take for ever"),
    ({"rank_pattern": {"(": 3}}, "missing \\)"),
    ({"alpha_pattern": {"q": "much"}}, "'q' is 'much'"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, config, message):
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, TestLoRA, **config)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(tmp_path, start):
    assert read(tmp_path, TestLoRA, init_lora_weights=start).deltas


def test_an_adapter_that_changes_nothing_is_not_merged_in_silence(bases, tmp_path):
    parts = {"lora_A.weight": np.ones((1, 48), np.float32), "lora_B.weight": np.zeros((48, 1), np.float32)}
    tensors = {f"{PREFIX}encoder.layer.0.attention.self.query.{name}": part for name, part in parts.items()}
    folder = write_peft_example(tmp_path / "a", {"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors)
    report = merge_adapters(bases("bert"), [str(folder)], tmp_path / "out")
    assert any("ΔW is zero everywhere: but for a head, the result is the base" in note for note in report.notes)
    tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    folder = write_peft_example(tmp_path / "b", {"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors)
    assert "zero" not in "".join(merge_adapters(bases("bert"), [str(folder)], tmp_path / "more").notes)

"""Every family against its float64 definition, through the contract suite; and what each refuses."""

from typing import ClassVar

import numpy as np
import pytest

from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy.graph.bank_file import slot_kind
from ssh_deploy.testing import FamilyContract, sparse_spectrum, write_peft_example

SHAPES = {"encoder.0.q": (6, 10), "encoder.1.v": (8, 8)}
PREFIX = "base_model.model."


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def scales(rng, n):
    return rng.uniform(0.5, 1.5, size=n).astype(np.float32)


class StructuredContract(FamilyContract):
    """Modules of `SHAPES`; subclasses give `parts`: one module's tensors and ΔW, or a function of W that gives it."""

    config: ClassVar[dict]
    peft_type = ""

    def parts(self, rng, shape):
        raise NotImplementedError

    def example(self, rng):
        tensors, want = {}, {}
        for module, shape in SHAPES.items():
            parts, want[module] = self.parts(rng, shape)
            tensors |= {f"{PREFIX}{module}.{name}": part for name, part in parts.items()}
        return {"peft_type": self.peft_type or self.family.upper(), **self.config}, tensors, SHAPES, want


class TestSSF(StructuredContract):
    family, config = "ssf", {}

    def parts(self, rng, shape):
        scale = scales(rng, shape[0])
        parts = {"ssf_scale": scale, "ssf_shift": normal(rng, shape[0])}
        return parts, lambda w: scale[:, None].astype(float) * w - w


class TestPropulsion(StructuredContract):
    family, config = "propulsion", {"degree": 4}

    def parts(self, rng, shape):
        z = scales(rng, shape[0])
        return {"propulsion": z}, lambda w: (z.astype(float) ** 4)[:, None] * w - w


class TestPropulsionByDefault(TestPropulsion):
    config: ClassVar = {}

    def parts(self, rng, shape):
        z = scales(rng, shape[0])
        return {"propulsion": z}, lambda w: (z.astype(float) ** 15)[:, None] * w - w


class TestIA3(StructuredContract):
    family, config = "ia3", {"feedforward_modules": ["q"], "fan_in_fan_out": False}

    def parts(self, rng, shape):
        if shape == (6, 10):
            inputs = scales(rng, 10)
            return {"ia3_l": inputs[None]}, lambda w: w * inputs.astype(float) - w
        outputs = scales(rng, shape[0])
        return {"ia3_l": outputs[:, None]}, lambda w: outputs[:, None].astype(float) * w - w


def orthonormal(u):
    """Columns made orthonormal in order, by projections."""
    made = []
    for column in u.T.astype(float):
        left = column - sum((other @ column) * other for other in made)
        made.append(left / np.linalg.norm(left))
    return np.array(made)


class TestHRA(StructuredContract):
    family, config = "hra", {"r": 3, "apply_GS": False, "bias": "none"}

    def parts(self, rng, shape):
        u = normal(rng, shape[1], 3)
        h = np.eye(shape[1])
        for column in orthonormal(u) if self.config["apply_GS"] else u.T.astype(float):
            h = h - 2 * np.outer(h @ column, column) / (column @ column)
        return {"hra_u": u}, lambda w: w @ h - w


class TestOrthogonalHRA(TestHRA):
    config: ClassVar = {"r": 3, "apply_GS": True}


def householder(u):
    return np.eye(u.size) - 2 * np.outer(u, u) / (u @ u)


def relaxed(u, v):
    return np.eye(u.size) - np.outer(u, u) / (u @ u) + np.outer(v, v) / (v @ v)


def block_diagonal(blocks):
    count, side = len(blocks), blocks[0].shape[0]
    made = np.zeros((count * side, count * side))
    for i, block in enumerate(blocks):
        made[i * side : (i + 1) * side, i * side : (i + 1) * side] = block
    return made


def released(blocks, weight):
    """The released code's own steps: reshape, one product for each block, reshape."""
    count, (out, inn) = len(blocks), weight.shape
    cut = weight.reshape(count, out, inn // count)
    return np.einsum("rfm,rmn->rfn", cut, np.array(blocks)).reshape(out, inn)


class TestETHER(StructuredContract):
    family, config = "ether", {}

    def parts(self, rng, shape):
        u = normal(rng, 1, shape[1])
        return {"ether_R": u}, lambda w: w @ householder(u[0].astype(float)) - w


class TestBlocks(StructuredContract):
    family, config = "ether", {"blocks": "diagonal"}

    def parts(self, rng, shape):
        u = normal(rng, 2, shape[1] // 2)
        h = block_diagonal([householder(row.astype(float)) for row in u])
        return {"ether_R": u}, lambda w: w @ h - w


def _no_slot(self, folder):
    """In the place of the contract's test of slots."""
    _, _, shapes, _ = self.example(np.random.default_rng(7))
    for module, delta in read_folder(folder, shapes=shapes).deltas.items():
        with pytest.raises(AdapterMismatchError, match="no slot can hold a memory-blocks delta: it changes a weight"):
            slot_kind(module, delta)


class TestBlocksOfTheReleasedCode(StructuredContract):
    family, config = "ether", {"blocks": "memory"}

    def parts(self, rng, shape):
        u = normal(rng, 2, shape[1] // 2)
        return {"ether_R": u}, lambda w: released([householder(row.astype(float)) for row in u], w) - w

    test_its_slots_are_those_its_deltas_fill = _no_slot

    def test_it_is_not_the_block_diagonal(self, folder):
        _, _, shapes, want = self.example(np.random.default_rng(7))
        assert read_folder(folder, shapes=shapes).deltas["encoder.0.q"].kind == "memory-blocks"
        *_, other = TestBlocks().example(np.random.default_rng(7))
        weight = np.random.default_rng(0).normal(size=(6, 10))
        assert np.abs(want["encoder.0.q"](weight) - other["encoder.0.q"](weight)).max() > 0.1


class TestFlipped(StructuredContract):
    family, config = "ether", {"flip_side": True}

    def parts(self, rng, shape):
        u = normal(rng, 2, shape[0] // 2)
        h = block_diagonal([householder(row.astype(float)) for row in u])
        return {"ether_R": u}, lambda w: h @ w - w


class TestETHERPlus(StructuredContract):
    family, peft_type, config = "ether-plus", "ETHER_PLUS", {"blocks": "diagonal"}

    def maps(self, rng, side):
        u, v = normal(rng, 2, side // 2), normal(rng, 2, side // 2)
        return u, v, [relaxed(a.astype(float), b.astype(float)) for a, b in zip(u, v, strict=True)]

    def parts(self, rng, shape):
        u, v, blocks = self.maps(rng, shape[1])
        return {"ether_R": u, "ether_R2": v}, lambda w: w @ block_diagonal(blocks) - w


class TestTwoSided(TestETHERPlus):
    def parts(self, rng, shape):
        inner, outer = self.maps(rng, shape[1]), self.maps(rng, shape[0])
        tensors = {"ether_R": inner[0], "ether_R2": inner[1], "ether_R3": outer[0], "ether_R4": outer[1]}
        return tensors, lambda w: block_diagonal(outer[2]) @ w @ block_diagonal(inner[2]) - w


class TestTwoSidedOfTheReleasedCode(TestTwoSided):
    config: ClassVar = {"blocks": "memory"}
    test_its_slots_are_those_its_deltas_fill = _no_slot

    def parts(self, rng, shape):
        inner, outer = self.maps(rng, shape[1]), self.maps(rng, shape[0])
        tensors = {"ether_R": inner[0], "ether_R2": inner[1], "ether_R3": outer[0], "ether_R4": outer[1]}
        return tensors, lambda w: block_diagonal(outer[2]) @ released(inner[2], w) - w


class SparseContract(StructuredContract):
    values, places, count = "", "", 0

    def parts(self, rng, shape):
        rows, cols, values = sparse_spectrum(rng, shape, self.count or sum(shape))
        want = np.zeros(shape)
        want[rows, cols] = values
        return {self.values: values, self.places: np.stack([rows, cols]).astype(np.int32)}, want


class TestSHiRA(SparseContract):
    family, config, values, places = "shira", {"r": 1}, "shira_weight", "shira_indices"


class TestSPT(SparseContract):
    family, config, values, places, count = "spt", {}, "sparse_weight", "sparse_weight_indexes", 5


EVERY = [TestSSF, TestPropulsion, TestIA3, TestHRA, TestOrthogonalHRA, TestETHER, TestBlocks, TestFlipped]
EVERY += [TestBlocksOfTheReleasedCode, TestETHERPlus, TestTwoSided, TestTwoSidedOfTheReleasedCode, TestSHiRA, TestSPT]


def read(tmp_path, contract, change=None, **config):
    fields, tensors, shapes, _ = contract().example(np.random.default_rng(7))
    fields |= config
    tensors = change(tensors) if change else tensors
    kept = {key: value for key, value in fields.items() if value != "left out"}
    return read_folder(write_peft_example(tmp_path / "a", kept, tensors), shapes=shapes)


@pytest.mark.parametrize("contract", EVERY)
def test_written_and_read_again_it_is_the_same(tmp_path, contract):
    import torch

    adapter = read(tmp_path, contract)
    write_folder(adapter, tmp_path / "again")
    again = read_folder(tmp_path / "again")
    assert again.family == adapter.family
    for module, delta in adapter.deltas.items():
        other, weight = again.deltas[module], torch.randn(delta.shape, dtype=torch.float64)
        assert torch.equal(delta.add_to(weight.clone()), other.add_to(weight.clone()))
        assert other.parameters == delta.parameters > 0
        if isinstance(delta, RelativeDelta):
            bias = np.arange(delta.shape[0], dtype=float)
            np.testing.assert_array_equal(delta.bias_change(bias), other.bias_change(bias))


def test_a_shift_and_a_scale_of_the_bias(tmp_path):
    deltas = read(tmp_path, TestSSF).deltas
    bias = np.arange(6.0)
    delta = deltas["encoder.0.q"]
    want = delta.outer.astype(float) * bias + delta.shift
    np.testing.assert_allclose(bias + delta.bias_change(bias), want, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float64])
def test_floats_of_any_width_are_read(tmp_path, dtype):
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    delta = read(tmp_path, TestIA3, lambda t: {name: x.astype(kind) for name, x in t.items()}).deltas["encoder.1.v"]
    assert delta.outer.dtype == (np.float16 if kind == np.float16 else np.float32)


def test_places_that_windows_saved_as_floats_are_read(tmp_path):
    def floats(tensors):
        return {name: x.astype(np.float32) for name, x in tensors.items()}

    (tmp_path / "plain").mkdir()
    want = read(tmp_path / "plain", TestSHiRA).deltas["encoder.0.q"]
    np.testing.assert_array_equal(read(tmp_path, TestSHiRA, floats).deltas["encoder.0.q"].rows, want.rows)


def module(name, change):
    """A change of one tensor of encoder.0.q: a function of it, or None to leave it out."""

    def changed(tensors):
        key = f"{PREFIX}encoder.0.q.{name}"
        left = {k: t for k, t in tensors.items() if k != key}
        return left if change is None else {**left, key: np.array(change(tensors[key]), order="C")}

    return changed


def at(place, value):
    def changed(tensor):
        tensor = tensor.copy()
        tensor[place] = value
        return tensor

    return changed


REFUSED = {
    "no shift": (TestSSF, module("ssf_shift", None), {}, "has ssf_scale, and no ssf_shift"),
    "two dtypes": (TestSSF, module("ssf_shift", lambda t: t.astype(np.float16)), {}, "mixes dtypes: "),
    "integers": (TestSSF, lambda t: {k: x.astype(np.int32) for k, x in t.items()}, {}, "is int32"),
    "wide": (TestSSF, module("ssf_scale", lambda t: np.repeat(t, 2)), {}, r"ssf_scale is \[12\], not \[6\]"),
    "NaN": (TestSSF, module("ssf_scale", at(2, np.nan)), {}, "1 of 6 values are NaN"),
    "empty": (TestSSF, module("ssf_scale", lambda t: t[:0]), {}, r"ssf_scale is float32 \[0\]"),
    "two families": (TestSSF, lambda t: t | {f"{PREFIX}encoder.0.q.ia3_l": np.ones((6, 1), "f")}, {}, "ia3_l"),
    "other family": (TestSSF, None, {"peft_type": "PROPULSION"}, "no tensor of a PROPULSION adapter"),
    "no degree": (TestPropulsion, None, {"degree": "15"}, "degree is '15', not a power"),
    "degree zero": (TestPropulsion, None, {"degree": 0}, "degree is 0"),
    "power": (TestPropulsion, module("propulsion", at(0, 1e20)), {}, "to the power of 4 goes beyond float32"),
    "no list": (TestIA3, None, {"feedforward_modules": "left out"}, "feedforward_modules is None"),
    "not listed": (TestIA3, None, {"feedforward_modules": []}, "does not name it"),
    "listed wrongly": (TestIA3, None, {"feedforward_modules": ["q", "v"]}, "names it"),
    "scale of 9": (TestIA3, module("ia3_l", lambda t: t[:, :9]), {}, r"ia3_l is \[1, 9\], not \[1, 10\]"),
    "no r": (TestHRA, None, {"r": "left out"}, "r is None, not a finite number"),
    "another r": (TestHRA, None, {"r": 2}, r"hra_u is \[10, 3\], not \[10, 2\]"),
    "biases": (TestHRA, None, {"bias": "hra_only"}, "bias is 'hra_only'"),
    "GS": (TestHRA, None, {"apply_GS": "yes"}, "apply_GS is 'yes'"),
    "no plane": (TestHRA, module("hra_u", at((slice(None), 1), 0)), {}, "a column of hra_u has length zero"),
    "no new plane": (
        TestOrthogonalHRA,
        module("hra_u", lambda t: np.stack([t[:, 0], 2 * t[:, 0], t[:, 2]], 1)),
        {},
        "length zero once orthogonal",
    ),
    "no reading": (TestBlocks, None, {"blocks": "left out"}, r"2 blocks, and the config does not say .*(?s:.)*memory"),
    "strange reading": (TestBlocks, None, {"blocks": "odd"}, "blocks is 'odd'"),
    "blocks": (
        TestBlocks,
        module("ether_R", lambda t: np.ones((3, 3), "f")),
        {},
        "3 blocks, which do not",
    ),
    "width": (TestBlocks, module("ether_R", lambda t: t[:, :4]), {}, r"ether_R is \[2, 4\], not \[2, 5\]"),
    "one number": (TestBlocks, module("ether_R", lambda _: np.array(1, "f")), {}, r"ether_R is \[\]"),
    "zero block": (TestBlocks, module("ether_R", at(1, 0)), {}, "a vector of ether_R has length zero"),
    "one side": (TestTwoSided, module("ether_R4", None), {}, "has ether_R and ether_R2 and ether_R3"),
    "flipped": (TestTwoSided, None, {"flip_side": True}, "with flip_side"),
    "half of it": (TestETHERPlus, module("ether_R2", None), {}, "has ether_R, and no ether_R2"),
    "more of it": (TestETHER, lambda t: t | {f"{PREFIX}encoder.0.q.ether_R2": np.ones((1, 10), "f")}, {}, "ether_R2"),
    "rank": (TestSHiRA, None, {"r": 2}, "16 values; r = 2 of adapter_config.json makes 32"),
    "outside": (TestSHiRA, module("shira_indices", at((0, 3), 6)), {}, "coefficient 3 has row 6, outside 0…5"),
    "below": (TestSPT, module("sparse_weight_indexes", at((1, 0), -1)), {}, "has column -1, outside 0…9"),
    "twice": (TestSPT, module("sparse_weight_indexes", lambda t: t[:, [0, 0, 2, 3, 4]]), {}, "occurs twice"),
    "fractions": (
        TestSPT,
        module("sparse_weight_indexes", lambda t: t + np.float32(0.5)),
        {},
        "sparse_weight_indexes holds fractions",
    ),
    "pairs": (TestSPT, module("sparse_weight_indexes", lambda t: t.T.copy()), {}, r"is \[5, 2\], not \[2, 5\]"),
    "no places": (TestSPT, module("sparse_weight_indexes", None), {}, "and no sparse_weight_indexes"),
}


@pytest.mark.hostile
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(tmp_path, case):
    contract, change, config, message = REFUSED[case]
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, contract, change, **config)

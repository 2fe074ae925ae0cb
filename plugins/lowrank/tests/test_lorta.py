"""LoRTA against its definition, head by head; merged, written as LoRA, and refused where its config cannot be meant."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ssh_deploy.adapters.peft_folder import read_folder, write_folder
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.cli.main import main
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy.testing import FamilyContract, write_peft_example

RANK, HEADS, DEPTH, INPUTS = 3, 4, 2, 10
MODULES = {"encoder.0.q": [0, 0], "encoder.0.o": [0, 2], "encoder.1.q": [1, 0], "encoder.1.k": [1, 1]}
CONFIG = {"peft_type": "LORTA", "r": RANK, "scaling": 0.5, "modules": MODULES, "gathering": [2]}


def factors(rng):
    sides = {"in": INPUTS, "out": DEPTH, "heads": HEADS, "layers": 2, "matrices": 3}
    return {f"lorta_{name}": rng.normal(size=(side, RANK)).astype(np.float32) for name, side in sides.items()}


def definition(part, layer, matrix, *, gathering=False):
    """ΔW of one module: the block of each head as a product with a diagonal, one above the other or side by side."""
    f = {name.removeprefix("lorta_"): tensor.astype(float) for name, tensor in part.items()}
    blocks = []
    for head in range(HEADS):
        middle = np.diag(f["heads"][head] * f["layers"][layer] * f["matrices"][matrix])
        block = 0.5 * f["out"] @ middle @ f["in"].T
        blocks.append(block.T if gathering else block)
    return np.concatenate(blocks, axis=1 if gathering else 0)


class TestLoRTA(FamilyContract):
    family = "lorta"

    def example(self, rng):
        part = factors(rng)
        want = {m: definition(part, *place, gathering=place[1] == 2) for m, place in MODULES.items()}
        tensors = {f"base_model.model.{name}": tensor for name, tensor in part.items()}
        return CONFIG, tensors, {m: dense.shape for m, dense in want.items()}, want


def read(tmp_path, change=lambda tensors: tensors, **config):
    fields, tensors, shapes, _ = TestLoRTA().example(np.random.default_rng(7))
    kept = {key: value for key, value in {**fields, **config}.items() if value != "left out"}
    return read_folder(write_peft_example(tmp_path / "a", kept, change(tensors)), shapes=shapes)


def test_its_parameters_are_the_tensors_once(tmp_path):
    adapter = read(tmp_path)
    assert adapter.parameters == RANK * (INPUTS + DEPTH + HEADS + 2 + 3)
    assert {delta.rank for delta in adapter.deltas.values()} == {RANK}


def test_it_is_written_as_the_lora_that_it_is(tmp_path):
    adapter = read(tmp_path)
    done = CliRunner().invoke(main, ["convert", str(tmp_path / "a"), "-o", str(tmp_path / "lora"), "--to", "lora"])
    assert done.exit_code == 0, done.output
    lora = read_adapter(tmp_path / "lora")
    assert lora.family == "lora"
    for module, delta in adapter.deltas.items():
        want = delta.dense(dtype=torch.float64)
        torch.testing.assert_close(lora.deltas[module].dense(dtype=torch.float64), want, rtol=0, atol=1e-6)
    with pytest.raises(
        AdapterMismatchError, match=r"LoRTA is read, merged and lent to slots, not written.*\n.*--to lora"
    ):
        write_folder(adapter, tmp_path / "again")


def test_merged_into_a_model_and_lent_to_slots(bases, tmp_path):
    base, rng = bases("bert"), np.random.default_rng(3)
    sides = {"lorta_in": 48, "lorta_out": 12, "lorta_heads": 4, "lorta_layers": 2, "lorta_matrices": 2}
    part = {name: rng.normal(size=(side, 2)).astype(np.float32) * 0.4 for name, side in sides.items()}
    places = {f"encoder.layer.{i}.attention.self.{m}": [i, j] for i in (0, 1) for j, m in enumerate(("query", "value"))}
    fields = {"peft_type": "LORTA", "r": 2, "scaling": 0.5, "modules": places}
    folder = write_peft_example(tmp_path / "lorta", fields, {f"base_model.model.{n}": t for n, t in part.items()})
    done = CliRunner().invoke(main, ["merge", str(base), str(folder), "-o", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    from transformers import AutoModel

    before, after = (AutoModel.from_pretrained(path).state_dict() for path in (base, tmp_path / "merged"))
    for module, (layer, matrix) in places.items():
        found = (after[f"{module}.weight"].double() - before[f"{module}.weight"].double()).numpy()
        np.testing.assert_allclose(found, definition(part, layer, matrix), atol=1e-6)
    done = CliRunner().invoke(main, ["export", "--onnx", str(base), str(folder), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output  # which holds the slots against torch with ΔW in its weights


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


BAD = [
    ({"r": 4}, None, r"r is 4 in adapter_config\.json, its factors have \{"),
    ({"scaling": "left out"}, None, "scaling is None, not a finite number"),
    ({"modules": "left out"}, None, r"(?s)modules is None\..*which module is which"),
    ({"modules": {"encoder.0.q": [2, 0]}}, None, r"encoder\.0\.q is at \[2, 0\]; there are 2 layers and 3 matrices"),
    ({"modules": {"encoder.0.q": [True, 0]}}, None, r"is at \[True, 0\]"),
    ({"modules": {"encoder.0.q": 1}}, None, "is at 1;"),
    ({"gathering": [3]}, None, r"gathering is \[3\], not matrices of 0…2"),
    ({"gathering": "o"}, None, "gathering is 'o'"),
    ({}, without("heads"), "and no lorta_heads"),
    ({}, without(""), "no tensor of a LORTA adapter"),
    ({}, lambda t: {k: v.astype(np.float16) if k.endswith("in") else v for k, v in t.items()}, "mixes dtypes"),
    ({}, lambda t: {k: v * np.nan if k.endswith("in") else v for k, v in t.items()}, "NaN or infinite"),
]


@pytest.mark.hostile
@pytest.mark.parametrize(("config", "change", "message"), BAD)
def test_what_cannot_be_meant_is_refused(tmp_path, config, change, message):
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path, change or (lambda tensors: tensors), **config)

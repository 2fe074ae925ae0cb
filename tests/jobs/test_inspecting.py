"""Inspecting: numbers of an adapter, its match against a base, and its picture."""

import sys

import numpy as np
import pytest

from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import CONFIG, write_folder
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterMismatchError, DependencyError, OutputError
from ssh_deploy.jobs import picture
from ssh_deploy.jobs.inspecting import inspect_adapter
from ssh_deploy.testing import random_adapter
from ssh_deploy.transforms import reference

MODULES = {"bert.encoder.layer.0.output.dense": (48, 80), "bert.encoder.layer.1.attention.self.key": (48, 48)}
HEAD = {"classifier": {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}}


def stored(tmp_path, **fields):
    path = tmp_path / "adapter.safetensors"
    adapter = random_adapter(MODULES, n=20, heads=HEAD, **fields)
    write_file(adapter, path, values_dtype=np.float32, overwrite=True)
    return path


@pytest.mark.parametrize("transform", ["hartley", "hartley-joint", "cosine"])
def test_numbers(tmp_path, transform):
    path = stored(tmp_path, transform=transform, alpha=7.0, labels=("a", "b", "c"), task="text-classification")
    found = inspect_adapter(path)
    assert found.form == "compact file"
    assert found.transforms == (transform,)
    assert found.alphas == (7.0,)
    assert found.labels == ("a", "b", "c")
    assert found.settings["n"] == 20
    assert (found.parameters, found.head_parameters) == (40, 3 * 48 + 3)
    assert found.bytes == path.stat().st_size
    assert found.lora_parameters == 8 * (48 + 80) + 8 * (48 + 48)
    assert found.lora_bytes == 2 * found.lora_parameters
    assert found.fits
    adapter = random_adapter(MODULES, n=20, transform=transform, alpha=7.0)
    for view in found.modules:
        d = adapter.deltas[view.module]
        want = reference.delta(d.transform, d.rows, d.cols, d.values, d.shape, alpha=d.alpha, norm=d.norm)
        assert view.norm == pytest.approx(np.linalg.norm(want), rel=1e-6)
        assert view.shape == MODULES[view.module]
    text = "\n".join(found.lines())
    for word in ("48×80", found.digest, "classifier", transform, "LoRA r=8", "α = 7", "a, b, c"):
        assert word in text


@pytest.mark.parametrize("transform", ["hartley-joint", "fourier"])
def test_the_norm_of_places_that_meet_in_the_separable_basis(tmp_path, transform):
    """Places such as (0, v), (M/2, v), (u, v) beside (−u, v) or (−u, −v) share separable terms."""
    module = "bert.encoder.layer.0.output.dense"
    adapter = random_adapter({module: (48, 80)}, n=6, transform=transform)
    delta = adapter.deltas[module]
    delta.rows[:], delta.cols[:] = (0, 24, 5, 43, 43, 0), (7, 9, 6, 6, 74, 0)
    write_file(adapter, tmp_path / "a.safetensors", values_dtype=np.float32)
    want = reference.delta(
        delta.transform, delta.rows, delta.cols, delta.values, delta.shape, alpha=delta.alpha, norm=delta.norm
    )
    assert inspect_adapter(tmp_path / "a.safetensors").modules[0].norm == pytest.approx(np.linalg.norm(want), rel=1e-6)


def test_against_bases(pico, tmp_path):
    fingerprint = fingerprint_of(open_checkpoint(pico("bert")), MODULES)
    path = stored(tmp_path, fingerprint=fingerprint)
    assert inspect_adapter(path, base=pico("bert")).against.match == "verified"
    assert inspect_adapter(path, base=pico("bert", task="text-classification", seed=0)).against.match == "does not fit"
    other = inspect_adapter(path, base=pico("bert", seed=1))
    assert not other.fits
    assert "another base" in other.against.reason
    wrong = inspect_adapter(path, base=pico("gpt2"))
    assert not wrong.fits
    assert "match nothing" in wrong.against.reason
    assert not wrong.as_dict()["fits"]
    assert any("does not fit" in line for line in wrong.lines())


def test_without_a_fingerprint_it_is_unverified(pico, tmp_path):
    assert inspect_adapter(stored(tmp_path), base=pico("bert")).against.match == "base unverified"


def test_a_folder_without_shapes_needs_a_base_that_fits(pico, tmp_path):
    import json

    write_folder(random_adapter(MODULES, n=20), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    del config["module_shapes"]
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    found = inspect_adapter(tmp_path / "peft", base=pico("bert"))
    assert found.form == "PEFT folder"
    assert [m.shape for m in found.modules] == [MODULES[m.module] for m in found.modules]
    with pytest.raises(AdapterMismatchError, match="match nothing in the base"):
        inspect_adapter(tmp_path / "peft", base=pico("gpt2"))


def test_picture_is_a_png_of_what_it_shows(tmp_path):
    """Drawn twice it is the same; another adapter's is another; the file is whole."""
    pictures = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.png"
        inspect_adapter(stored(tmp_path, seed=seed), plot=out)
        pictures.append(out.read_bytes())
    assert all(p[:8] == b"\x89PNG\r\n\x1a\n" and len(p) > 20_000 for p in pictures)
    assert pictures[0] == pictures[1] != pictures[2]
    assert {p.name for p in tmp_path.iterdir()} == {"0.png", "1.png", "2.png", "adapter.safetensors"}


def test_what_is_too_large_is_not_formed(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "MAX_DENSE", 100)
    monkeypatch.setattr(picture, "synthesis", lambda *_, **__: pytest.fail("ΔW was formed"))
    inspect_adapter(stored(tmp_path), plot=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_pooling_keeps_maxima():
    change = np.random.default_rng(0).random((1500, 40))
    pooled = picture._pooled(change)
    np.testing.assert_array_equal(pooled, change.reshape(500, 3, 40).max(axis=1))


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"--plot needs matplotlib.*\n.*ssh-deploy\[plot\]"):
        inspect_adapter(stored(tmp_path), plot=tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        inspect_adapter(stored(tmp_path), plot=tmp_path / "no" / "such" / "a.png")

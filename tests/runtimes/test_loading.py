"""Reading one adapter into an open folder: the same rows from every kind of file, and what is kept between loads."""

import json
from dataclasses import replace

import numpy as np
import pytest
from contract_folder import SITES, add_stored, edit, make_folder, weights, write_onnx_adapter
from safetensors.numpy import save_file

from ssh_deploy import registry
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.checkpoints.fingerprint import Fingerprint, sample
from ssh_deploy.errors import AdapterMismatchError, DeploymentError, FingerprintError
from ssh_deploy.runtimes.folder import BASE_HEAD, FINGERPRINT, MODEL, open_folder
from ssh_deploy.runtimes.loading import prepare, read_source
from ssh_deploy.runtimes.session import Session
from ssh_deploy.testing import random_adapter
from ssh_deploy.transforms import get_transform

HEAD = {"classifier": {"weight": np.ones((2, 8), np.float32), "bias": np.arange(2, dtype=np.float32)}}
BASE = Fingerprint("bert", {site: sample(weights()[site]) for site in SITES})


@pytest.fixture
def place(tmp_path):
    """A folder with fingerprint and base head, and its adapter inputs."""
    root = make_folder(tmp_path / "out", base_labels=3)
    shapes = {site: list(s.shape) for site, s in BASE.sites.items()}
    metadata = {"architecture": "bert", "sites": json.dumps(shapes)}
    save_file({site: s.values for site, s in BASE.sites.items()}, root / FINGERPRINT, metadata=metadata)
    save_file({"classifier.weight": np.ones((3, 8), np.float32)}, root / BASE_HEAD)
    edit(root, lambda fields: fields.update(fingerprint=BASE.sha256))
    return root, Session(root / MODEL, threads=1).adapter_inputs


def read(folder, inputs, path):
    return read_source(folder, inputs, stored=None, path=path)


def made(path, **options):
    adapter = random_adapter(SITES, **({"n": 9, "fingerprint": BASE} | options))
    write_file(adapter, path)
    return adapter


@pytest.mark.parametrize("transform", ["hartley", "hartley-joint", "cosine"])
def test_compact_file_peft_folder_and_onnx_adapter_give_the_same_rows(tmp_path, place, transform):
    root, inputs = place
    adapter = random_adapter(SITES, n=9, transform=transform, heads=HEAD, labels=("a", "b"))
    halves = {m: replace(d, values=d.values.astype(np.float16)) for m, d in adapter.deltas.items()}
    adapter = replace(adapter, deltas=halves)
    write_file(adapter, tmp_path / "a.safetensors")
    write_folder(adapter, tmp_path / "peft")
    folder = open_folder(root)
    first = read(folder, inputs, tmp_path / "a.safetensors")
    arrays = {name: array for rows in first.kinds.values() for name, array in rows.items()}
    assert arrays["adapter_cosine_values" if transform == "cosine" else "adapter_values"].shape[1] == (
        37 if transform == "hartley-joint" else 10
    )  # its own width, whatever a bank's
    write_onnx_adapter(tmp_path / "a.onnx_adapter", arrays)
    add_stored(root, "mine", arrays, labels=("a", "b"))
    reopened = open_folder(root)
    others = [
        read(folder, inputs, tmp_path / "peft"),
        read(folder, inputs, tmp_path / "a.onnx_adapter"),
        read_source(reopened, inputs, stored=reopened.adapters["mine"], path=None),
    ]
    for other in others:
        assert other.kinds.keys() == first.kinds.keys()
        for kind, rows in first.kinds.items():
            assert other.kinds[kind].keys() == rows.keys()
            for name, array in rows.items():
                assert (array.dtype, array.shape) == (other.kinds[kind][name].dtype, other.kinds[kind][name].shape)
                assert array.tobytes() == other.kinds[kind][name].tobytes(), name


def test_what_the_folder_says_is_read_once_and_still_checks_later_adapters(tmp_path, place):
    root, inputs = place
    folder = open_folder(root)
    made(tmp_path / "a.safetensors")
    assert read(folder, inputs, tmp_path / "a.safetensors").verified is True
    (root / FINGERPRINT).unlink()
    (root / BASE_HEAD).unlink()
    made(tmp_path / "b.safetensors", seed=1)
    assert read(folder, inputs, tmp_path / "b.safetensors").verified is True
    other = Fingerprint("bert", {site: sample(weights(7)[site]) for site in SITES})
    made(tmp_path / "c.safetensors", seed=2, fingerprint=other)
    with pytest.raises(FingerprintError, match=r"c\.safetensors: made for another base"):
        read(folder, inputs, tmp_path / "c.safetensors")
    assert read(open_folder(root), inputs, tmp_path / "b.safetensors").verified is False  # opened again, read again


@pytest.mark.parametrize("transform", ["hartley", "cosine"])
def test_the_first_adapter_of_a_prepared_folder_looks_up_no_plugins(tmp_path, place, transform):
    root, inputs = place
    folder = open_folder(root)
    made(tmp_path / "a.safetensors", transform=transform)
    registry._points.cache_clear()
    get_transform.cache_clear()
    prepare(folder)
    looked_up, imported = registry._points.cache_info().misses, get_transform.cache_info().misses
    read(folder, inputs, tmp_path / "a.safetensors")
    assert looked_up == registry._points.cache_info().misses == 2
    assert imported == get_transform.cache_info().misses


def test_adapters_of_the_same_modules_in_another_order_take_their_own_rows(tmp_path, place):
    root, inputs = place
    folder = open_folder(root)
    adapter = made(tmp_path / "a.safetensors")
    turned = replace(adapter, deltas=dict(reversed(adapter.deltas.items())))
    write_file(turned, tmp_path / "b.safetensors")
    one, other = (read(folder, inputs, tmp_path / f"{name}.safetensors").kinds["hartley"] for name in "ab")
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes()


def test_a_refusal_is_not_kept_and_names_its_own_file(tmp_path, place):
    root, inputs = place
    folder = open_folder(root)
    strange = random_adapter({"layer.quary": (10, 12)}, n=3)
    for name in ("first", "second"):
        write_file(strange, tmp_path / f"{name}.safetensors", overwrite=True)
        with pytest.raises(AdapterMismatchError, match=rf"{name}\.safetensors: 1 of 1 modules"):
            read(folder, inputs, tmp_path / f"{name}.safetensors")


def test_orders_of_another_release_are_refused(tmp_path, place):
    root, inputs = place
    edit(root, lambda fields: fields["orders"]["hartley"].update({"12": [3, 4]}))
    made(tmp_path / "a.safetensors")
    with pytest.raises(DeploymentError, match=r"orders length 12 of hartley as \(3, 4\), this release as"):
        read(open_folder(root), inputs, tmp_path / "a.safetensors")


def test_copies_of_a_base_that_were_rounded_are_the_same_base(tmp_path, place):
    """Samples that are not the same bits are measured, not refused."""
    root, inputs = place
    rounded = {site: sample(weights()[site].astype(np.float16) * np.float16(1.003)) for site in SITES}
    assert any(s.values.tobytes() != BASE.sites[site].values.tobytes() for site, s in rounded.items())
    made(tmp_path / "a.safetensors", fingerprint=Fingerprint("bert", rounded))
    assert read(open_folder(root), inputs, tmp_path / "a.safetensors").verified is True

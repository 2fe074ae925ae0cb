"""Compact adapter files that must be refused, each with its message; mere claims allocate nothing."""

import json
import struct
import sys
import tracemalloc

import ml_dtypes  # noqa: F401 - gives numpy the name bfloat16
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssh_deploy.adapters.base import MAX_SIDE
from ssh_deploy.adapters.file import content_digest, read_file, write_file
from ssh_deploy.adapters.fitting import fit
from ssh_deploy.adapters.reading import read_adapter
from ssh_deploy.checkpoints.fingerprint import Fingerprint, sample
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError, DeployError, FingerprintError
from ssh_deploy.testing import random_adapter

pytestmark = pytest.mark.hostile

SITE = "encoder.layer.0.attention.self.query"
HEAD = {"classifier": {"weight": np.ones((3, 48), np.float32), "bias": np.zeros(3, np.float32)}}


def example(**fields):
    fingerprint = Fingerprint("bert", {SITE: sample(np.linspace(-1, 1, 48 * 48, dtype=np.float32).reshape(48, 48))})
    return random_adapter({SITE: (48, 48)}, n=12, heads=HEAD, **({"fingerprint": fingerprint} | fields))


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    write_file(example(), path)
    return path


def parts_of(path):
    """Header (object) and payload."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(path, header, payload):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def forge(good, path, *, fields=None, tensors=None, metadata=None):
    """A file whose digest is right and whose content is what a forger wants."""
    header, payload = parts_of(good)
    meta = header.pop("__metadata__")
    adapter = json.loads(meta["adapter"])
    for key, value in (fields or {}).items():
        adapter[key] = value
    meta["adapter"] = json.dumps(adapter)
    meta.update(metadata or {})
    arrays = {
        name: np.frombuffer(payload[slice(*e["data_offsets"])], NUMPY[e["dtype"]]).reshape(e["shape"])
        for name, e in header.items()
    }
    for name, value in (tensors or {}).items():
        if value is None:
            arrays.pop(name)
        else:
            arrays[name] = value
    table, blob = {}, b""
    for name, array in arrays.items():
        code = next(c for c, d in NUMPY.items() if d == array.dtype)
        table[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [len(blob), len(blob) + array.nbytes]}
        blob += array.tobytes()
    meta.pop("sha256")
    meta["sha256"] = content_digest(meta, table, memoryview(blob))
    return write_parts(path, {"__metadata__": meta, **table}, blob)


NUMPY = {
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype("bfloat16"),
}
VALUES, ROWS, COLS = (f"spectral.{SITE}.{part}" for part in ("values", "rows", "cols"))


def content(adapter):
    """Everything a reader could act on."""
    return (
        adapter.digest,
        adapter.family,
        adapter.base,
        adapter.task,
        adapter.labels,
        sorted(adapter.settings.items()),
        [
            (m, d.shape, d.transform, d.alpha, d.norm, d.rows.tobytes(), d.cols.tobytes(), d.values.tobytes())
            for m, d in sorted(adapter.deltas.items())
        ],
        [(m, n, t.tobytes()) for m, r in sorted(adapter.replaced.items()) for n, t in sorted(r.tensors.items())],
        adapter.fingerprint.sha256 if adapter.fingerprint else None,
    )


def test_the_forger_can_make_a_good_file(good, tmp_path):
    """The helper itself is sound: without a forgery its file reads as the original."""
    again = read_file(forge(good, tmp_path / "again.safetensors"))
    assert content(again)[1:] == content(read_file(good))[1:]


def test_truncated_at_every_length(good, tmp_path):
    raw = good.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(200), *range(200, len(raw), 37), len(raw) - 1]:
        cut.write_bytes(raw[:length])
        with pytest.raises(AdapterFileError, match=r"truncated|no safetensors file|not JSON"):
            read_file(cut)


def test_bytes_behind_the_end(good, tmp_path):
    longer = tmp_path / "long.safetensors"
    longer.write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(AdapterFileError, match="bytes of payload"):
        read_file(longer)


def test_every_bit_of_the_payload_is_covered(good, tmp_path):
    """One bit flipped in each payload byte: always refused."""
    raw = bytearray(good.read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    bad = tmp_path / "bad.safetensors"
    for place in range(start, len(raw)):
        raw[place] ^= 1 << place % 8
        bad.write_bytes(raw)
        with pytest.raises(AdapterFileError, match="bits were changed"):
            read_file(bad)
        raw[place] ^= 1 << place % 8


def test_every_bit_of_the_header_is_covered(good, tmp_path):
    """One bit flipped in each header byte and in the length: refused, or what it says is the same (spaces)."""
    raw = bytearray(good.read_bytes())
    stop = 8 + struct.unpack("<Q", raw[:8])[0]
    want = content(read_file(good))
    bad = tmp_path / "bad.safetensors"
    refused = 0
    for place in range(stop):
        for bit in {place % 8, (place * 5 + 3) % 8}:
            raw[place] ^= 1 << bit
            bad.write_bytes(raw)
            try:
                assert content(read_file(bad)) == want
            except DeployError:
                refused += 1
            raw[place] ^= 1 << bit
    assert refused > 1.5 * stop


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_without_effect(good, tmp_path, data):
    """Several bytes replaced, inserted or removed anywhere: never another exception, never other content."""
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "remove"]))
        if kind == "replace":
            raw[place] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw.insert(place, data.draw(st.integers(0, 255)))
        else:
            del raw[place]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(raw)
    try:
        found = read_file(bad)
    except DeployError as refusal:
        told = refusal
    else:
        assert content(found) == content(read_file(good))
        return
    assert "bad.safetensors" in told.what
    assert told.hint


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\x05\0\0\0\0\0\0\0hello", "header is not JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "header is not a JSON object"),
        (b"\x02\0\0\0\0\0\0\0{}", "not a compact adapter file"),
        (b"\xff" * 64, "truncated or damaged"),
        (struct.pack("<Q", 1 << 40) + b"{}", "truncated or damaged"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "header is not JSON"),
        (b"PK\x03\x04" + b"\0" * 60, "truncated or damaged"),
        (struct.pack("<Q", 64) + b'{"a":1,"a":2}'.ljust(64), "names 'a' twice"),
        (struct.pack("<Q", 64) + b'{"__metadata__":{"a":[1]}}'.ljust(64), "metadata is not text"),
        (struct.pack("<Q", 64) + b'{"a":[1,2]}'.ljust(64), "entry of 'a' is not a tensor"),
    ],
)
def test_wrong_headers(tmp_path, raw, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(AdapterFileError, match=message):
        read_adapter(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 999]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [4], "data_offsets": "ab"},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [1] * 9 + [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]},
    ],
)
def test_tensor_entries_that_lie(tmp_path, entry):
    path = write_parts(tmp_path / "x.safetensors", {"evil": entry}, b"\0" * 16)
    with pytest.raises(AdapterFileError, match=r"'evil' declares|entry of 'evil' is not a tensor"):
        read_adapter(path)


def test_tensors_that_overlap_or_leave_a_gap(tmp_path):
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for offsets in ([4, 12], [12, 20]):
        two = {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        path = write_parts(tmp_path / "x.safetensors", {"a": one, "b": two}, b"\0" * 20)
        with pytest.raises(AdapterFileError, match="overlap or leave a gap"):
            read_adapter(path)


F = np.float16
ROW_TYPE = np.uint16


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({ROWS: np.array([48, *range(11)], ROW_TYPE)}, r"coefficient 0 has row 48, outside 0…47"),
        ({COLS: np.array([*range(11), 65535], ROW_TYPE)}, r"coefficient 11 has column 65535, outside 0…47"),
        ({ROWS: np.zeros(12, ROW_TYPE), COLS: np.zeros(12, ROW_TYPE)}, r"place \(0, 0\) occurs twice"),
        ({VALUES: np.array([np.nan] * 2 + [1] * 10, F)}, "2 of 12 values are NaN or infinite"),
        ({VALUES: np.array([-np.inf] + [1] * 11, F)}, "1 of 12 values are NaN or infinite"),
        ({VALUES: np.ones(11, F)}, "are not one length"),
        ({VALUES: np.ones((12, 1), F)}, "are not one length"),
        ({ROWS: np.arange(12, dtype=np.int32), COLS: np.arange(12, dtype=np.int32)}, "places are int32"),
        ({ROWS: np.arange(12, dtype=np.uint32)}, "rows uint32, cols uint16"),
        ({VALUES: np.arange(12, dtype=np.int32)}, "values int32"),
        ({VALUES: None}, "declared and missing"),
        ({"stray": np.ones(3, F)}, r"tensors that nothing declares: \['stray'\]"),
        ({"replaced.classifier.bias": np.array([np.nan, 0, 0], F)}, r"classifier\.bias: 1 of 3 values are NaN"),
        (
            {VALUES: np.ones(2305, F), ROWS: np.zeros(2305, ROW_TYPE), COLS: np.zeros(2305, ROW_TYPE)},
            "2305 coefficients in a weight of 48×48",
        ),
        ({f"fingerprint.{SITE}": np.ones(256, np.float32)}, "fingerprint of .* is float32"),
        ({f"fingerprint.{SITE}": np.ones(256, np.dtype("bfloat16"))}, "fingerprint samples do not have its sha256"),
    ],
)
def test_forged_tensors_with_a_right_digest(good, tmp_path, tensors, message):
    with pytest.raises(AdapterFileError, match=message):
        read_adapter(forge(good, tmp_path / "forged.safetensors", tensors=tensors))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transform": "wavelet"}, r"transform is 'wavelet'.*\n.*cosine, fourier, hartley, hartley-joint"),
        ({"family": "nobodys"}, r"family is 'nobodys'.*\n.*sdctft, .*ssh"),
        ({"family": ["ssh"]}, "family is"),
        ({"scaling": "alpha*9"}, "scaling is"),
        ({"orientation": "diagonal"}, "orientation is"),
        ({"alpha": "12"}, "alpha is '12', not a finite number"),
        ({"alpha": True}, "not a finite number"),
        ({"alpha": None}, "not a finite number"),
        ({"alpha": float("nan")}, "not a finite number"),
        ({"alpha": float("inf")}, "not a finite number"),
        ({"alpha": 10**400}, "not a finite number"),
        ({"modules": {SITE: [48]}}, "not two sides"),
        ({"modules": {SITE: [0, 48]}}, "not two sides"),
        ({"modules": {SITE: [-48, -48]}}, "not two sides"),
        ({"modules": {SITE: [48.0, 48]}}, "not two sides"),
        ({"modules": {SITE: [True, 48]}}, "not two sides"),
        ({"modules": {SITE: [MAX_SIDE + 1, 48]}}, "not two sides"),
        ({"modules": {SITE: "48x48"}}, "not two sides"),
        ({"modules": [SITE]}, "modules is .* not an object"),
        ({"modules": {}}, "tensors that nothing declares"),
        ({"modules": {"other": [48, 48]}}, r"'spectral\.other\.values' is declared and missing"),
        ({"heads": {"classifier": "weight"}}, "head 'classifier' lists no tensors"),
        ({"heads": None}, "heads is None, not an object"),
        ({"labels": "abc"}, "labels are not a list"),
        ({"labels": [1, 2, 3]}, "labels are not a list"),
        ({"task": "chess"}, r"task is 'chess'.*\n.*text-classification"),
        ({"base": 7}, "base is 7, not text"),
        ({"fingerprint": {"architecture": 3}}, "fingerprint names no architecture"),
        ({"fingerprint": "abc"}, "fingerprint names no architecture"),
    ],
)
def test_forged_fields_with_a_right_digest(good, tmp_path, fields, message):
    with pytest.raises(AdapterFileError, match=message):
        read_adapter(forge(good, tmp_path / "forged.safetensors", fields=fields))


def test_shapes_nested_as_deep_as_json_is_read_and_deeper(good, tmp_path):
    """What the parser just takes, everything after it must take, too."""
    fields = json.loads(parts_of(good)[0]["__metadata__"]["adapter"])
    text = json.dumps({**fields, "modules": {SITE: "here"}})
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        nested = text.replace('"here"', "[" * depth + "]" * depth)
        with pytest.raises(AdapterFileError, match=r"not two sides|is not JSON"):
            read_adapter(forge(good, tmp_path / "forged.safetensors", metadata={"adapter": nested}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, r"format version '2'; this release reads 1.*\n.*Upgrade"),
        ({"format": "gguf"}, "not a compact adapter file"),
        ({"adapter": "{"}, "'adapter' is not JSON"),
        ({"adapter": "[]"}, "'adapter' is not an object"),
        ({"adapter": "[" * 100_000}, "'adapter' is not JSON"),
    ],
)
def test_forged_metadata(good, tmp_path, metadata, message):
    with pytest.raises(AdapterFileError, match=message):
        read_adapter(forge(good, tmp_path / "forged.safetensors", metadata=metadata))


def peak_of(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_small_file_that_asks_for_a_huge_weight_allocates_nothing(pico, tmp_path):
    """A few hundred bytes claiming 100,000² (40 GB in f32): read lazily, refused by the base's own shape."""
    adapter = random_adapter({SITE: (60_000, 60_000)}, n=1)
    write_file(adapter, tmp_path / "bomb.safetensors")
    path = forge(
        tmp_path / "bomb.safetensors",
        tmp_path / "bigger.safetensors",
        fields={"modules": {SITE: [100_000, 100_000]}},
        tensors={ROWS: np.array([99_999], np.uint32), COLS: np.array([99_999], np.uint32)},
    )
    assert path.stat().st_size < 1_500
    checkpoint = open_checkpoint(pico("bert"))

    def refused():
        with pytest.raises(AdapterMismatchError, match=r"weight of 100000×100000; .* has 48×48"):
            fit(path, checkpoint)

    refused()  # warm: imports are not the file's doing
    assert peak_of(refused) < 2_000_000


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "encoder.layer.0.attention.self.quary",
            r"1 of 1 modules .*\n.*Did you mean encoder\.layer\.0.*query",
        ),
        ("model.layers.0.q_proj", r"match nothing"),
    ],
)
def test_modules_that_match_nothing(pico, tmp_path, module, message):
    write_file(random_adapter({module: (48, 48)}), tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match=message):
        fit(tmp_path / "a.safetensors", open_checkpoint(pico("bert")))


def test_modules_that_match_only_partly(pico, tmp_path):
    modules = {f"bert.encoder.layer.{i}.attention.self.query": (48, 48) for i in range(4)}
    write_file(random_adapter(modules), tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"2 of 4 modules .*layer\.2.*layer\.3.*\n.*Did you mean"):
        fit(tmp_path / "a.safetensors", open_checkpoint(pico("bert")))


def test_an_adapter_of_another_base(pico, tmp_path):
    stored = fingerprint_of(open_checkpoint(pico("bert")), [SITE])
    write_file(random_adapter({SITE: (48, 48)}, fingerprint=stored, base="org/first"), tmp_path / "a.safetensors")
    assert fit(tmp_path / "a.safetensors", open_checkpoint(pico("bert"))).verified
    with pytest.raises(FingerprintError, match=r"another base .*names org/first.*differs at \d+ of 256 sampled"):
        fit(tmp_path / "a.safetensors", open_checkpoint(pico("bert", seed=1)))
    with pytest.raises(FingerprintError, match="architecture bert against roberta"):
        fit(tmp_path / "a.safetensors", open_checkpoint(pico("roberta")))


def test_a_fingerprint_that_leaves_a_site_out_proves_nothing(pico, tmp_path):
    other = "encoder.layer.1.attention.self.query"
    stored = fingerprint_of(open_checkpoint(pico("bert")), [SITE])
    write_file(random_adapter({SITE: (48, 48), other: (48, 48)}, fingerprint=stored), tmp_path / "a.safetensors")
    with pytest.raises(FingerprintError, match=rf"{other} has no samples"):
        fit(tmp_path / "a.safetensors", open_checkpoint(pico("bert")))


def test_an_adapter_without_fingerprint_where_one_is_required(pico, tmp_path):
    write_file(random_adapter({SITE: (48, 48)}), tmp_path / "a.safetensors")
    assert not fit(tmp_path / "a.safetensors", open_checkpoint(pico("bert"))).verified
    with pytest.raises(FingerprintError, match=r"stores no fingerprint.*\n.*ssh-deploy convert"):
        fit(tmp_path / "a.safetensors", open_checkpoint(pico("bert")), require_fingerprint=True)


@pytest.mark.parametrize("name", ["no.safetensors", "no-folder", "null\0byte"])
def test_nothing_there(tmp_path, name):
    with pytest.raises(AdapterFileError, match=r"no such file or folder.*\n.*compact"):
        read_adapter(tmp_path / name)

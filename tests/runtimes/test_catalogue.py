"""Names of an open deployment: eviction, files that change or vanish, replacing, pinning, unloading in use."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
from contract_folder import SITES, add_stored, make_folder

from ssh_deploy import Deployment
from ssh_deploy.adapters.file import write_file
from ssh_deploy.adapters.peft_folder import write_folder
from ssh_deploy.errors import AdapterFileError, DeploymentError, UnknownNameError
from ssh_deploy.runtimes import sources
from ssh_deploy.runtimes.conversion import rows_of_adapter
from ssh_deploy.testing import random_adapter

FEEDS = {"input_ids": np.arange(4, 10)[None], "attention_mask": np.ones((1, 6), np.int64)}
#: bytes of a spectrum of 28 coefficients and a zero in two sites of 10 and 8 rows
ROW = 2 * (29 * (2 + 2) + 4) + (11 + 9) * 2
HEAD = 64 * 8 * 4 + 64 * 4


def write(path, seed, *, n=9, labels=0, age=True, **options):
    heads = {"classifier": {"weight": np.random.default_rng(seed).normal(size=(labels, 8)).astype(np.float32)}}
    adapter = random_adapter(SITES, n=n, seed=seed, heads=heads if labels else None, **options)
    write_file(adapter, path, overwrite=True)
    if age:  # a file stamped just now proves nothing by its time, and is read at every use
        back = time.time_ns() - 10**9 - seed * 10**6
        os.utime(path, ns=(back, back))
    return path


def opened(tmp_path, *, rows=None, **options):
    memory = "64MiB" if rows is None else max(rows * ROW, ROW + HEAD)
    return Deployment.open(
        make_folder(tmp_path / "out", base_labels=3), threads=1, memory=memory, max_coefficients=28, **options
    )


def answer(deployment, name):
    return deployment.run(FEEDS, name)["last_hidden_state"][0]


def states(deployment):
    return {name: entry.state for name, entry in deployment.adapters.items()}


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read, in order."""
    seen = []
    plain = sources.read_source
    monkeypatch.setattr(
        sources, "read_source", lambda *args, **options: seen.append(options["path"]) or plain(*args, **options)
    )
    return seen


def test_evicted_adapters_are_read_again_at_their_next_use(tmp_path, reads):
    deployment = opened(tmp_path, rows=10)
    names = [f"a{i}" for i in range(25)]
    for i, name in enumerate(names):
        deployment.load(name, write(tmp_path / f"{name}.safetensors", i))
    assert sorted(states(deployment).values()) == ["evicted"] * 15 + ["resident"] * 10
    assert deployment.nbytes == 10 * ROW
    assert len(reads) == 25
    first = [answer(deployment, name) for name in names]
    again = [answer(deployment, name) for name in reversed(names)][::-1]
    assert len(reads) == 25 + 25 + 15  # in order each had just been evicted; backwards the last ten are there
    for i in range(25):
        assert first[i].tobytes() == again[i].tobytes()
        assert all(np.abs(first[i] - first[j]).max() > 1e-3 for j in range(i))
    assert deployment.nbytes == 10 * ROW


def test_an_unverified_base_is_said_once_not_at_every_reading(tmp_path, caplog):
    deployment = opened(tmp_path, rows=10)
    for _ in range(3):
        for i in range(11):
            deployment.load(f"a{i}", write(tmp_path / f"a{i}.safetensors", i))
    assert len([r for r in caplog.records if "base unverified" in r.message]) == 11


def test_a_changed_file_is_a_new_adapter_at_once(tmp_path, reads):
    deployment = opened(tmp_path)
    path, other = write(tmp_path / "a.safetensors", 1), write(tmp_path / "b.safetensors", 2)
    deployment.load("a", path)
    deployment.load("b", other)
    one, two = answer(deployment, "a"), answer(deployment, "b")
    digest = deployment.adapters["a"].digest
    assert len(reads) == 2
    os.utime(path)  # touched: read again once it has settled, the same content, nothing else happens
    assert answer(deployment, "a").tobytes() == one.tobytes()
    time.sleep(0.03)
    answer(deployment, "a")
    count = len(reads)
    assert answer(deployment, "a").tobytes() == one.tobytes()
    assert len(reads) == count > 2
    write(path, 2)  # now what b is
    assert answer(deployment, "a").tobytes() == two.tobytes()
    assert deployment.adapters["a"].digest == deployment.adapters["b"].digest != digest
    assert deployment.nbytes == ROW  # one content, and the old one is gone


def test_a_file_rewritten_within_a_tick_of_the_clock_is_noticed(tmp_path):
    """Same inode, size and time: only that the file was young when it was read tells that it must be read again."""
    deployment = opened(tmp_path)
    path, other = tmp_path / "a.safetensors", write(tmp_path / "b.safetensors", 2)
    write(path, 1)
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    deployment.load("a", path)
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(now, now))
    deployment.load("b", other)
    assert answer(deployment, "a").tobytes() == answer(deployment, "b").tobytes()


def test_a_peft_folder_that_changes(tmp_path):
    deployment = opened(tmp_path)
    for seed, name in ((1, "a"), (2, "b")):
        write_folder(random_adapter(SITES, n=9, seed=seed), tmp_path / name)
    deployment.load("a", tmp_path / "a")
    deployment.load("c", tmp_path / "a" / "adapter_config.json")  # one of its files stands for it
    deployment.load("b", tmp_path / "b")
    assert answer(deployment, "a").tobytes() != answer(deployment, "b").tobytes()
    shutil.copy(tmp_path / "b" / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    for name in ("a", "c"):
        assert answer(deployment, name).tobytes() == answer(deployment, "b").tobytes()


def test_a_vanished_file_serves_as_long_as_it_is_resident(tmp_path):
    deployment = opened(tmp_path, rows=10)
    path = write(tmp_path / "a.safetensors", 99)
    deployment.load("a", path)
    kept = answer(deployment, "a")
    path.unlink()
    assert answer(deployment, "a").tobytes() == kept.tobytes()
    for i in range(10):
        deployment.load(f"b{i}", write(tmp_path / f"b{i}.safetensors", i))
    with pytest.raises(DeploymentError, match=r"(?s)a: its file .*a\.safetensors is gone.*Put the file back"):
        answer(deployment, "a")
    write(path, 99)
    assert answer(deployment, "a").tobytes() == kept.tobytes()


def test_a_broken_file_in_the_place_of_a_good_one_is_an_error_and_heals(tmp_path):
    deployment = opened(tmp_path)
    path = write(tmp_path / "a.safetensors", 1)
    deployment.load("a", path)
    kept, data = answer(deployment, "a"), path.read_bytes()
    path.write_bytes(data[:-50])
    for _ in range(2):
        with pytest.raises(AdapterFileError):
            answer(deployment, "a")
    path.write_bytes(data)
    assert answer(deployment, "a").tobytes() == kept.tobytes()


def test_a_changed_file_of_the_folder_is_an_error_even_while_it_is_resident(tmp_path):
    folder = make_folder(tmp_path / "out", base_labels=3)
    with Deployment.open(folder) as probe:
        rows = rows_of_adapter(random_adapter(SITES, n=5), probe.folder, probe.adapter_inputs)
    stored = add_stored(folder, "own", rows["hartley"])
    deployment = Deployment.open(folder, threads=1)
    kept, data = answer(deployment, "own"), stored.read_bytes()
    stored.write_bytes(data[:-8] + bytes(8))
    with pytest.raises(DeploymentError, match="not those that were exported"):
        answer(deployment, "own")
    stored.write_bytes(data)
    assert answer(deployment, "own").tobytes() == kept.tobytes()


def test_loading_another_file_under_a_name_replaces_it(tmp_path):
    deployment = opened(tmp_path)
    one, two = write(tmp_path / "1.safetensors", 1), write(tmp_path / "2.safetensors", 2)
    deployment.load("one", one)
    deployment.load("two", two)
    deployment.load("name", one)
    assert answer(deployment, "name").tobytes() == answer(deployment, "one").tobytes()
    assert deployment.nbytes == 2 * ROW
    deployment.load("name", two)
    assert answer(deployment, "name").tobytes() == answer(deployment, "two").tobytes()
    deployment.unload("one")
    assert deployment.nbytes == ROW
    with pytest.raises(AdapterFileError):
        deployment.load("name", tmp_path / "none.safetensors")
    assert answer(deployment, "name").tobytes() == answer(deployment, "two").tobytes()  # what it was, it is


def test_a_run_finishes_with_what_it_began_with(tmp_path):
    """Replaced while it runs: the old rows are freed after it, never under it."""
    deployment = opened(tmp_path)
    one, two = write(tmp_path / "1.safetensors", 1), write(tmp_path / "2.safetensors", 2)
    deployment.load("a", one)
    first = answer(deployment, "a")
    with Held(deployment, "a") as run:
        deployment.load("a", two)
        assert deployment.nbytes == 2 * ROW
        second = answer(deployment, "a")
        assert run().tobytes() == first.tobytes()
    assert deployment.nbytes == ROW
    assert second.tobytes() != first.tobytes()


class Held:
    """A run of ``name`` that is in the middle of its work until called or left; the call gives its answer."""

    def __init__(self, deployment, name):
        self.deployment, self.go, self.begun, self.answers = deployment, threading.Event(), threading.Event(), []
        session, plain = deployment._session, deployment._session.run

        def run(feeds, outputs):
            if threading.current_thread() is self.thread:
                self.begun.set()
                assert self.go.wait(10)
            return plain(feeds, outputs)

        session.run = run
        self.name = name
        self.thread = threading.Thread(target=self.work)

    def work(self):
        try:
            self.answers.append(answer(self.deployment, self.name))
        except DeploymentError as error:
            self.answers.append(error)

    def __enter__(self):
        self.thread.start()
        assert self.begun.wait(10)
        return self

    def __call__(self):
        self.go.set()
        self.thread.join(10)
        return self.answers[0]

    def __exit__(self, *exc):
        self()


def test_unloading_in_use_waits_and_refuses_new_requests_at_once(tmp_path):
    deployment = opened(tmp_path)
    deployment.load("a", write(tmp_path / "a.safetensors", 1))
    deployment.load("b", write(tmp_path / "b.safetensors", 2))
    first = answer(deployment, "a")
    with Held(deployment, "a+b") as run:  # a sum uses its terms
        for timeout in (0, 0.01):
            with pytest.raises(DeploymentError, match=r"(?s)a is in use by 1 run; it stays loaded"):
                deployment.unload("a", timeout=timeout)
        assert answer(deployment, "a").tobytes() == first.tobytes()
        unloading = threading.Thread(target=deployment.unload, args=("a",))
        unloading.start()
        while not deployment._catalogue._entries["a"].leaving:
            time.sleep(0.001)
        with pytest.raises(UnknownNameError, match="a was unloaded"):
            answer(deployment, "a")
        with pytest.raises(UnknownNameError, match="a is not loaded"):
            deployment.unload("a")
        assert unloading.is_alive()
        run()
        unloading.join(5)
        assert not unloading.is_alive()
    assert "a" not in deployment.adapters
    assert deployment.nbytes == ROW


def test_loading_again_while_it_is_unloaded(tmp_path):
    deployment = opened(tmp_path)
    path = write(tmp_path / "a.safetensors", 1)
    deployment.load("a", path)
    with Held(deployment, "a"):
        unloading = threading.Thread(target=deployment.unload, args=("a",))
        unloading.start()
        while not deployment._catalogue._entries["a"].leaving:
            time.sleep(0.001)
        deployment.load("a", path)
        kept = answer(deployment, "a")
    unloading.join(5)
    assert answer(deployment, "a").tobytes() == kept.tobytes()
    assert deployment.nbytes == ROW


def test_pins(tmp_path):
    deployment = opened(tmp_path, rows=10)
    for i in range(12):
        deployment.load(f"a{i}", write(tmp_path / f"a{i}.safetensors", i), pin=i == 0)
    assert states(deployment)["a0"] == "resident"
    assert states(deployment)["a1"] == "evicted"
    deployment.pin("a1")  # reads it
    for i in range(2, 12):
        answer(deployment, f"a{i}")
    assert [states(deployment)[f"a{i}"] for i in (0, 1)] == ["resident"] * 2
    write(tmp_path / "a1.safetensors", 50)  # a pin is the name's: it follows the content
    answer(deployment, "a1")
    deployment.unpin("a0")
    for i in range(2, 12):
        answer(deployment, f"a{i}")
    assert [states(deployment)[f"a{i}"] for i in (0, 1)] == ["evicted", "resident"]
    for i in range(2, 11):
        deployment.pin(f"a{i}")
    with pytest.raises(
        DeploymentError, match=rf"(?s)1 distinct adapter at once take {ROW} bytes.*2,800, of which 2,800.*unpin"
    ):
        answer(deployment, "a0")
    for call in (deployment.pin, deployment.unpin):
        with pytest.raises(UnknownNameError, match=r"(?s)no adapter 'a99'.*Did you mean a9"):
            call("a99")
    for i in range(1, 11):
        deployment.unload(f"a{i}")
    answer(deployment, "a0")


def test_many_who_want_one_missing_adapter_read_it_once(tmp_path, reads, monkeypatch):
    deployment = opened(tmp_path, rows=10)
    path = write(tmp_path / "a.safetensors", 77)
    deployment.load("a", path)
    want = answer(deployment, "a")
    for i in range(10):
        deployment.load(f"b{i}", write(tmp_path / f"b{i}.safetensors", i))
    slow = sources.read_source
    monkeypatch.setattr(sources, "read_source", lambda *a, **o: time.sleep(0.2) or slow(*a, **o))
    reads.clear()
    got = []
    threads = [threading.Thread(target=lambda: got.append(answer(deployment, "a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    begun = time.monotonic()
    answer(deployment, "b9")  # reading holds nobody up
    assert time.monotonic() - begun < 0.15
    for thread in threads:
        thread.join(10)
    assert reads == [path]
    assert [one.tobytes() for one in got] == [want.tobytes()] * 8
    assert not deployment._catalogue._reader._flights


def test_a_failed_reading_fails_all_who_share_it_and_nobody_after(tmp_path, monkeypatch):
    deployment = opened(tmp_path, rows=10)
    path = write(tmp_path / "a.safetensors", 77)
    deployment.load("a", path)
    for i in range(10):
        deployment.load(f"b{i}", write(tmp_path / f"b{i}.safetensors", i))
    plain, failed = sources.read_source, []

    def fail(*args, **options):
        time.sleep(0.1)
        raise AdapterFileError("unreadable", hint="try again")

    monkeypatch.setattr(sources, "read_source", fail)

    def ask():
        with pytest.raises(AdapterFileError, match="unreadable"):
            answer(deployment, "a")
        failed.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(failed) == 4
    monkeypatch.setattr(sources, "read_source", plain)
    answer(deployment, "a")


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """What was read may be neither the old nor the new; a file that never rests is an error."""
    deployment = opened(tmp_path)
    path, other = write(tmp_path / "a.safetensors", 1), write(tmp_path / "b.safetensors", 2)
    deployment.load("b", other)
    plain, left = sources.read_source, [1]

    def changing(*args, **options):
        loaded = plain(*args, **options)
        if left:
            left.pop()
            shutil.copy(other, tmp_path / "new")
            (tmp_path / "new").replace(path)
        return loaded

    monkeypatch.setattr(sources, "read_source", changing)
    assert deployment.load("a", path).digest == deployment.adapters["b"].digest
    left[:] = [1] * 100
    deployment.unload("a")
    with pytest.raises(DeploymentError, match=r"(?s)changes while it is read.*rename"):
        deployment.load("a", path)


def test_closing_wakes_whoever_waits(tmp_path):
    deployment = opened(tmp_path, rows=10)
    for i in range(11):
        deployment.load(f"a{i}", write(tmp_path / f"a{i}.safetensors", i))
    raised = []

    def ask(call):
        try:
            call()
        except DeploymentError as error:
            raised.append(str(error))

    feeds = {name: np.repeat(array, 10, 0) for name, array in FEEDS.items()}
    with Held(deployment, "a0"):
        waiting = threading.Thread(target=ask, args=(lambda: deployment.run(feeds, [f"a{i}" for i in range(1, 11)]),))
        waiting.start()
        while not deployment._residents._queue:
            time.sleep(0.001)
        deployment.close()
        waiting.join(5)
        assert not waiting.is_alive()
    assert "was closed" in raised[0]


def test_how_many_fit(tmp_path):
    deployment = Deployment.open(
        make_folder(tmp_path / "out", base_labels=3), memory=100_000, max_coefficients=28, max_labels=5
    )
    deployment.load("a", write(tmp_path / "a.safetensors", 1, labels=2))
    deployment.load("b", write(tmp_path / "b.safetensors", 2))
    head = 5 * 8 * 4 + 5 * 4
    found = deployment.how_many_fit()
    assert found.adapter_bytes == {"hartley": ROW, "cosine": ROW}
    assert found.head_bytes == head
    assert found.fit == {"hartley": 100_000 // ROW, "cosine": 100_000 // ROW}
    assert found.fit_with_heads["cosine"] == 100_000 // (ROW + head)
    assert (found.resident, found.used, found.used_by_heads) == (2, 2 * ROW + head, head)
    assert found.free == 100_000 - found.used == found.budget - deployment.nbytes
    assert found.as_dict()["fit"] == dict(found.fit)
    count = 0
    for count in range(1, 1 + found.fit["hartley"]):  # and that many do fit
        deployment.load(f"c{count}", write(tmp_path / "c.safetensors", 100 + count))
        (tmp_path / "c.safetensors").replace(tmp_path / f"c{count}.safetensors")
        deployment.load(f"c{count}", tmp_path / f"c{count}.safetensors")
    for name in ("a", "b"):
        deployment.unload(name)
    assert sum(state == "resident" for state in states(deployment).values()) >= count - 2


def test_widths_follow_the_folder(tmp_path):
    """Of what is stored; 1,024 and 64 where nothing is; a stored adapter that cannot be read does not count."""
    folder = make_folder(tmp_path / "out", base_labels=3)
    with Deployment.open(folder) as deployment:
        assert deployment.how_many_fit().max_coefficients == {"hartley": 1024, "cosine": 1024}
        assert deployment.how_many_fit().max_labels == 16
        inputs, opened_folder = deployment.adapter_inputs, deployment.folder
    heads = {"classifier": {"weight": np.ones((70, 8), np.float32)}}
    for name, n, options in (("a", 30, {}), ("b", 50, {"heads": heads}), ("c", 7, {"transform": "cosine"})):
        rows = rows_of_adapter(random_adapter(SITES, n=n, **options), opened_folder, inputs)
        add_stored(folder, name, {key: array for arrays in rows.values() for key, array in arrays.items()})
    with Deployment.open(folder) as deployment:
        found = deployment.how_many_fit()
        assert (found.max_coefficients, found.max_labels) == ({"hartley": 50, "cosine": 7}, 70)
        assert deployment.predict(["who"] * 3, ["a", "b", "c"])
    (folder / "adapters" / "b.onnx_adapter").write_bytes(b"TORT" * 20)
    (folder / "adapters" / "c.onnx_adapter").unlink()
    with Deployment.open(folder) as deployment:
        assert deployment.how_many_fit().max_coefficients == {"hartley": 30, "cosine": 30}

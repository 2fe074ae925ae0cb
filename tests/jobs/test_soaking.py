"""The soak: a short one finds nothing wrong, and one with a broken bank does."""

import json

import pytest
from contract_folder import make_folder

from ssh_deploy.errors import DeploymentError
from ssh_deploy.jobs import soaking
from ssh_deploy.jobs.soaking import soak
from ssh_deploy.runtimes import catalogue, residents


def test_a_short_soak_on_an_exported_folder(exported):
    _, _, folder = exported("bert")
    told = []
    report = soak(folder, minutes=0.05, threads=8, progress=lambda *step: told.append(step))
    assert report.good, report.lines()
    assert report.answers > 200
    assert min(report.counts[what] for what in ("runs", "loads and replacements", "unloads", "pins", "unpins")) > 3
    assert report.rss_end > 0
    assert told[-1][2] == 3
    found = json.loads(json.dumps(report.as_dict()))
    assert (found["wrong_answers"], found["good"], found["threads"]) == (0, True, 8)
    assert "0 wrong, 0 errors, 0 threads stuck" in report.lines()[1]


def broken_eviction(monkeypatch):
    """Rows in use are evicted."""
    plain = residents.Residents._take

    def take(self, wanted):
        held = plain(self, wanted)
        for content in held or ():
            self._idle[content.loaded.digest] = content
        return held

    monkeypatch.setattr(residents.Residents, "_take", take)


def stale_files(monkeypatch):
    """A changed file is not noticed."""
    plain = catalogue.Source.signature
    monkeypatch.setattr(catalogue.Source, "signature", lambda self: plain(self) and ((0, 0, 0),))


@pytest.mark.parametrize("fault", [broken_eviction, stale_files])
def test_it_finds_what_is_broken(tmp_path, monkeypatch, fault):
    folder = make_folder(tmp_path / "out", base_labels=3)
    assert soak(folder, minutes=0.01, threads=4).good
    fault(monkeypatch)
    # threads must meet on a row, which one short soak of a busy machine may miss
    reports = (soak(folder, minutes=0.03, threads=8, seed=seed) for seed in range(10))
    report = next((report for report in reports if not report.good), None)
    assert report is not None
    assert report.wrong_answers or report.errors


def test_a_thread_that_is_stuck_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(soaking, "_STALLED", 0.3)
    monkeypatch.setattr(residents.Residents, "release", lambda self, held: None)  # so that room never comes
    report = soak(make_folder(tmp_path / "out", base_labels=3), minutes=0.5, threads=4)
    assert report.stalled
    assert not report.good


def test_folders_it_cannot_use(tmp_path):
    with pytest.raises(DeploymentError, match="no slots for spectra"):
        soak(make_folder(tmp_path / "out", kinds={}, base_labels=3), minutes=0.01)

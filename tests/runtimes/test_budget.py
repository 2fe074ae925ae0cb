"""Amounts of memory as people write them, widths of rows, and what `HowManyFit` says of a graph without slots."""

import numpy as np
import pytest
from contract_folder import make_folder

from ssh_deploy import Deployment
from ssh_deploy.runtimes.budget import parse_bytes, widths_of
from ssh_deploy.runtimes.folder import open_folder
from ssh_deploy.runtimes.session import Input


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("1.5 GB", 1_500_000_000),
        (" 2kb ", 2000),
        ("3B", 3),
        ("1tib", 1 << 40),
    ],
)
def test_amounts(text, size):
    assert parse_bytes(text) == size


def test_inner_layers_of_a_head_are_as_wide_as_the_next_is_deep(tmp_path):
    """Padded wider they would not fit the next layer; RoBERTa's head has one."""
    entries = [
        Input("adapter_head.classifier.dense.weight", np.float32, ("head_adapters", "classifier.dense.out", 48)),
        Input("adapter_head.classifier.dense.bias", np.float32, ("head_adapters", "classifier.dense.out")),
        Input("adapter_head.classifier.out_proj.weight", np.float32, ("head_adapters", "labels", 32)),
        Input("adapter_head.classifier.out_proj.bias", np.float32, ("head_adapters", "labels")),
    ]
    folder = open_folder(make_folder(tmp_path / "out", base_labels=3))
    inputs = {entry.name: entry for entry in entries}
    found = widths_of(folder, inputs, max_coefficients=None, max_labels=None)
    assert found == {"classifier.dense.out": 32, "labels": 16}
    assert widths_of(folder, inputs, max_coefficients=5, max_labels=7) == {"classifier.dense.out": 32, "labels": 7}


def test_a_graph_without_slots_holds_nothing(tmp_path):
    with Deployment.open(make_folder(tmp_path / "out", kinds={}, base_labels=3), memory=1) as deployment:
        found = deployment.how_many_fit()
    assert (found.fit, found.head_bytes, found.used) == ({}, 0, 0)
    assert "no slots" in found.lines()[1]

"""Small models for the plugin's tests; offline before transformers is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import nn


class TwoLayers(nn.Module):
    """A non-square linear layer, a nonlinearity, a head."""

    def __init__(self, inner=20, outer=13, labels=3):
        super().__init__()
        self.first = nn.Linear(inner, outer)
        self.second = nn.Linear(outer, outer)
        self.head = nn.Linear(outer, labels)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def two_layers():
    """``two_layers(dtype)``: the same weights every time."""

    def make(dtype=torch.float32):
        torch.manual_seed(3)
        return TwoLayers().to(dtype)

    return make


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    yield
    torch.set_num_threads(threads)

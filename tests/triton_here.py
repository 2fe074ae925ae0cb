"""Triton in tests: the real thing on a GPU, its interpreter elsewhere; `conftest` chooses before it is imported."""

import importlib.util

import pytest
import torch

INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed (it comes with torch for CUDA)")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def mend_interpreter(monkeypatch):
    """Triton 3.6's interpreter makes bounds of a ``range`` by ``int(array of one)``, which numpy 2.4 refuses."""
    if not INSTALLED or DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", mended)

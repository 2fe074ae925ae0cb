"""Small bases for the plugin's tests; offline before transformers is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

pytest.register_assert_rewrite("ssh_deploy.testing")


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """``bases(architecture, task)``: folder of a small random model, made once."""
    from ssh_deploy.testing import pico_model

    made = {}

    def make(architecture, task="base"):
        if (architecture, task) not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{task}") / "model"
            made[architecture, task] = pico_model(architecture, folder, task=task)
        return made[architecture, task]

    return make

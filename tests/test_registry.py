"""The one door: lazy, refuses double claims, names broken plugins."""

import importlib.metadata
import subprocess
import sys

import pytest

from ssh_deploy import registry
from ssh_deploy.errors import RegistryError, near_misses


class Point:
    """Stands for an installed entry point."""

    def __init__(self, name, value, package):
        self.name, self.value = name, value
        self.dist = type("Dist", (), {"name": package})()


def install(monkeypatch, *points):
    monkeypatch.setattr(registry, "entry_points", lambda *, group: list(points))


def test_built_in_families_load():
    assert registry.get_family("ssh").peft_type == "SSH"
    assert registry.get_family("sdctft").peft_type == "SDCTFT"


def test_unknown_name_lists_what_is_installed():
    with pytest.raises(
        RegistryError, match=r"(?s)'shs' is not among the installed families: .*ssh.*Did you mean ssh"
    ) as info:
        registry.get_family("shs")
    assert not isinstance(info.value, KeyError)


def test_two_claims_are_refused_only_when_asked_for(monkeypatch):
    install(monkeypatch, Point("ssh", "elsewhere:SSH", "other-pkg"), Point("mine", "math:pi", "mine-pkg"))
    assert registry.get_family("mine") == pytest.approx(3.14159, abs=1e-4)
    with pytest.raises(RegistryError, match=r"claimed by ssh-deploy .*other-pkg"):
        registry.get_family("ssh")


def test_a_broken_plugin_says_which_package_and_why(monkeypatch):
    install(monkeypatch, Point("bad", "no_such_module_xyz:F", "bad-pkg"))
    with pytest.raises(RegistryError, match=r"package bad-pkg .*ModuleNotFoundError.*no_such_module_xyz"):
        registry.get_family("bad")


def test_listing_imports_nothing():
    code = "import sys, ssh_deploy.registry as r; r.families(); print('ssh_deploy.adapters.ssh' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_near_misses():
    assert near_misses("layer.0.query", ["layer.0.query_proj", "x"]) == "Did you mean layer.0.query_proj?"
    assert near_misses("zzz", []) == "There is none."


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, ssh_deploy, ssh_deploy.cli.main;"
        "print([m for m in ('torch','transformers','onnx','onnxruntime','numpy','rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_the_distributions():
    import ssh_deploy

    assert importlib.metadata.version("ssh-deploy") == ssh_deploy.__version__

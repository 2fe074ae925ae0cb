"""What is installed, from where, what it can do; broken plugins are listed and break nothing."""

import re
import subprocess
import sys

import pytest

from ssh_deploy import __version__, registry
from ssh_deploy.jobs.listing import list_families


class Point:
    """Stands for an installed entry point."""

    def __init__(self, name, value, package, group=registry.FAMILY_GROUP):
        self.name, self.value, self.group = name, value, group
        self.dist = type("Dist", (), {"name": package})()


@pytest.fixture
def install(monkeypatch):
    def install(*points):
        monkeypatch.setattr(registry, "entry_points", lambda *, group: [p for p in points if p.group == group])

    return install


def listed():
    return {family.name: family for family in list_families().families}


def test_the_core_alone(install):
    install()
    found = listed()
    assert sorted(found) == ["sdctft", "ssh"]
    ssh = found["ssh"]
    assert (ssh.packages, ssh.peft_type, ssh.merge, ssh.slots) == (
        (f"ssh-deploy {__version__}",),
        "SSH",
        True,
        ("hartley",),
    )
    assert (found["sdctft"].slots, ssh.train, ssh.error) == (("cosine",), None, None)


def test_plugins_say_their_version_and_what_trains_them(install):
    install(
        Point("mine", "ssh_deploy.adapters.ssh:SSH", "numpy"),
        Point("mine", "torch:Nothing", "numpy", registry.TRAINING_GROUP),
    )
    mine = listed()["mine"]
    assert mine.packages[0].startswith("numpy ")
    assert mine.packages[0].split()[1][0].isdigit()
    assert mine.train == "torch:Nothing"


BROKEN = [
    ([Point("bad", "no_such_module_xyz:F", "bad-pkg")], ("bad-pkg",), "No module named 'no_such_module_xyz'"),
    ([Point("bad", "math:nothing", "bad-pkg")], ("bad-pkg",), "AttributeError"),
    ([Point("bad", "math:pi", "old-pkg")], ("old-pkg",), "has no attribute 'peft_type'"),
    ([Point("bad", "math:pi", "a"), Point("bad", "math:e", "b")], ("a", "b"), "claimed by a .*b .*Uninstall"),
]


@pytest.mark.parametrize(("points", "packages", "reason"), BROKEN)
def test_a_broken_plugin_is_listed_with_its_error(install, points, packages, reason):
    install(*points)
    bad = listed()["bad"]
    assert (bad.packages, bad.merge, bad.slots, bad.peft_type) == (packages, False, (), None)
    assert re.search(reason, bad.error, re.DOTALL)
    text = "\n".join(list_families().lines())
    assert "broken" in text
    assert f"bad: {bad.error}" in text
    assert "SDCTFT" in text  # the others are still there


def test_listing_imports_no_torch():
    code = (
        "import sys; from ssh_deploy.jobs.listing import list_families;"
        "print(len(list_families().families) > 1, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]

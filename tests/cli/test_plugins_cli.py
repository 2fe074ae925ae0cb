"""`ssh-deploy plugins` as a user runs it, with whatever is installed here."""

import importlib
import json

from click.testing import CliRunner

from ssh_deploy import registry
from ssh_deploy.cli.main import main


def test_the_table_has_a_line_for_each_family():
    done = CliRunner().invoke(main, ["plugins"])
    assert done.exit_code == 0, done.output
    head, *rows = done.output.splitlines()
    assert head.split("  ")[0] == "family"
    assert [row.split()[0] for row in rows] == sorted(registry.families())
    assert any(row.split()[:2] == ["ssh", "ssh-deploy"] and "hartley" in row for row in rows)


def test_every_installed_family_works_and_is_trained_by_what_it_says():
    done = CliRunner().invoke(main, ["plugins", "--json"])
    assert done.exit_code == 0, done.output
    for family in json.loads(done.stdout)["families"]:
        assert family["error"] is None, family
        assert family["merge"]
        assert len(family["packages"]) == 1
        if family["train"] is not None:
            module, _, name = family["train"].partition(":")
            config = getattr(importlib.import_module(module), name)
            needed = {"total_step": 1} if family["name"] == "adalora" else {}  # without a default
            assert config(**needed).peft_type.upper() == family["peft_type"]

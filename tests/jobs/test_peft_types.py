"""Every type of PEFT is read by a family, or refused with the reason; the table says which."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from peft.utils.peft_types import PeftType

from ssh_deploy import registry
from ssh_deploy.adapters.without_delta import REASONS
from ssh_deploy.cli.main import main
from ssh_deploy.jobs.listing import list_families, list_peft_types
from ssh_deploy.testing import write_peft_example

OURS = {"SSH", "SDCTFT"}
KNOWN = {kind.value for kind in PeftType} - OURS


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_every_type_is_covered_once():
    types = {view.peft_type: view for view in list_peft_types().types}
    assert set(types) == KNOWN
    read = {family.peft_type for family in list_families().families}
    assert set(REASONS) == KNOWN - read
    for name, view in types.items():
        assert (view.family is not None) == (name in read), name
        assert (view.reason is None) == (name in read), name
        assert view.reason == REASONS.get(name), name


def test_the_table_is_markdown_with_a_row_for_each():
    done = run("plugins", "--peft-types")
    assert done.exit_code == 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(KNOWN)
    assert {row.split("|")[1].strip() for row in rows} == KNOWN
    assert "| LORA | ✓ | merge, lowrank | ssh-deploy-lowrank |" in rows
    assert "| OFT | ✓ | merge | ssh-deploy-peft-bridge |" in rows
    assert any(
        row.startswith("| PROMPT_TUNING | – | it trains vectors that are put in front of the text") for row in rows
    )
    assert f"of the {len(KNOWN)} types of PEFT" in done.stdout
    assert {row["peft_type"] for row in json.loads(run("plugins", "--peft-types", "--json").stdout)["types"]} == KNOWN


@pytest.mark.hostile
@pytest.mark.parametrize("peft_type", sorted(REASONS))
def test_a_type_without_a_delta_is_refused_with_the_reason(tmp_path, peft_type):
    folder = write_peft_example(tmp_path / "a", {"peft_type": peft_type}, {"base_model.x": np.ones(3, np.float32)})
    done = run("inspect", folder)
    assert done.exit_code == 1
    assert (
        f"PEFT type {peft_type} has no change of a weight that could be deployed: {REASONS[peft_type]}." in done.output
    )


def test_a_missing_plugin_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [])
    types = {view.peft_type: view for view in list_peft_types().types}
    assert types["OFT"].reason == "no installed family reads it; is a plugin missing?"
    assert types["PROMPT_TUNING"].reason == REASONS["PROMPT_TUNING"]
    folder = write_peft_example(tmp_path / "a", {"peft_type": "OFT"}, {"base_model.x": np.ones(3, np.float32)})
    assert "No installed family reads PEFT type OFT" in run("inspect", folder).output


def test_the_readme_has_the_table_and_every_tick_is_held_against_peft(root):
    """Ticks are earned: each type's config is one that a plugin's test trains, merges and compares with PEFT."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = list_peft_types()
    assert "\n".join(found.lines()) in (root / "README.md").read_text()
    tests = [*root.glob("plugins/*/tests/test_against_peft.py"), root / "plugins/structured/tests/test_merge.py"]
    compared = {name for path in tests for name in re.findall(r"peft\.(\w+Config)", path.read_text())}
    assert all("<= 1e-6" in path.read_text() for path in tests)
    ticked = {view.peft_type for view in found.types if view.family is not None}
    assert {PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__ for kind in PeftType if kind.value in ticked} == compared

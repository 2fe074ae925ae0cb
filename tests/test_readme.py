"""What README.md and FORMAT.md say is true: commands exist, links lead somewhere, shown code runs."""

import re
import shlex

import pytest
from click.testing import CliRunner

from ssh_deploy.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_every_shown_command_line_parses(readme):
    lines = re.findall(r"^\$? ?(ssh-deploy [^\n|]+)$", readme, flags=re.M)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.split(" #")[0])[1:]
        if words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, line
        options = {w.split("=")[0] for w in words if w.startswith("-")} - {"--help"}
        listed = CliRunner().invoke(main, [words[0], "--help"]).output
        for option in options:
            assert re.search(rf"(^|[\s,]){re.escape(option)}\b", listed), f"{line}: no {option}"


def test_every_relative_link_leads_somewhere(readme, root):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme):
        assert (root / target).exists(), target


def test_it_says_that_it_is_not_secure_shell(readme):
    assert "nothing to do with Secure Shell" in readme.splitlines()[2]


def test_no_path_of_a_machine_is_named(root):
    for path in [root / "README.md", *root.glob("ssh_deploy/**/*.md"), *root.glob("plugins/*/README.md")]:
        assert not re.search(r"/(work|home|root|tmp)/", path.read_text()), path

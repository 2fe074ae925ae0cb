"""The rules of the house that a machine can check: floors, sizes, captions, names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ssh_deploy"
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_imports_only_go_down(root):
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_has_a_caption_and_a_readable_size(path):
    text = path.read_text()
    caption = ast.get_docstring(ast.parse(text))
    assert caption
    assert caption.splitlines()[0].endswith(".")
    assert len(text.splitlines()) <= 400


def test_no_function_shares_its_modules_name():
    for path in MODULES:
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        # `ssh_deploy.x` would turn from function into module on second access; cli.main is reached by entry point only
        assert path.stem not in names - {"main"}, path


def test_commands_are_short():
    for path in (PACKAGE / "cli").glob("*.py"):
        if path.stem not in ("main", "output", "__init__"):
            assert len(path.read_text().splitlines()) <= 60, path


def test_nobody_prints_below_the_command_line():
    for path in MODULES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path

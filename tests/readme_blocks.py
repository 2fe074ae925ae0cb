"""What cog writes into README.md: the captioned tree, help texts, and the measured tables from committed JSON."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def caption(path: Path) -> str:
    """First line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def tree() -> str:
    """The package as an indented list: every module with its caption."""
    lines = ["```"]

    def walk(folder: Path, depth: int) -> None:
        name = f"{folder.relative_to(ROOT)}/" if depth <= 1 else f"{folder.name}/"
        lines.append(f"{'  ' * max(0, depth - 1)}{name}".ljust(30) + caption(folder / "__init__.py"))
        modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        lines.extend(f"{'  ' * max(1, depth)}{path.name}".ljust(30) + caption(path) for path in modules)
        for deeper in sorted(p.parent for p in folder.glob("*/__init__.py")):
            walk(deeper, depth + 1)

    walk(ROOT / "ssh_deploy", 0)
    return "\n".join([*lines, "```"])


def help_of(*words: str) -> str:
    """``ssh-deploy WORDS --help`` as a console block."""
    command = [str(Path(sys.executable).parent / "ssh-deploy"), *words, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "100"}).stdout
    return f"```console\n$ ssh-deploy {' '.join([*words, '--help'])}\n{text.rstrip()}\n```"


def results(name: str) -> dict:
    """A committed results file of ``examples/results``."""
    return json.loads((ROOT / "examples" / "results" / f"{name}.json").read_text())

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
    for folder in ["", *sorted(p.name for p in (ROOT / "ssh_deploy").iterdir() if (p / "__init__.py").exists())]:
        base = ROOT / "ssh_deploy" / folder
        lines.append(f"ssh_deploy/{folder + '/' if folder else ''}".ljust(32) + caption(base / "__init__.py"))
        for path in sorted(base.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"  {path.name}".ljust(32) + caption(path))
        for deeper in sorted(p for p in base.iterdir() if folder and (p / "__init__.py").exists()):
            lines.append(f"  {deeper.name}/".ljust(32) + caption(deeper / "__init__.py"))
            for path in sorted(deeper.glob("*.py")):
                if path.name != "__init__.py":
                    lines.append(f"    {path.name}".ljust(32) + caption(path))
    return "\n".join([*lines, "```"])


def help_of(*words: str) -> str:
    """``ssh-deploy WORDS --help`` as a console block."""
    command = [str(Path(sys.executable).parent / "ssh-deploy"), *words, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "100"}).stdout
    return f"```console\n$ ssh-deploy {' '.join([*words, '--help'])}\n{text.rstrip()}\n```"


def results(name: str) -> dict:
    """A committed results file of ``examples/results``."""
    return json.loads((ROOT / "examples" / "results" / f"{name}.json").read_text())

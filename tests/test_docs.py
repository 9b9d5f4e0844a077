"""What the documents promise is what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from loratool.formats.peft import _SHAPE_TROUBLES
from loratool.formats.peft_config import REFUSED

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_warning_code_is_documented() -> None:
    """docs/warnings.md lists exactly the codes that the code can give."""
    given = {field.replace("_", "-") for field in REFUSED} | _SHAPE_TROUBLES.keys()
    for path in (ROOT / "loratool").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Notice", "_refuse"):
                code = node.args[0 if node.func.id == "Notice" else 1]  # type: ignore[attr-defined]
                if isinstance(code, ast.Constant):
                    given.add(code.value)
    table = (ROOT / "docs" / "warnings.md").read_text(encoding="utf-8").split("|---|---|---|")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    documented = {code for row in rows for code in re.findall(r"`([a-z0-9-]+)`", row)}
    assert documented == given


def test_readme_examples_run(tmp_path: Path) -> None:
    """The library example of the README runs as it stands."""
    code = README.split("```python\n")[1].split("```")[0]
    for name in ("fixtures",):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()


def test_readme_shows_what_inspect_prints(tmp_path: Path) -> None:
    """The session at the top of the README is what the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", "fixtures/adapter"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = README.split("$ loratool inspect fixtures/adapter\n")[1].split("\n$ ")[0]
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    assert printed == shown.rstrip().splitlines()


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{n}.md" for n in ("design", "warnings"))])
def test_links_and_named_modules_exist(path: str) -> None:
    """Relative links lead somewhere."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / path).parent / target).exists(), target

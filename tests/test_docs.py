"""What the documents promise is what the code does."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from loratool.adapters.dialects.peft.config import REFUSED
from loratool.adapters.dialects.peft.keys import _SHAPE_TROUBLES
from loratool.cli.combine import combine_command
from loratool.linalg.methods import METHODS

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


def printed(command: str, folder: Path) -> str:
    """What a command of a session prints on 80 columns, without its time."""
    if not (folder / "fixtures").exists():
        (folder / "fixtures").symlink_to(ROOT / "fixtures")
    done = subprocess.run(
        [sys.executable, "-m", *command.removeprefix("$ ").split()], cwd=folder,
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    return untimed("\n".join(line.rstrip() for line in done.stdout.splitlines()))


def untimed(text: str) -> str:
    return re.sub(r"\d+\.\d s\b", "… s", text).rstrip()


def test_readme_shows_what_inspect_prints(tmp_path: Path) -> None:
    """The session at the top of the README is what the command prints."""
    shown = README.split("$ loratool inspect fixtures/adapter\n")[1].split("\n$ ")[0]
    assert printed("loratool inspect fixtures/adapter", tmp_path) == shown.rstrip()


def test_readme_shows_what_the_adapter_commands_print(tmp_path: Path) -> None:
    """The sessions of combine, resize, compare and extract, in turn, are what they print."""
    sessions = re.findall(
        r"```console\n\$ (loratool (?:combine|resize|compare|extract)[^\n]*)\n(.*?)```",
        README,
        re.DOTALL,
    )
    assert [command.split()[1] for command, _ in sessions] == [
        "combine",
        "resize",
        "compare",
        "extract",
    ]
    for command, shown in sessions:
        assert printed(command, tmp_path) == untimed(shown)


def test_combining_shows_what_compare_prints(tmp_path: Path) -> None:
    """The session in docs/combining.md is what the command prints."""
    text = (ROOT / "docs" / "combining.md").read_text(encoding="utf-8")
    command, _, shown = text.split("```console\n$ ")[1].split("```")[0].partition("\n")
    assert printed(command, tmp_path) == untimed(shown)


def test_every_method_is_in_the_help_and_in_the_docs() -> None:
    """combine's help and docs/combining.md name exactly the methods there are."""
    help_text = combine_command.help or ""
    listed = help_text.split("Methods (")[1].split("Weights matter")[0]
    assert set(re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", listed)) >= METHODS.keys()
    starred = set(re.findall(r"\b([a-z_]+)\*", listed))
    assert starred == {name for name, method in METHODS.items() if method.prunes}
    table = (ROOT / "docs" / "combining.md").read_text().split("## The result")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == METHODS.keys()


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        *(f"docs/{n}.md" for n in ("design", "warnings", "combining", "extracting", "hub")),
    ],
)
def test_links_and_named_modules_exist(path: str) -> None:
    """Relative links lead somewhere."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / path).parent / target).exists(), target

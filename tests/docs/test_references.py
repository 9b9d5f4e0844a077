"""Lists in the documents are those of the code, and links lead somewhere."""

from __future__ import annotations

import ast
import re
import sys

import pytest
from helpers.places import ROOT

from loratool.adapters.dialects.peft.config import REFUSED
from loratool.adapters.dialects.troubles import _OF_SHAPES
from loratool.cli.combine import combine_command
from loratool.linalg.methods import METHODS
from loratool.models.precision import _SOURCES

#: What is called with a code: its first argument, or the second of those that take the adapter.
_GIVERS = ("Notice", "Trouble", "refuse_modules", "_refuse")


def test_every_warning_code_is_documented() -> None:
    """docs/warnings.md lists exactly the codes that the code can give."""
    given = {field.replace("_", "-") for field in REFUSED} | _OF_SHAPES.keys()
    for path in (ROOT / "loratool").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "warnings":
                given |= {getattr(key, "value", "") for key in getattr(node.value, "keys", [])}
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _GIVERS:
                alone = node.func.id in ("Notice", "Trouble")  # type: ignore[attr-defined]
                code = node.args[0 if alone else 1]
                if isinstance(code, ast.Constant):
                    given.add(code.value)
    table = (ROOT / "docs" / "warnings.md").read_text(encoding="utf-8").split("|---|---|---|")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    documented = {code for row in rows for code in re.findall(r"`([a-z0-9-]+)`", row)}
    assert documented == given


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


def test_architectures_that_exceed_float16_are_listed() -> None:
    """docs/merging.md names those of the table in the code, each with where it is reported."""
    text = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    table = text.split("| model_type |")[1].split("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    listed = {kind: row[2] for row in rows for kind in re.findall(r"`(\w+)`", row[1])}
    assert listed.keys() == _SOURCES.keys()
    for kind, source in _SOURCES.items():
        assert source.split("#")[0].split(" ")[0] in listed[kind], kind


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        *(
            f"docs/{n}.md"
            for n in (
                "design",
                "warnings",
                "merging",
                "combining",
                "extracting",
                "hub",
                "quantised",
            )
        ),
    ],
)
def test_links_and_named_modules_exist(path: str) -> None:
    """Relative links lead somewhere."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / path).parent / target).exists(), target


def test_reference_in_the_docs_is_what_the_commands_print() -> None:
    """docs/cli.md is generated; running its generator again changes nothing."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate_cli import cli_reference
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_reference()

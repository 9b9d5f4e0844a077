"""Examples and sessions in the documents run and print what they show."""

from __future__ import annotations

import os
import re
from pathlib import Path

from helpers import forked
from helpers.cli import run_cli
from helpers.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_examples_run(tmp_path: Path) -> None:
    """The library example of the README runs as it stands."""
    code = README.split("```python\n")[1].split("```")[0]
    for name in ("fixtures",):
        (tmp_path / name).symlink_to(ROOT / name)
    done = forked.run_snippet(code, [], os.environ, tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()


def printed(command: str, folder: Path) -> str:
    """What a command of a session prints on 80 columns, without its time."""
    if not (folder / "fixtures").exists():
        (folder / "fixtures").symlink_to(ROOT / "fixtures")
    program, *arguments = command.removeprefix("$ ").split()
    assert program == "loratool"
    done = run_cli(*arguments, cwd=folder, COLUMNS="80")
    assert done.exit_code == 0, done.stderr
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

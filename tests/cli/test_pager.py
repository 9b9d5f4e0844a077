"""--pager: the answer goes through the user's pager, on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from helpers.cli import run_cli

from loratool.cli.main import cli


@pytest.fixture
def pager(tmp_path: Path) -> Path:
    """A pager that says that it shows what it was given."""
    program = tmp_path / "pager"
    program.write_text("#!/bin/sh\necho '<<<paged'\ncat\necho 'paged>>>'\n")
    program.chmod(0o755)
    return program


def on_terminal(pager: Path, *arguments: object) -> tuple[int, str]:
    """The exit code and all that is shown of a command at a terminal."""
    command = " ".join([sys.executable, "-m", "loratool", *map(str, arguments)])
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "PAGER": str(pager)},
    )  # fmt: skip
    return done.returncode, done.stdout.replace("\r\n", "\n")


@pytest.mark.process
def test_an_answer_is_paged_when_asked_for(pager: Path, adapter: Path) -> None:
    """All of the answer is in the pager, once, with its colours; without --pager none of it."""
    code, shown = on_terminal(pager, "inspect", adapter, "--pager")
    assert code == 0
    before, paged = shown.split("<<<paged\n")
    answer, after = paged.split("paged>>>\n")
    assert "q_proj" in answer
    assert "\x1b[" in answer
    assert "q_proj" not in before + after
    assert "paged" not in on_terminal(pager, "inspect", adapter)[1]


@pytest.mark.process
def test_exit_codes_and_errors_are_as_ever(pager: Path, adapter: Path, base: Path) -> None:
    """A no is paged and exits with 3, and an error is shown without the pager."""
    code, shown = on_terminal(pager, "verify", base, "--base", base, adapter, "--pager")
    assert code == 3
    assert shown.index("<<<paged") < shown.index("q_proj") < shown.index("paged>>>")
    code, shown = on_terminal(pager, "inspect", adapter / "gone", "--pager")
    assert code == 1
    assert "error:" in shown
    assert "paged" not in shown


def test_nothing_is_paged_where_nobody_looks(adapter: Path) -> None:
    """In a pipe, --pager changes nothing."""
    plain = run_cli("inspect", adapter)
    assert run_cli("inspect", adapter, "--pager", PAGER="false").stdout == plain.stdout


def test_long_answers_have_a_pager() -> None:
    """The commands whose answers are read have the option."""
    for name in {"inspect", "compare", "verify", "lint", "list"} & cli.commands.keys():
        options = [p for p in cli.commands[name].params if isinstance(p, click.Option)]
        assert any("--pager" in option.opts for option in options), name

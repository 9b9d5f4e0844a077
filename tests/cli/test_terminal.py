"""Terminals of any width, without colour, without Unicode; and the bar that they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli import run_cli


@pytest.mark.parametrize("width", ["40", "80", "120", "200"])
def test_output_fits_the_terminal(width: str, adapter: Path, base: Path) -> None:
    """No line is wider than the terminal, and from 80 columns on no cell is broken."""
    done = run_cli("inspect", adapter, "--base", base, "--spectrum", COLUMNS=width)
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= int(width)
    if int(width) >= 80:
        assert re.search(r"^\s+self_attn\.k_proj .*\d", done.stdout, re.MULTILINE)


@pytest.mark.process
def test_no_colour_in_a_pipe(adapter: Path) -> None:
    """A pipe gets plain text, and so does a terminal with NO_COLOR."""
    assert "\x1b" not in run_cli("inspect", adapter).stdout
    script = f"{sys.executable} -m loratool inspect {adapter}"
    done = subprocess.run(
        ["script", "-qec", script, "/dev/null"], capture_output=True, text=True,
        env={**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"},
    )  # fmt: skip
    assert "model.layers" in done.stdout
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", done.stdout)


@pytest.mark.process
def test_an_ascii_terminal_gets_question_marks_not_a_crash(adapter: Path) -> None:
    """A locale that cannot show ‖ΔW‖ still gets the table."""
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", str(adapter)], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0
    assert b"q_proj" in done.stdout


@pytest.mark.process
def test_progress_shows_bytes_on_a_terminal(base: Path, adapter: Path, tmp_path: Path) -> None:
    """On a terminal a bar with bytes and a rate is drawn; in a pipe there is none."""
    command = f"{sys.executable} -m loratool merge {base} {adapter} -o {tmp_path / 'out'}"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )  # fmt: skip
    assert re.search(r"\d/\d+\.\d MB", done.stdout)
    again = run_cli("merge", str(base), str(adapter), "-o", str(tmp_path / "piped"))
    assert again.stderr == ""

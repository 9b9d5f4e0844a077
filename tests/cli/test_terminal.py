"""Terminals of any width, without colour, without Unicode; and the bar that they show."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import forked
from helpers.cli import run_cli
from helpers.places import FIXTURES, ROOT

from loratool.text import STAND_INS


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


def _in_ascii(*arguments: object, **settings: str) -> str:
    """What a command prints, of which every byte is ASCII, and no sign of ours is lost."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run(
        [sys.executable, "-m", "loratool", *map(str, arguments)], capture_output=True,
        env={**env, **settings}, check=True,
    )  # fmt: skip
    assert "?" not in done.stdout.decode("ascii")
    assert "\\" not in done.stdout.decode("ascii")
    return done.stdout.decode("ascii")


@pytest.mark.process
@pytest.mark.parametrize(
    "settings", [{"LANG": "C"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_ascii_is_written_where_it_is_asked_for(settings: dict[str, str], adapter: Path) -> None:
    """In the locale C, and on a stream that is ASCII, signs have readable stand-ins and tables
    their columns; help too, and JSON has the same data as ever."""
    shown = _in_ascii("inspect", adapter, "--spectrum", **settings)
    table = shown[shown.index("module ") :].splitlines()
    heading, row = table[0], next(line for line in table if "mlp.down_proj" in line)
    assert "|dW|" in heading
    assert "s1" in heading
    assert "128x320" in row
    assert row.index("3-5") + len("3-5") == heading.index("|dW|") + len("|dW|")
    assert "|dW|^2" in _in_ascii("resize", "--help", **settings)
    done = json.loads(_in_ascii("inspect", adapter, "--json", **settings))
    assert done == json.loads(run_cli("inspect", adapter, "--json").stdout)


@pytest.mark.process
def test_names_that_ascii_lacks_are_escaped(tmp_path: Path) -> None:
    """A path with letters that stdout has not is told apart from others; the text of a file is in
    UTF-8 all the same."""
    folder = tmp_path / "é"
    shutil.copytree(FIXTURES / "adapter", folder)
    for arguments, shown in (
        (["inspect", folder], b"\\xe9"),
        (["card", folder, "--dry-run"], "×".encode()),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "loratool", *map(str, arguments)], capture_output=True,
            env={**os.environ, "LC_ALL": "C"}, check=True,
        )  # fmt: skip
        assert shown in done.stdout


def test_every_sign_of_ours_has_a_stand_in() -> None:
    """No text of the package holds a character that a stream without Unicode shows as an escape."""
    for path in sorted((ROOT / "loratool").rglob("*.py")):
        if path.name != "text.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    signs = {c for c in node.value if not c.isascii() and c.isprintable()}
                    assert signs <= STAND_INS.keys(), (path.name, node.lineno)
    assert all(stand_in.isascii() for stand_in in STAND_INS.values())


LINES = """
import sys
import loratool.rendering.terminal as terminal
terminal.LINE_EVERY = {every}
from loratool.cli.main import main
main(sys.argv[1:])
"""


def test_long_work_says_in_a_log_how_far_it_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Where stderr is no terminal a line each half a minute says what is done, how fast, and how
    long it still takes; not with -q or --json, and not for what is done before that."""

    def errors(every: float, *arguments: object) -> str:
        given = list(map(str, arguments))
        return forked.run_snippet(LINES.format(every=every), given, dict(os.environ), ROOT).err

    merge = ("merge", base, adapter, "-o")
    bytes_told = errors(0, *merge, tmp_path / "a").splitlines()
    assert re.fullmatch(r"merging \S+\.safetensors: [\d.]+ kB of 1.51 MB, .+/s.*", bytes_told[0])
    assert re.search(r" 1.51 MB of 1.51 MB, [\d.]+ [kM]B/s, about 0 s left$", bytes_told[-1])
    counted = errors(0, "resize", adapter, "--rank", 4, "-o", tmp_path / "b").splitlines()
    assert re.fullmatch(r"resizing: \d+ of 28, .+/s.*", counted[-1])
    for more in ("-q", "--json"):
        assert errors(0, *merge, tmp_path / more, more) == ""
    assert errors(30, *merge, tmp_path / "c") == ""


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

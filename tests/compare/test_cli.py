"""compare on the command line: mistakes, JSON, warnings, widths and pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.adapters import K, Q, lora
from helpers.cli import run_cli
from helpers.places import FIXTURES

import loratool


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{one}"], 2, "Give two or more"),
        (["{one}", "{two}", "--tolerance", "-1"], 2, "--tolerance -1"),
        (["{one}", "{two}", "--weight", "1"], 2, "1 weight was given for 2 adapters"),
        (["{one}", "{two}", "--layer", "x"], 2, "Not a range of layers"),
        (["{one}", "{two}x", "--equal"], 1, "Did you mean"),
        (["{one}", "{two}", "--equl"], 2, "--equal"),
    ],
)
def test_mistakes_get_one_clear_error(
    two: list[Path], arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code, never 3, and no answer."""
    done = run_cli("compare", *[a.format(one=two[0], two=two[1]) for a in arguments])
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert done.stdout == ""


def test_json_is_all_there_is_on_stdout(two: list[Path]) -> None:
    """--json prints one strict document with schema_version, and what the library reports."""
    done = run_cli("compare", *map(str, two), "--weight", "1", "--weight", "-1", "--json")
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(done.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    report = loratool.compare(two, weights=[1, -1])
    assert document == json.loads(json.dumps(report.to_dict()))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal(width: int) -> None:
    """No line is wider than the terminal; at 80 columns every row is one line, without ellipses."""
    adapter = str(FIXTURES / "adapter")
    for count in (2, 4):
        arguments = ["compare", *[adapter] * count, "--equal", "--base", FIXTURES / "base"]
        done = run_cli(*arguments, COLUMNS=str(width))
        assert done.exit_code == 0, done.stderr
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in done.stdout
        assert "\x1b" not in done.stdout
        if width >= 80:
            start = next(i for i, x in enumerate(lines) if x.startswith("module "))
            table = [x for x in lines[start:] if "_proj" in x]
            assert len(table) == 7
            assert len({len(x.split()) for x in table}) == 1
            assert all("1.00" in x for x in table)


def test_warnings_are_on_stderr_and_quiet_is_quiet(tmp_path: Path) -> None:
    """Warnings go to stderr with their codes; -q silences stderr and keeps the answer."""
    adapters = [str(lora(tmp_path / "q", Q)), str(lora(tmp_path / "k", K))]
    done = run_cli("compare", *adapters)
    assert "[nothing-shared]" in done.stderr
    assert "change no module together" in done.stdout
    quiet = run_cli("compare", *adapters, "-q")
    assert quiet.stderr == ""
    assert quiet.stdout == done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_words_in_brackets_are_no_markup(tmp_path: Path) -> None:
    """Paths and modules with square brackets are printed as they are."""
    adapters = [str(lora(tmp_path / name, "blocks.[red].q", seed=n))
                for n, name in enumerate(("[bold]a", "[/b]"))]  # fmt: skip
    done = run_cli("compare", *adapters, "--equal")
    assert done.exit_code == 3
    assert done.stderr == ""
    assert "".join(done.stdout.split()).count("[red]") >= 2
    assert "[bold]a" in "".join(done.stdout.split())


@pytest.mark.process
@pytest.mark.parametrize("option", ["--json", "--full"])
@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 3)])
def test_a_closed_pipe_keeps_the_exit_code(
    tmp_path: Path, option: str, equal: bool, code: int
) -> None:
    """A reader that leaves early gets no traceback, and the code still says what was found."""
    paths = [f"model.layers.{n}.q_proj" for n in range(100)]
    one, two = (lora(tmp_path / str(n), *paths, seed=0 if equal else n) for n in range(2))
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool compare {one} {two} --equal {option} | true; "
         "exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")

"""convert on the command line: mistakes, JSON, widths and pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli import run_cli
from helpers.outcomes import assert_clean
from helpers.places import FIXTURES

ADAPTER = FIXTURES / "adapter"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Nothing to convert to"),
        (["--to", "mxl"], 2, "Did you mean mlx"),
        (["--to", "kohya"], 2, "Choose among peft"),
        (["--to", "mlx", "--dtype", "float8"], 2, "float8"),
        (["--to", "mlx", "--max-rank", "0"], 2, "--max-rank 0"),
        (["--to", "mlx", "--allow-lossy"], 2, "--max-rank"),
        (["--to", "mlx", "--set-metadata", "license"], 2, "KEY=VALUE"),
        (["--to", "mlx", "--alpha", "3"], 1, "--override"),
        (["--to", "gguf"], 1, "--base"),
        (["--to", "mlx", "--max-rank", "4"], 1, "--allow-lossy"),
    ],
)
def test_mistakes_get_one_clear_error(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    """A mistake is one error in words on stderr with its exit code, and nothing is written."""
    out = tmp_path / "out"
    done = run_cli("convert", str(ADAPTER), *arguments, "-o", str(out))
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert done.stdout == ""
    assert_clean(out)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_json_is_all_there_is_on_stdout(more: list[str], tmp_path: Path) -> None:
    """--json prints one strict document: what became of each module, and how many of each sort."""
    done = run_cli("convert", ADAPTER, "--to", "mlx", "-o", tmp_path / "out", "--json", *more)
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(done.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert document["counts"] == {"exact": 28}
    assert document["error"] == (None if more else 0.0)
    assert {fate["outcome"] for fate in document["fates"]} == {"exact"}
    assert {fate["new_rank"] for fate in document["fates"]} == {8}


@pytest.mark.process
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_lines_fit_the_terminal(columns: str, tmp_path: Path) -> None:
    """Through a pipe, at any width: no line is longer, and no colour is left in the text."""
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "convert", str(ADAPTER), "--to", "mlx",
         "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=True, env={"COLUMNS": columns, "PATH": ""},
    )  # fmt: skip
    assert max(map(len, done.stdout.splitlines())) <= int(columns)
    assert "\x1b" not in done.stdout
    assert "exact" in done.stdout

"""combine on the command line: mistakes, JSON, warnings, widths and pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.adapters import WEIGHTS, lora
from helpers.cli import run_cli
from helpers.outcomes import assert_clean
from helpers.places import FIXTURES


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{one}", "{two}", "--weight", "1"], 2, "1 weight was given for 2 adapters"),
        (["{one}", "--weight", "inf"], 2, "finite"),
        (["{one}", "{two}", "--rank", "0"], 2, "--rank 0"),
        (["{one}", "{two}", "--rank", "2", "--energy", "0.9"], 2, "different ranks"),
        (["{one}", "{two}", "--method", "ties"], 2, "--density"),
        (["{one}", "{two}", "--density", "0.5"], 2, "does not prune"),
        (["{one}", "{two}", "--method", "ties_cor", "--density", "1"], 2, "Did you mean ties_core"),
        (["{one}", "{two}", "--dtype", "flaot16"], 2, "Did you mean float16"),
        (["{one}", "{two}", "--saved", "frist"], 2, "first"),
        (["{one}", "{two}", "--majority-sign-method", "most"], 2, "total, frequency"),
        (["{one}", "{two}", "--seed", "-1"], 2, "--seed"),
        (["{one}", "{two}x"], 1, "Did you mean"),
        (["{one}", "{one}", "--weight", "1", "--weight", "-1"], 1, "does nothing"),
    ],
)
def test_mistakes_get_one_clear_error(
    two: list[Path], out: Path, arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code, and nothing is written."""
    filled = [a.format(one=two[0], two=two[1]) for a in arguments]
    done = run_cli("combine", *filled, "-o", str(out))
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert done.stdout == ""
    assert_clean(out)


def test_json_is_all_there_is_on_stdout(two: list[Path], out: Path) -> None:
    """--json prints one strict document with schema_version, and what the library reports."""
    done = run_cli("combine", *map(str, two), "-o", str(out), "--rank", "99", "--json")
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(done.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert document["rank"] == 8
    assert document["adapters"] == [str(p) for p in two]
    assert [w["code"] for w in document["warnings"]] == ["rank-not-reached"]
    assert document["bytes_written"] == (out / WEIGHTS).stat().st_size


def test_warnings_are_on_stderr_and_quiet_is_quiet(two: list[Path], tmp_path: Path) -> None:
    """Warnings go to stderr with their codes; -q silences stderr and keeps the answer."""
    arguments = ["combine", str(two[0]), str(two[0]), "--rank", "9", "--dry-run", "-o"]
    done = run_cli(*arguments, str(tmp_path / "x"))
    assert "[same-adapter]" in done.stderr
    assert "[rank-not-reached]" in done.stderr
    assert "nothing was written" in done.stdout
    quiet = run_cli(*arguments, str(tmp_path / "x"), "-q")
    assert quiet.stderr == ""
    assert "q_proj" in quiet.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal(width: int, tmp_path: Path) -> None:
    """No line is wider than the terminal; at 80 columns every row is one line, without ellipses."""
    for method in ("sum", "iso_c"):
        done = run_cli(
            "combine", FIXTURES / "adapter", FIXTURES / "adapter", "--weight", "0.7", "--weight",
            "-0.4", "--rank", "4", "--method", method, "-o", "out", "--dry-run",
            cwd=tmp_path, COLUMNS=str(width),
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in done.stdout
        if width >= 80:
            table = lines[next(i for i, x in enumerate(lines) if x.startswith("module ")) :]
            names = [x.split()[0] for x in table if x.startswith("  ") and "_proj" in x]
            assert len(names) == 7
            assert all(len(x.split()) >= 7 for x in table if "_proj" in x)


@pytest.mark.process
@pytest.mark.parametrize("option", ["--json", "--full"])
def test_a_closed_pipe_is_no_error(tmp_path: Path, out: Path, option: str) -> None:
    """A reader that leaves early gets no traceback, the output is whole and the code is 0."""
    paths = [f"model.layers.{n}.q_proj" for n in range(200)]
    source = lora(tmp_path / "one", *paths)
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool combine {source} -o {out} {option} | true; "
         "exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (out / WEIGHTS).is_file()
    assert (done.returncode, done.stderr) == (0, "")

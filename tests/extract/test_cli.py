"""extract on the command line: help, mistakes, JSON, warnings, widths and pipes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from helpers.adapters import WEIGHTS
from helpers.cli import run_cli
from helpers.extracting import BF16, Pair, model, moved, write
from helpers.outcomes import assert_clean, sha256s

from loratool.cli.extract import extract_command


def test_help_has_examples_and_every_option() -> None:
    """--help lists each option with its words, and shows calls that can be copied."""
    done = run_cli("extract", "--help")
    assert done.exit_code == 0
    examples = done.stdout.split("Examples:")[1].split("Options:")[0]
    assert len(re.findall(r"^ +loratool extract .* -o ", examples, re.MULTILINE)) >= 3
    for option in extract_command.params:
        if isinstance(option, click.Option):
            assert option.help
            assert all(re.search(rf"{name}\b", done.stdout) for name in option.opts), option.name
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{base}", "{fine}"], 2, "No rank given"),
        (["{base}", "{fine}", "--rank", "2", "--energy", "0.5"], 2, "--rank and --energy"),
        (["{base}", "{fine}", "--rank", "two"], 2, "'two'"),
        (["{base}", "{fine}", "--rank", "2", "--dtype", "flaot16"], 2, "float16"),
        (["{base}", "{fine}", "--rank", "2", "--skip", "norm"], 2, "norm"),
        (["{base}", "{fine}", "--rank", "2", "--seed", "-1"], 2, "-1"),
        (["{base}", "{fine}", "--budget", "lots"], 2, "'lots' is not a size"),
        (["{base}", "{fine}", "--rnk", "2"], 2, "--rank"),
        (["{base}", "--rank", "2"], 2, "TUNED"),
        (["{base}", "{base}", "--rank", "2"], 2, "the same files"),
        (["{base}", "{fine}x", "--rank", "2"], 1, "Did you mean"),
        (["{base}", "{fine}", "--rank", "2", "--include", "nosuch"], 2, "matches no module"),
        (["{base}", "{fine}", "--rank", "2", "--include", "q_proj", "--exclude", "q_proj"], 1,
         "Nothing differs"),
        (["{base}", "{fine}", "--budget", "1KB"], 2, "too small"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_error(
    tiny: Pair, arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code; one JSON object with --json."""
    places = {"base": str(tiny.base), "fine": str(tiny.tuned)}
    filled = ["extract", *[a.format(**places) for a in arguments], "-o", str(tiny.out)]
    done = run_cli(*filled, "--json")
    assert (done.exit_code, done.stdout) == (code, "")
    error = json.loads(done.stderr)
    assert error.keys() == {"error", "message", "hint"}
    assert words in " ".join(f"{error['message']} {error['hint']}".split())
    if "--rank" not in arguments or code == 1:
        plain = run_cli(*filled)
        assert (plain.exit_code, plain.stdout) == (code, "")
        assert words in " ".join(plain.stderr.split())
        assert "Traceback" not in plain.stderr
        assert plain.stderr.lower().count("error:") == 1
    assert_clean(tiny.out)


@pytest.mark.parametrize("spectrum", [False, True])
def test_json_is_what_the_library_reports(tiny: Pair, spectrum: bool) -> None:
    """--json prints one strict document, that of the library, and nothing on stderr."""
    arguments = ["extract", str(tiny.base), str(tiny.tuned), "-o", str(tiny.out), "--energy", "0.6",
                 "--skip", "norms", "--dtype", "float32", "--verify", "--json"]  # fmt: skip
    done = run_cli(*arguments, *["--spectrum"] * spectrum)
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    printed = json.loads(done.stdout, parse_constant=refuse)
    digests = sha256s(tiny.out)
    report = tiny.extract(energy=0.6, skip=["norms"], verify=True)
    assert sha256s(tiny.out) == digests
    wanted = json.loads(json.dumps(report.to_dict()))
    if not spectrum:
        for module in wanted["modules"]:
            del module["singular_values"]
    for document in (printed, wanted):
        del document["seconds"]
    assert printed == wanted


def test_warnings_are_on_stderr_and_quiet_is_quiet(tiny: Pair) -> None:
    """Warnings go to stderr with their codes, the answer to stdout; -q silences stderr."""
    arguments = ["extract", str(tiny.base), str(tiny.tuned), "-o", str(tiny.out), "--rank", "20"]
    done = run_cli(*arguments)
    assert done.exit_code == 0
    assert "[rank-too-large]" in done.stderr
    assert "rank-too-large" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    quiet = run_cli(*arguments, "-q", "--overwrite")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "q_proj" in quiet.stdout


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "options",
    [["--rank", "3", "--full", "--spectrum"], ["--energy", "0.9", "--skip", "norms", "--verify"],
     ["--dry-run"]],
    ids=str,
)  # fmt: skip
def test_lines_fit_the_terminal(tmp_path: Path, width: int, options: list[str]) -> None:
    """No line is wider than the terminal, and every module is one whole line of the table."""
    state = model(size=32, layers=12)
    fine = {n: t.to(BF16) for n, t in moved(state).items()}
    write(tmp_path / "base", state)
    write(tmp_path / "a-fine-tune-with-a-rather-long-name", fine)
    arguments = ["extract", "base", "a-fine-tune-with-a-rather-long-name", "-o", "out", *options]
    done = run_cli(*arguments, cwd=tmp_path, COLUMNS=str(width))
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in done.stdout
    start = next(i for i, line in enumerate(lines) if line.startswith("module "))
    columns = len(re.sub(r" ([≥≤])", r"\1", lines[start]).split())
    rows = [line for line in lines[start + 1 :] if re.match(r"\s.*(_proj|lm_head)\b", line)]
    if "--spectrum" not in options:
        assert rows
        assert {len(row.split()) for row in rows} == {columns}


@pytest.mark.process
def test_a_closed_pipe_is_no_error(tiny: Pair) -> None:
    """A reader that leaves early gets no traceback, and the output is whole."""
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool extract {tiny.base} {tiny.tuned} --rank 2 -o {tiny.out} "
         "--full | true; exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (tiny.out / WEIGHTS).is_file()
    assert (done.returncode, done.stderr) == (0, "")

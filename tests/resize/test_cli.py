"""resize on the command line: mistakes, JSON, warnings, widths and pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.adapters import WEIGHTS, K, Q, lora
from helpers.cli import run_cli
from helpers.outcomes import assert_clean
from helpers.places import FIXTURES


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{one}"], 2, "No rank given"),
        (["{one}", "--rank", "0"], 2, "--rank 0"),
        (["{one}", "--rank", "-4"], 2, "--rank -4"),
        (["{one}", "--rank", "2.5"], 2, "'2.5'"),
        (["{one}", "--rank", "2", "--energy", "0.9"], 2, "--rank and --energy"),
        (["{one}", "--energy", "0.9", "--uniform", "--patterns"], 2, "--uniform and --patterns"),
        (["{one}", "--rank", "2", "--dtype", "flaot32"], 2, "Did you mean float32"),
        (["{one}", "--rnk", "2"], 2, "--rank"),
        (["{one}x", "--rank", "2"], 1, "Did you mean"),
    ],
)
def test_mistakes_get_one_clear_error(
    one: Path, out: Path, arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code, and nothing is written."""
    done = run_cli("resize", *[a.format(one=one) for a in arguments], "-o", str(out))
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert done.stdout == ""
    assert_clean(out)


def test_help_says_what_becomes_of_the_scale() -> None:
    """That resize folds rsLoRA's scale away, which cures what others compute, is in its help."""
    text = " ".join(run_cli("resize", "--help").stdout.split())
    assert "use_rslora is false" in text
    assert "llama.cpp, Ollama and SGLang" in text


def test_json_is_all_there_is_on_stdout(one: Path, out: Path) -> None:
    """--json prints one strict document with schema_version, and what the library reports."""
    done = run_cli("resize", str(one), "-o", str(out), "--rank", "2", "--json")
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(done.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert (document["rank"], document["uniform"]) == (2, True)
    assert {m["path"] for m in document["modules"]} == {Q, K}
    assert document["bytes_written"] == (out / WEIGHTS).stat().st_size


def test_warnings_are_on_stderr_and_quiet_is_quiet(tmp_path: Path, out: Path) -> None:
    """Warnings go to stderr with their codes; -q silences stderr and keeps the answer."""
    source = lora(tmp_path / "one", target_modules=["q_proj", "v_proj"])
    arguments = ["resize", str(source), "--rank", "2", "--dry-run", "-o", str(out)]
    done = run_cli(*arguments)
    assert "[target-absent]" in done.stderr
    assert "nothing was written" in done.stdout
    quiet = run_cli(*arguments, "-q")
    assert quiet.stderr == ""
    assert "q_proj" in quiet.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert not out.exists()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal(width: int, tmp_path: Path) -> None:
    """No line is wider than the terminal; at 80 columns every row is one line, without ellipses."""
    for options in (["--energy", "0.9"], ["--rank", "16", "--dtype", "bfloat16"]):
        arguments = ["resize", FIXTURES / "adapter", *options, "-o", "out", "--dry-run"]
        done = run_cli(*arguments, cwd=tmp_path, COLUMNS=str(width))
        assert done.exit_code == 0, done.stderr
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in done.stdout
        if width >= 80:
            table = lines[next(i for i, x in enumerate(lines) if x.startswith("module ")) :]
            assert [len(x.split()) for x in table if "_proj" in x] == [7] * 7


@pytest.mark.process
@pytest.mark.parametrize("option", ["--json", "--full"])
def test_a_closed_pipe_is_no_error(tmp_path: Path, out: Path, option: str) -> None:
    """A reader that leaves early gets no traceback, the output is whole and the code is 0."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(200)])
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool resize {source} --rank 2 -o {out} {option} | true; "
         "exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (out / WEIGHTS).is_file()
    assert (done.returncode, done.stderr) == (0, "")

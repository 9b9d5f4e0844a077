"""The command line as users meet it: help, mistakes, pipes, narrow terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from conftest import ROOT, pair, run_cli, write_adapter

from loratool.cli.main import cli


def test_every_command_has_help_with_an_example() -> None:
    """Each command's help explains itself and shows a call that can be copied."""
    for name, command in cli.commands.items():
        done = run_cli(name, "--help")
        assert done.exit_code == 0
        assert f"loratool {name} " in done.stdout.split("Examples:")[1]
        assert all(p.help for p in command.params if isinstance(p, click.Option))


def test_inspect_prints_folded_layers(adapter: Path) -> None:
    """Modules that repeat over layers are one line; --full gives each its own."""
    folded = run_cli("inspect", adapter)
    assert folded.exit_code == 0
    assert "model.layers.{0-3}" in folded.stdout
    assert folded.stdout.count("q_proj") == 2  # once in the targets, once in the table
    full = run_cli("inspect", adapter, "--full", "--tensors")
    assert "model.layers.3" in full.stdout
    assert "lora_A.weight" in full.stdout
    assert folded.stderr == ""


@pytest.mark.parametrize("width", ["40", "80", "120", "200"])
def test_output_fits_the_terminal(width: str, adapter: Path, base: Path) -> None:
    """No line is wider than the terminal, and from 80 columns on no cell is broken."""
    environment = {**os.environ, "COLUMNS": width}
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", str(adapter), "--base", str(base),
         "--spectrum"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert max(map(len, done.stdout.splitlines())) <= int(width)
    if int(width) >= 80:
        assert re.search(r"^\s+self_attn\.k_proj .*\d", done.stdout, re.MULTILINE)


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


def test_an_ascii_terminal_gets_question_marks_not_a_crash(adapter: Path) -> None:
    """A locale that cannot show ‖ΔW‖ still gets the table."""
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", str(adapter)], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0
    assert b"q_proj" in done.stdout


def test_a_closed_pipe_is_no_error(adapter: Path) -> None:
    """`loratool inspect … | head -1` ends quietly."""
    done = subprocess.run(
        f"{sys.executable} -m loratool inspect {adapter} --full --tensors --json | head -1",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_json_is_the_only_thing_on_stdout(adapter: Path, base: Path, tmp_path: Path) -> None:
    """--json prints one document with schema_version for each command."""
    for arguments in (
        ["inspect", adapter, "--spectrum"],
        ["inspect", adapter, "--base", base],
        ["merge", base, adapter, "-o", tmp_path / "dry", "--dry-run"],
        ["merge", base, adapter, "-o", tmp_path / "out"],
    ):
        done = run_cli(*map(str, arguments), "--json")
        assert done.exit_code == 0
        assert json.loads(done.stdout)["schema_version"] == 1
    assert not (tmp_path / "dry").exists()
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["merg"], 2, "Did you mean 'merge'"),
        (["merge", "{base}", "{adapter}"], 2, "--output"),
        (["merge", "{base}", "-o", "x"], 2, "ADAPTER"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--dtype", "flaot16"], 2, "float16?"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--wieght", "1"], 2, "--weight"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--weight", "1", "--weight", "2"], 2,
         "2 weights for 1 adapters"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--weight", "nan"], 2, "finite"),
        (["merge", "{adapter}", "{base}", "-o", "{out}"], 1, "Models come first"),
        (["merge", "{base}", "{base}/config.json", "-o", "{out}"], 1, "not a safetensors file"),
        (["merge", "{base}", "{adapter}", "-o", "{base}/out"], 1, "is in the input"),
        (["inspect", "{adapter}x"], 1, "Did you mean"),
        (["inspect", "{base}"], 1, "this is a base model"),
        (["inspect", "{base}/model-00001-of-00003.safetensors", "--base", "{base}"], 2,
         "nothing to compare"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_error(
    arguments: list[str], code: int, words: str, tmp_path: Path, base: Path, adapter: Path
) -> None:
    """A mistake is answered in words with the documented exit code; as JSON when asked so."""
    places = {"base": str(base), "adapter": str(adapter), "out": str(tmp_path / "out")}
    filled = [a.format(**places) for a in arguments]
    done = run_cli(*filled)
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    as_json = run_cli(*filled, "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stderr).keys() == {"error", "message", "hint"}
    assert not (tmp_path / "out").exists()


def test_warnings_go_to_stderr_and_quiet_silences_them(tmp_path: Path) -> None:
    """The answer is on stdout, the conversation on stderr, and -q is quiet."""
    folder = write_adapter(tmp_path / "a", pair("q_proj", 4, 4), {"target_modules": ["v_proj"]})
    done = run_cli("inspect", str(folder))
    assert "target-absent" in done.stderr
    assert "target-absent" not in done.stdout
    assert run_cli("inspect", str(folder), "-q").stderr == ""


def test_dry_run_prints_the_plan(base: Path, adapter: Path, tmp_path: Path) -> None:
    """--dry-run says what would be merged and written, and how much room there is."""
    done = run_cli("merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--dry-run")
    for words in ("nothing was written", "28 merged, 11 cast", "to read", "to write", "free"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_exit_130_and_leave_nothing(
    number: signal.Signals, adapter: Path, base: Path, tmp_path: Path
) -> None:
    """Ctrl-C and a polite kill end with code 130, no output and no leftovers."""
    slow = (
        "import time, loratool.merging.arithmetic as a; "
        "run = a.RunningJob.compute; "
        "a.RunningJob.compute = lambda *x: (time.sleep(0.3), run(*x)); "
        "from loratool.cli.main import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", slow, "merge", str(base), str(adapter), "-o",
         str(tmp_path / "out")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.loratool-partial-*/model*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_reference_in_the_docs_is_what_the_commands_print() -> None:
    """docs/cli.md is generated; running its generator again changes nothing."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate_cli import cli_reference
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_reference()

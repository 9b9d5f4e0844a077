"""What goes to stdout and what to stderr, and readers that leave or cannot take it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.adapters import pair, write_adapter
from helpers.cli import run_cli
from helpers.places import FIXTURES


@pytest.mark.process
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


def test_warnings_go_to_stderr_and_quiet_silences_them(tmp_path: Path) -> None:
    """The answer is on stdout, the conversation on stderr, and -q is quiet."""
    folder = write_adapter(tmp_path / "a", pair("q_proj", 4, 4), {"target_modules": ["v_proj"]})
    done = run_cli("inspect", str(folder))
    assert "target-absent" in done.stderr
    assert "target-absent" not in done.stdout
    assert run_cli("inspect", str(folder), "-q").stderr == ""


@pytest.mark.process
@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_full_disk_behind_stdout(command: str, tmp_path: Path) -> None:
    """An answer that cannot be printed is one line on stderr."""
    arguments = {
        "inspect": [FIXTURES / "adapter"],
        "merge": [FIXTURES / "base", FIXTURES / "adapter", "-o", tmp_path / "out"],
    }[command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "loratool", command, *map(str, arguments)],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert "could not be printed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_a_reader_that_goes_away_does_not_change_the_answer(tmp_path: Path) -> None:
    """`verify … | true` still exits with 3 for no, and a merge that is done with 0."""
    base, lora = FIXTURES / "base", FIXTURES / "adapter"
    command = f"{sys.executable} -m loratool"
    for arguments, code in (
        (f"verify {base} --base {base} {lora}", 3),
        (f"verify {base} --base {base} {lora} --json", 3),
        (f"merge {base} {lora} -o {tmp_path / 'out'}", 0),
    ):
        line = f"{command} {arguments} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (code, "")

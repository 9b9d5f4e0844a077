"""unmerge on the command line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from helpers.cli import run_cli
from helpers.models import edit_config
from helpers.outcomes import assert_clean, sha256s
from helpers.unmerging import UNDO


def test_unmerge_on_the_command_line(two: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    """Base back, exit code 0, and a document for programs."""
    base, (style, task), out = two
    back = tmp_path / "back"
    plan = run_cli("unmerge", out, task, style, "-o", back, "--dry-run")
    assert plan.exit_code == 0
    assert "bit for bit" in " ".join(plan.stdout.split())
    assert not back.exists()
    done = run_cli("unmerge", out, task, style, "-o", back, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["exact"] is True
    assert document["weights"] == [0.7, -0.4]
    assert document["remaining"] == []
    assert document["expected_changed"] is None
    assert sha256s(back) == sha256s(base)


def test_unmerge_errors_on_the_command_line(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """Exit code 1 for what is refused, 2 for a wrong call, the reason on stderr, no traceback."""
    _, (style, task), out = two
    back = tmp_path / "back"
    short = run_cli("unmerge", out, style, "-o", back, "--json")
    assert (short.exit_code, short.stdout) == (1, "")
    error = json.loads(short.stderr)
    assert error["error"] == "not-restored"
    assert "task" in error["message"]
    assert "--subtract" in error["hint"]
    wrong = run_cli("unmerge", out, style, task, "-o", back, "--dtype", "float16")
    assert wrong.exit_code == 2
    assert "--subtract" in wrong.stderr
    missing = run_cli("unmerge", out, "-o", back)
    assert missing.exit_code == 2
    for done in (short, wrong, missing):
        assert "Traceback" not in done.stderr
    assert_clean(back)
    assert os.path.lexists(out / UNDO)


def test_subtraction_on_the_command_line(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """That it is not exact, and how much will differ, is said; notices go to stderr."""
    _, (style, task), out = two
    (out / "loratool.json").unlink()
    shutil.rmtree(out / "loratool")
    done = run_cli("unmerge", out, style, task, "-o", tmp_path / "back", "--weight", "0.7",
                   "--weight", "-0.4")  # fmt: skip
    assert done.exit_code == 0
    assert "differ from those" in done.stdout
    assert "no-provenance" in done.stderr
    edit_config(style, lora_alpha=3)
    assert (tmp_path / "back" / "loratool.json").is_file()

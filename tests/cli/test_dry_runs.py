"""A dry run shows its plan, and then ends as the real run would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.cli import run_cli
from helpers.places import FIXTURES

BASE, LORA = str(FIXTURES / "base"), str(FIXTURES / "adapter")

CALLS = {
    "merge": (["merge", BASE, LORA], "28 merged"),
    "resize": (["resize", LORA, "--rank", "2"], "28"),
    "combine": (["combine", LORA, LORA], "28"),
    "convert": (["convert", LORA, "--to", "mlx"], "mlx"),
}


@pytest.mark.parametrize("command", CALLS)
@pytest.mark.parametrize("place", ["there", "there.safetensors", "file/out"])
def test_the_plan_comes_first_and_then_the_error(command: str, place: str, tmp_path: Path) -> None:
    """An output that the real run refuses is refused by the dry run with the same words and code,
    after the plan; as JSON the plan is on stdout and the error on stderr."""
    (tmp_path / "file").write_text("mine")
    if place == "there":
        (tmp_path / place).mkdir()
        (tmp_path / place / "notes.txt").write_text("mine")
    call, planned = CALLS[command]
    call = [*call, "-o", str(tmp_path / place)]
    real, dry = run_cli(*call), run_cli(*call, "--dry-run")
    assert (real.exit_code, real.stdout) == (1, "")
    assert dry.exit_code == 1
    assert planned in dry.stdout
    assert dry.stderr.endswith(real.stderr)
    as_json = run_cli(*call, "--dry-run", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["dry_run"] is True
    assert json.loads(as_json.stderr)["error"] == "bad-output"


def test_a_plan_that_can_be_carried_out_is_no_error(tmp_path: Path) -> None:
    """With --overwrite, into an empty folder, and where nothing is, a dry run ends with 0."""
    (tmp_path / "empty").mkdir()
    shutil.copytree(LORA, tmp_path / "old")
    for place, more in (("empty", []), ("new", []), ("old", ["--overwrite"])):
        call = ["merge", BASE, LORA, "-o", str(tmp_path / place), "--dry-run", *more]
        done = run_cli(*call)
        assert (done.exit_code, done.stderr) == (0, "")


def test_what_is_wrong_with_an_input_is_said_in_place_of_a_plan(tmp_path: Path) -> None:
    """An input that cannot be read leaves nothing to plan, whatever is wrong with the output."""
    (tmp_path / "there.safetensors").write_text("mine")
    call = ["merge", BASE, str(tmp_path / "gone"), "-o", str(tmp_path / "there.safetensors")]
    done = run_cli(*call, "--dry-run")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "gone" in done.stderr

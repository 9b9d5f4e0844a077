"""Ctrl-C and a polite kill: exit code 130, and nothing left behind but finished files."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers.outcomes import beside
from helpers.places import FIXTURES
from helpers.processes import start_python, wait_for

from loratool.cli.main import _interrupted
from loratool.storage import placing, staging


@pytest.mark.process
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
    child = start_python(slow, "merge", base, adapter, "-o", tmp_path / "out")
    wait_for(lambda: bool(list(tmp_path.glob(".out.loratool-work/by-*/model*"))), child)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_second_interrupt_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    """Ctrl-C pressed again and again leaves nothing behind, as the message says."""
    base, lora, out = FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out"
    slow = (
        "import loratool.storage.shardfile as w, shutil, sys, time\n"
        "import loratool.merging.executor\n"
        "write, remove = w.ShardWriter.write, shutil.rmtree\n"
        "w.ShardWriter.write = lambda s, o, d: (write(s, o, d), time.sleep(0.05))\n"
        "def slowly(*a, **k):\n"
        "    print('cleaning', flush=True); time.sleep(0.5); remove(*a, **k)\n"
        "shutil.rmtree = slowly\n"
        "from loratool.cli.main import main; main(sys.argv[1:])"
    )
    child = start_python(slow, "merge", base, lora, "-o", out)
    wait_for(lambda: bool(list(tmp_path.glob(".out.loratool-work/by-*/model*"))), child)
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None
    assert child.stdout.readline() == "cleaning\n"
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert beside(out) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "b", "a", "-o", "o"], "no unfinished output is left behind"),
        (["merge", "b", "a", "-o", "o", "--dry-run"], "nothing was written"),
        (["push", "a", "org/a", "--dry-run"], "nothing was written"),
        (["push", "a", "org/a"], "all of it or nothing"),
        (["merge", "b", "a", "-o", "o", "--push", "org/a"], "all of it or nothing"),
    ],
)
def test_what_an_interrupt_says_is_true_of_the_command(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push may have made its commit already, and a dry run makes nothing."""
    monkeypatch.setattr(placing, "_PLACED", [])  # other tests put outputs there in this process
    assert said in _interrupted(arguments)


def test_an_interrupt_after_the_last_step_names_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who presses Ctrl-C while the summary is printed has the whole output."""
    monkeypatch.setattr(placing, "_PLACED", [])
    with staging.StagedDirectory(tmp_path / "out") as staged:
        staged.commit()
    assert _interrupted(["merge", "b", "a", "-o", "o"]).endswith("out is complete")

"""Calls computed in processes of their own: the same results, whatever becomes of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from helpers.adapters import lora
from helpers.called import killed_elsewhere, loud, place_of, refused

import loratool
from loratool.streams import processes
from loratool.streams.processes import Processes
from loratool.streams.threads import computed, cores
from loratool.verbs import list as listing

pytestmark = pytest.mark.process


@pytest.fixture
def here() -> int:
    return os.getpid()


def test_calls_are_spread_over_processes_and_answered_in_order(here: int) -> None:
    """Every process gets a part of the work, and the one that asks none."""
    with Processes(2) as some:
        calls = (partial(some.call, place_of, number) for number in range(40))
        found = list(computed(calls, some.count))
    assert [number for number, _ in found] == list(range(40))
    assert here not in {place for _, place in found}
    assert len(Counter(place for _, place in found)) == 2


def test_an_error_is_raised_where_it_was_asked(here: int) -> None:
    """The error of the function itself comes out, and the process goes on."""
    with Processes(1) as some:
        with pytest.raises(ValueError, match="number 3 is refused"):
            some.call(refused, 3)
        assert some.call(place_of, 4)[1] != here


def test_what_a_killed_process_had_is_computed_here(here: int) -> None:
    """A process that the system kills loses no result, also of the calls after it."""
    with Processes(2) as some:
        calls = (partial(some.call, killed_elsewhere, n, here) for n in range(10))
        assert list(computed(calls, some.count)) == list(range(10))


def test_what_is_printed_is_no_answer() -> None:
    """Somebody's print in a process, or what a library writes to stdout, disturbs nothing."""
    with Processes(1) as some:
        assert [some.call(loud, number) for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("noise", ["N.", "Initialising modules", "\\x80\\x04", "x" * 100_000])
def test_what_is_printed_at_the_start_is_no_answer(
    noise: str, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a site has run whenever Python starts may print whatever it likes."""
    monkeypatch.setattr(processes, "_SCRIPT", f"print({noise!r})\n{processes._SCRIPT}")
    with Processes(1) as some:
        assert some.call(place_of, 5)[1] != here


def test_nothing_of_the_folder_one_is_in_is_run(
    tmp_path: Path, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever lists a folder with a pickle.py in it does not run that."""
    for name in ("pickle", "sitecustomize", "re"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Processes(1) as some:
        assert some.call(place_of, 5)[1] != here
    assert not (tmp_path / "ran").exists()


def test_there_are_no_more_processes_than_cores() -> None:
    """Whoever asks for 500 threads does not get 500 interpreters."""
    assert Processes(500).count == Processes().count == min(8, cores())
    assert Processes(1).count == 1


@pytest.mark.parametrize(
    ("name", "program"),
    # A silent program that is called like Python cannot be told from a slow Python.
    [
        ("python3", "exec yes"),
        ("python3", "exit 0"),
        ("qgis", "exec yes"),
        ("qgis", "exec sleep 60"),
    ],
)
def test_an_application_that_is_no_python_is_not_waited_for(
    name: str, program: str, tmp_path: Path, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would have computed is computed here."""
    other = tmp_path / name
    other.write_text(f"#!/bin/sh\n{program}\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(other))
    start = time.monotonic()
    with Processes(1) as some:
        assert some.call(place_of, 5) == (5, here)
    assert time.monotonic() - start < 30


def test_where_no_process_can_be_had_all_is_computed_here(
    here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that is no Python by itself is not started again in place of one."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Processes(2) as some:
        assert some.call(place_of, 1) == (1, here)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Processes(2) as some:
        assert some.call(place_of, 1) == (1, here)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with Processes(2) as some:
        assert some.call(place_of, 1) == (1, here)


def test_an_error_outside_ends_the_processes() -> None:
    """Nobody waits for what a process still computes: of a minute a second is left at most."""

    def interrupted() -> None:
        with Processes(1) as some:
            calls = (partial(some.call, time.sleep, number) for number in (0, 60))
            for _ in computed(calls, 1):
                raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 30


#: What a user writes, without a main guard; prints once what was found.
_SCRIPT = """
import sys, loratool
from loratool.streams import processes
ask, asked = processes._Process.ask, []
processes._Process.ask = lambda *a: asked.append(a) or ask(*a)
print(len(loratool.catalog(sys.argv[1]).entries), len(asked))
"""


def many(place: Path) -> None:
    """A folder of more adapters than are read in threads."""
    for number in range(listing._MANY + 5):
        lora(place / f"lora-{number}", seed=number // 2)
    (place / "lora-3" / "adapter_model.safetensors").write_bytes(b"damaged")


def test_many_headers_are_read_in_processes(tmp_path: Path) -> None:
    """A script needs no main guard for it."""
    many(tmp_path / "loras")
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, script, tmp_path / "loras"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("105 105\n", "", 0)


def test_processes_say_what_threads_say(tmp_path: Path) -> None:
    """What is damaged, a copy or in order is so wherever it was read."""
    many(tmp_path)
    alone = loratool.catalog(tmp_path, threads=1)
    assert loratool.catalog(tmp_path).to_dict() == alone.to_dict()
    assert sum(entry.duplicate_of is not None for entry in alone.entries) > 40
    assert alone.entries[3].state == "unreadable"

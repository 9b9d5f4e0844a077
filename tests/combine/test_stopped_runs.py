"""A combine that is killed, interrupted or out of room leaves no output."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import WEIGHTS, lora
from helpers.combining import fails
from helpers.outcomes import assert_clean, assert_clear, beside, sha256s
from helpers.permissions import permissions_that_count
from helpers.processes import start_python, wait_for

import loratool
from loratool.errors import OutputError

# The halt is many short ones: a signal that comes just before a sleep begins does not shorten it.
_CHILD = """
import json, sys, time
import loratool
import loratool.storage.placing as writer
adapters, output, where = json.loads(sys.argv[1])
def halt(*_):
    for _ in range(600): time.sleep(0.1)
def progress(done, total, path):
    if where == "computing" and done == 2: halt()
if where == "flushing": writer.sync = halt
loratool.combine(adapters, output, progress=progress, threads=1)
"""


def start(sources: list[Path], output: Path, where: str) -> subprocess.Popen[str]:
    """A run of its own that stops in the middle of computing or of flushing."""
    arguments = json.dumps([[str(s) for s in sources], str(output), where])
    process = start_python(_CHILD, arguments)
    wanted = ".out.loratool-*/" + ("factors.partial" if where == "computing" else "loratool.json")
    wait_for(lambda: any(p.stat().st_size for p in output.parent.glob(wanted)), process)
    return process


@pytest.mark.process
@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_a_killed_run_leaves_what_the_next_one_removes(
    layers: list[Path], out: Path, where: str
) -> None:
    """SIGKILL leaves no output; its hidden leftovers go with the next run for that output."""
    process = start(layers, out, where)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert not out.exists()
    assert len(beside(out)) == 1
    loratool.combine(layers, out)
    assert beside(out) == []
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}


@pytest.mark.process
@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_an_interrupted_run_leaves_nothing(layers: list[Path], out: Path, where: str) -> None:
    """Ctrl-C, while it computes or while it flushes, leaves neither output nor leftovers."""
    process = start(layers, out, where)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert_clean(out)


@pytest.mark.process
def test_the_command_says_that_it_was_interrupted(layers: list[Path], out: Path) -> None:
    """Ctrl-C ends the command with code 130, one line and nothing on the disk."""
    slow = (
        "import time, loratool.combining.rank_change as o; "
        "run = o.decompose; "
        "o.decompose = lambda *x: (time.sleep(0.5), run(*x))[1]; "
        "from loratool.cli.main import main; main()"
    )
    process = start_python(slow, "combine", *layers, "-o", out, "--threads", "1")
    wait_for(lambda: bool(beside(out)), process)
    process.send_signal(signal.SIGINT)
    words, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert words == ""
    assert_clean(out)


@pytest.mark.parametrize("size", ["4k", "20k", "36k", "48k"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, disk: Callable[[str], Path], size: str) -> None:
    """A disk too small for the scratch file, for the weights or for the rest ends the run in
    words, with all its space given back."""
    place = disk(f"size={size}")
    paths = [f"model.layers.{n}.q_proj" for n in range(32)]
    sources = [lora(tmp_path / str(n), *paths, seed=n, rank=8) for n in range(2)]
    with pytest.raises(OutputError) as caught:
        loratool.combine(sources, place / "out")
    assert_clear(caught.value, str(place))
    assert "partial" not in caught.value.message
    assert os.listdir(place) == []
    free = shutil.disk_usage(place)
    assert free.used == 0


def test_a_disk_that_fills_up_in_mid_run_leaves_nothing(
    tmp_path: Path, layers: list[Path], disk: Callable[[str], Path]
) -> None:
    """Space that others take during the run ends it in words, and the next run succeeds."""
    place = disk("size=256k")
    filler = place / "filler"

    def fill(done: int, total: int, path: str) -> None:
        if done == total:
            with filler.open("wb", buffering=0) as stream:
                try:
                    while True:
                        stream.write(bytes(4096))
                except OSError:
                    pass

    with pytest.raises(OutputError) as caught:
        loratool.combine(layers, place / "out", progress=fill)
    assert_clear(caught.value, str(place))
    assert re.search("disk is full|are free", caught.value.message)
    assert os.listdir(place) == ["filler"]
    filler.unlink()
    loratool.combine(layers, place / "out")
    assert os.listdir(place) == ["out"]


def test_forbidden_places_are_named(
    tmp_path: Path, layers: list[Path], disk: Callable[[str], Path]
) -> None:
    """A parent without write permission and a disk mounted read-only are OutputErrors."""
    parent = tmp_path / "forbidden"
    parent.mkdir(mode=0o555)
    with permissions_that_count():
        fails(OutputError, layers, parent / "out", str(parent), "not allowed")
    place = disk("size=1M")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    fails(OutputError, layers, place / "out", str(place), "not allowed")


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_from_progress_leaves_nothing(layers: list[Path], out: Path, threads: int) -> None:
    """An exception of the caller's own goes through unchanged, and nothing stays."""

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        loratool.combine(layers, out, progress=fail, threads=threads)
    assert_clean(out)


def test_progress_counts_the_modules(layers: list[Path], out: Path) -> None:
    """Progress goes from 1 to the number of modules, with their paths in order."""
    calls: list[tuple[int, int, str]] = []
    loratool.combine(layers, out, progress=lambda *call: calls.append(call))
    assert calls == [(n + 1, 6, f"model.layers.{n}.q_proj") for n in range(6)]

"""A resize that is stopped or out of room leaves no output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.adapters import WEIGHTS, lora
from helpers.outcomes import assert_clear, beside, sha256s
from helpers.permissions import permissions_that_count
from helpers.processes import start_python, wait_for
from helpers.resizing import fails

import loratool
from loratool.errors import OutputError

# The halt is many short ones: a signal that comes just before a sleep begins does not shorten it.
_CHILD = """
import json, sys, time
import loratool
import loratool.storage.placing as writer
source, output, where = json.loads(sys.argv[1])
def halt(*_):
    for _ in range(600): time.sleep(0.1)
def progress(done, total, path):
    if where == "computing" and done == 2: halt()
if where == "flushing": writer.sync = halt
loratool.resize(source, output, rank=3, progress=progress, threads=1)
"""


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_a_run_that_is_stopped_leaves_no_output(
    tmp_path: Path, out: Path, number: signal.Signals, where: str
) -> None:
    """SIGKILL leaves only what the next run removes, SIGINT nothing; the output is never half."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(6)])
    arguments = json.dumps([str(source), str(out), where])
    process = start_python(_CHILD, arguments)
    wanted = ".out.loratool-*/" + ("factors.partial" if where == "computing" else "loratool.json")
    wait_for(lambda: any(p.stat().st_size for p in tmp_path.glob(wanted)), process)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert not out.exists()
    assert len(beside(out)) == (number == signal.SIGKILL)
    loratool.resize(source, out, rank=3)
    assert beside(out) == []
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}


@pytest.mark.parametrize("options", ["size=4k", "size=16k", "size=32k", "size=1M,nr_inodes=3"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, disk: Callable[[str], Path], options: str
) -> None:
    """A disk without room for scratch, weights or the rest ends the run in words and is empty."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(32)], rank=8)
    place = disk(options)
    with pytest.raises(OutputError) as caught:
        loratool.resize(source, place / "out", rank=8)
    assert_clear(caught.value, str(place))
    assert "partial" not in caught.value.message
    assert os.listdir(place) == []
    assert shutil.disk_usage(place).used == 0


def test_forbidden_places_are_named(tmp_path: Path, one: Path, disk: Callable[[str], Path]) -> None:
    """A parent without write permission and a disk mounted read-only are OutputErrors."""
    parent = tmp_path / "forbidden"
    parent.mkdir(mode=0o555)
    with permissions_that_count():
        fails(OutputError, one, parent / "out", str(parent), "not allowed")
    place = disk("size=1M")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    fails(OutputError, one, place / "out", str(place), "not allowed")

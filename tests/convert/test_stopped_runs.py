"""A conversion that is stopped or out of room leaves no output."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.adapters import lora
from helpers.outcomes import assert_clear, beside
from helpers.places import FIXTURES
from helpers.processes import start_python, wait_for

import loratool
from loratool.errors import OutputError

BASE = FIXTURES / "base"

_CHILD = """
import json, sys, time
import loratool
source, output, target, base = json.loads(sys.argv[1])
def progress(done, total, key):
    if done == 3:
        for _ in range(600): time.sleep(0.1)
loratool.convert(source, output, to=target, base=base, progress=progress, threads=1)
"""


@pytest.mark.process
@pytest.mark.parametrize("target", ["mlx", "gguf", "torchtune"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_output(
    tmp_path: Path, number: signal.Signals, target: str
) -> None:
    """SIGKILL leaves only what the next run removes, SIGINT nothing; the output is never half."""
    source, out = FIXTURES / "adapter", tmp_path / "out"
    process = start_python(_CHILD, json.dumps([str(source), str(out), target, str(BASE)]))
    wait_for(lambda: any(p.is_file() for p in tmp_path.glob(".out.loratool-*/*")), process)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not out.exists()
    assert len(beside(out)) == (number == signal.SIGKILL)
    loratool.convert(source, out, to=target, base=BASE)
    assert beside(out) == []


@pytest.mark.parametrize("target", ["peft", "mlx", "gguf", "torchtune", "litgpt"])
@pytest.mark.parametrize("options", ["size=16k", "size=284k", "size=1M,nr_inodes=3"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, disk: Callable[[str], Path], target: str, options: str
) -> None:
    """A disk without room for weights or the rest ends the run in words and is empty."""
    source = FIXTURES / "adapter"
    if target == "peft":  # another dtype, or nothing would be written
        source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(400)], rank=8)
    dtype = "float32" if target == "peft" else None
    place = disk(options)
    with pytest.raises(OutputError) as caught:
        loratool.convert(source, place / "out", to=target, base=BASE, dtype=dtype)
    assert_clear(caught.value, str(place))
    assert os.listdir(place) == []
    assert shutil.disk_usage(place).used == 0

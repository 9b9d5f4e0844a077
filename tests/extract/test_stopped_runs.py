"""An extraction that is killed, interrupted or out of room leaves no output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import config_of
from helpers.extracting import Pair, model, moved
from helpers.files import write_base
from helpers.outcomes import assert_clean, assert_clear, beside, sha256s
from helpers.permissions import permissions_that_count
from helpers.processes import start_python

import loratool
from loratool.errors import FileError, OutputError

# The halt is many short ones: a signal that comes just before a sleep begins does not shorten it.
_CHILD = """
import json, sys, time
import loratool.storage.placing as writer
import loratool.adapters.factorfile as peft_writer
from loratool.cli.main import main
arguments, where = json.loads(sys.argv[1])
def halt(*_):
    for _ in range(600): time.sleep(0.1)
def wait(*_):
    print("there", flush=True)
    halt()
if where == "flushing":
    writer.sync = wait
else:
    peft_writer.AdapterWriter.take = wait
main(["extract", *arguments])
"""


def start(pair: Pair, where: str) -> subprocess.Popen[str]:
    """An extraction that has come to a halt in the middle of its work."""
    arguments = [str(pair.base), str(pair.tuned), "--rank", "4", "-o", str(pair.out)]
    process = start_python(_CHILD, json.dumps([arguments, where]))
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n", process.communicate()
    return process


@pytest.mark.process
@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_an_interrupted_run_leaves_its_results(tiny: Pair, where: str) -> None:
    """Ctrl-C in the middle ends the run with code 130 and a word; what it computed waits."""
    process = start(tiny, where)
    assert len(beside(tiny.out)) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "a part is finished and waits in" in err
    assert not tiny.out.exists()
    assert beside(tiny.out) == [".out.loratool-work"]
    report = loratool.extract(tiny.base, tiny.tuned, tiny.out, rank=4)
    assert "taken-up" in [notice.code for notice in report.warnings]
    assert beside(tiny.out) == []


@pytest.mark.process
@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tiny: Pair, where: str) -> None:
    """SIGKILL in the middle: no output, inputs unharmed; the next run removes what was left."""
    before = sha256s(tiny.base.parent)
    process = start(tiny, where)
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert not tiny.out.exists()
    assert len(beside(tiny.out)) == 1
    assert sha256s(tiny.base.parent) == before
    tiny.extract(rank=4)
    assert beside(tiny.out) == []
    assert config_of(tiny.out)["r"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "disk is full"), ({"save": ["layers.1.mlp.*", "lm_head"]}, "needs"),
     ({"dtype": "float16"}, "")],
)  # fmt: skip
def test_a_full_disk_is_named_and_left_empty(
    tmp_path: Path, disk: Callable[[str], Path], options: Any, words: str
) -> None:
    """Space that runs out for the factors, or is too little for the file, ends the run in words."""
    place = disk("size=160k" if options.get("save") else "size=128k")
    state = model(64)
    pair = Pair(tmp_path, state, moved(state))
    rank = 20 if options.get("save") else 60
    with pytest.raises(OutputError) as caught:
        loratool.extract(
            pair.base, pair.tuned, place / "out", **{"rank": rank, "dtype": "float32", **options}
        )
    assert_clear(caught.value, words, str(place))
    assert "partial" not in caught.value.message
    assert os.listdir(place) == []
    assert shutil.disk_usage(place).used == 0


@pytest.mark.parametrize("options", ["size=64k", "size=1M,nr_inodes=2", "size=1M,nr_inodes=3"])
def test_a_disk_without_room_for_the_first_file_leaves_nothing(
    tiny: Pair, disk: Callable[[str], Path], options: str
) -> None:
    """Where not even the first file fits, the run leaves no directory and names the disk."""
    place = disk(options)
    if "nr_inodes" not in options:
        (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free))
    before = os.listdir(place)
    with pytest.raises(OutputError) as caught:
        loratool.extract(tiny.base, tiny.tuned, place / "out", rank=2)
    assert_clear(caught.value, "disk is full", str(place))
    assert os.listdir(place) == before


def test_forbidden_places_are_named(tmp_path: Path, tiny: Pair) -> None:
    """A parent without write permission, or below a file, is an OutputError that names it."""
    parent = tmp_path / "forbidden"
    parent.mkdir(mode=0o555)
    with permissions_that_count():
        tiny.fails(OutputError, str(parent), "not allowed", output=parent / "out")
    (tmp_path / "file").write_text("mine")
    tiny.fails(OutputError, str(tmp_path / "file"), output=tmp_path / "file" / "out")


@pytest.mark.parametrize("side", ["base", "fine"])
@pytest.mark.parametrize("how", ["shrinks", "vanishes"])
def test_an_input_that_goes_away_during_the_run_is_named(
    tmp_path: Path, side: str, how: str
) -> None:
    """A weights file cut or removed while it is read is a FileError about it, not about writing."""
    before, after = model(), moved(model())
    folders = {}
    for name, state in (("base", before), ("fine", after)):
        parts = [
            {n: t for n, t in state.items() if ("norm" in n) is norm} for norm in (True, False)
        ]
        folders[name] = write_base(tmp_path / "in" / name, *parts)
    victim = folders[side] / "model-00002-of-00002.safetensors"

    def harm(*_: Any) -> None:
        if how == "vanishes":
            victim.unlink(missing_ok=True)
        else:
            os.truncate(victim, 3000)

    # Norms are measured first; the shard with the matrices is gone by then.
    with pytest.raises(FileError) as caught:
        loratool.extract(
            folders["base"], folders["fine"], tmp_path / "out", rank=2, progress=harm, threads=1
        )
    assert_clear(caught.value, str(victim))
    assert_clean(tmp_path / "out")


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_from_progress_leaves_results_alone(tiny: Pair, threads: int) -> None:
    """An exception of the caller's own goes through unchanged; the results wait."""

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        tiny.extract(rank=2, progress=fail, threads=threads)
    assert beside(tiny.out) == [".out.loratool-work"]  # which says nothing of the results

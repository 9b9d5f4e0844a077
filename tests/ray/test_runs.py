"""Runs of the command line with clusters of their own: what they say, and how they end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.merging import large_base, large_lora, work_of
from helpers.outcomes import beside, sha256s
from helpers.processes import start_python

import loratool

ray_helpers = pytest.importorskip("helpers.ray")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.process

MAIN = """
from loratool.__main__ import start
start()
"""


class Inputs:
    """A base in twelve shards, an adapter, and what a run by itself makes of them."""

    def __init__(self, folder: Path) -> None:
        self.base = large_base(folder / "base", 96, 12)
        self.adapter = large_lora(folder / "adapter")
        loratool.merge(self.base, self.adapter, folder / "alone")
        self.alone = sha256s(folder / "alone")

    def start(self, out: Path, *options: str) -> subprocess.Popen[str]:
        return start_python(MAIN, "merge", self.base, self.adapter, "-o", out, *options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds while `process` is alive. To begin a cluster takes a while."""
    until = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > until:
            process.kill()
            pytest.fail("nothing came of it")
        time.sleep(0.005)


def finished(out: Path) -> list[Path]:
    return [path for path in work_of(out) if path.parent.name == "done"]


def begun(process: subprocess.Popen[str], name: str) -> Callable[[], bool]:
    """Whether a run has begun a process of this name."""
    return lambda: any(name in one.name() for one in _below(process))


def _below(process: subprocess.Popen[str]) -> list[Any]:
    return list(psutil.Process(process.pid).children(recursive=True))


def assert_gone(processes: list[Any], seconds: float) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, [one.cmdline() for one in alive]


def test_stdout_is_the_answer_and_stderr_is_empty(inputs: Inputs, tmp_path: Path) -> None:
    """`--json --ray` in pipes says nothing but its JSON, also where a task's process is killed."""
    out = tmp_path / "out"
    process = inputs.start(out, "--json", "--ray")
    wait_for(lambda: bool(finished(out)), process)
    ray_helpers.kill(*ray_helpers.tasks())
    said, complained = process.communicate(timeout=240)
    assert complained == ""
    assert json.loads(said)["output"] == str(out)
    assert process.returncode == 0
    assert sha256s(out) == inputs.alone
    assert beside(out) == []


def test_words_are_those_of_a_run_without(nodes: Any, inputs: Inputs, tmp_path: Path) -> None:
    """Both streams of a run on a cluster that is there already, but for times."""
    said = []
    for options in ([], ["--ray", nodes.address]):
        process = inputs.start(tmp_path / "out", *options, "--overwrite")
        out, err = process.communicate(timeout=240)
        said.append([re.sub(r"\d+\.\d+ s|\d+(\.\d+)? [MG]B/s", "…", text) for text in (out, err)])
        assert process.returncode == 0, err
    assert said[0] == said[1]


def test_ctrl_c_keeps_what_is_finished_and_ends_the_cluster(inputs: Inputs, tmp_path: Path) -> None:
    """Exit 130, words about what is kept, no process of Ray's left; the next run takes it up."""
    out = tmp_path / "out"
    process = inputs.start(out, "--ray")
    wait_for(lambda: len(finished(out)) >= 2, process)
    of_ray = _below(process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    found = re.fullmatch(
        r"\n?interrupted; (\d+) of 12 files are finished and wait in (.*); the same command "
        r"goes on \(or remove that folder\)\n",
        said,
    )
    assert found, said
    assert 2 <= int(found[1]) < 12
    assert {path.name for path in Path(found[2]).iterdir()} >= {"order.json", "output", "done"}
    assert not [path for path in Path(found[2]).iterdir() if path.name.startswith("by-")]
    assert_gone(of_ray, 10)
    _goes_on(inputs, out, int(found[1]))


def _goes_on(inputs: Inputs, out: Path, least: int) -> None:
    """A run without Ray takes up at least so many shards and makes the rest."""
    report = loratool.merge(inputs.base, inputs.adapter, out)
    (notice,) = [notice for notice in report.warnings if notice.code == "taken-up"]
    assert int(notice.message.split()[0]) >= least
    assert sha256s(out) == inputs.alone
    assert beside(out) == []


def test_ctrl_c_while_the_cluster_begins_leaves_nothing(inputs: Inputs, tmp_path: Path) -> None:
    """No process of Ray's and no folder are left."""
    out = tmp_path / "out"
    process = inputs.start(out, "--ray")
    wait_for(begun(process, "gcs_server"), process)
    of_ray = _below(process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert said.lstrip() == "interrupted; no unfinished output is left behind\n"
    assert process.returncode == 130
    assert_gone(of_ray, 10)
    assert beside(out) == []


def test_a_killed_run_takes_its_cluster_with_it(inputs: Inputs, tmp_path: Path) -> None:
    """After SIGKILL whatever works ends within seconds, and the next run goes on."""
    out = tmp_path / "out"
    process = inputs.start(out, "--ray")
    wait_for(lambda: len(finished(out)) >= 2, process)
    of_ray = _below(process)
    # Two agents of Ray's, which do nothing then, ask for their cluster for a minute.
    agents = [one for one in of_ray if one.name().startswith(("ray::Dashboard", "ray::Runtime"))]
    process.kill()
    process.communicate(timeout=120)
    assert_gone([one for one in of_ray if one not in agents], 20)
    ray_helpers.kill(*agents)
    _goes_on(inputs, out, 2)


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_that_does_not_answer_is_an_error(
    inputs: Inputs, tmp_path: Path, listens: bool
) -> None:
    """Where nothing listens, and where what listens says nothing: one error, in bounded time."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        began = time.monotonic()
        process = inputs.start(tmp_path / "out", "--ray", address, "--json")
        said, complained = process.communicate(timeout=100)
        assert time.monotonic() - began < (80 if listens else 40)
    assert process.returncode == 1
    assert said == ""
    error = json.loads(complained)
    assert error["error"] == "cluster"
    assert error["message"].startswith(f"No Ray cluster answers at {address}: ")
    assert "ray start --head" in error["hint"]
    assert beside(tmp_path / "out") == []

"""A cluster on this machine of which nodes and tasks can be lost, and functions for its tasks."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from helpers.merging import work_of
from helpers.places import ROOT
from loratool.errors import MatchError

#: Bytes of a node's store of objects: about Ray's least.
_STORE = 80_000_000

#: How processes are called in which a task of ours runs.
_TASK = "ray::loratool "


class Nodes:
    """A head without CPUs, and two nodes with one each; this process is connected to them."""

    def __init__(self) -> None:
        # Tasks import the functions of this module, and inherit where from.
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        head = {"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = []
        self.complete()
        self.address = str(self._cluster.address)
        ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR)

    def complete(self) -> None:
        """Have two nodes, whatever became of them."""
        while len(self._nodes) < 2:
            self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=_STORE))

    def lose_node_of(self, task: psutil.Process) -> None:
        """Kill the node, and all its processes, in which a task runs."""
        above = {process.pid for process in task.parents()}
        (node,) = [n for n in self._nodes if _raylet(n) in above]
        below = psutil.Process(_raylet(node)).children(recursive=True)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        kill(*below)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def _raylet(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    pid: int = raylet.process.pid
    return pid


def kill(*processes: psutil.Process) -> None:
    """SIGKILL processes and see them end."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, alive


def tasks() -> list[psutil.Process]:
    """The processes in which tasks of ours run right now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith(_TASK):
            found.append(process)
    return found


class Disturbance:
    """Progress of a run for `output`; when its first shard is finished, a task is disturbed in
    the middle of its work, once. `hit` says whether that came about."""

    def __init__(self, output: Path, disturb: Callable[[psutil.Process], None]) -> None:
        self.hit = False
        self.seen: list[tuple[int, int]] = []
        self._output, self._disturb = output, disturb

    def __call__(self, done: int, total: int, label: str) -> None:
        self.seen.append((done, total))
        until = time.monotonic() + 3
        while not self.hit and 0 < done < total and time.monotonic() < until:
            if not self._works():
                continue
            for task in tasks()[:1]:
                self._disturb(task)
                self.hit = self._works()  # what it left is no finished shard

    def _works(self) -> bool:
        """Whether a shard is being written beside what lies there for the run itself."""
        return any(path.parent.name.startswith("by-") and path.suffix != ".json"
                   for path in work_of(self._output))  # fmt: skip


class Seen:
    """Progress of a run: what was shown, in order."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int, label: str) -> None:
        self.shown.append((done, total))

    def assert_complete(self) -> None:
        """It goes up, by more than one step, and ends at what was announced."""
        done = [d for d, _ in self.shown]
        assert done == sorted(done)
        assert len(set(done)) > 1
        assert len({total for _, total in self.shown}) == 1
        assert self.shown[-1][0] == self.shown[-1][1]


# ------------------------------------------------------------------ what tasks of tests do


def assigned() -> dict[str, float]:
    """What the cluster has reserved for this task."""
    found: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return found


def note(path: str) -> int:
    """Count how often this was called, beyond the life of a process."""
    with open(path, "a") as stream:
        stream.write(f"{os.getpid()}\n")
    return len(Path(path).read_text().splitlines())


def die(path: str, times: int) -> int:
    """Kill the own process, so many times; then answer."""
    count = note(path)
    if count <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return count


def refuse(path: str) -> None:
    note(path)
    raise MatchError("Nothing fits at /a/path.", "Look at it.")


def fail(path: str) -> float:
    note(path)
    return 1 / 0


def sleep_unless_first(path: str, number: int) -> None:
    """Outlive the test, if nobody ends it; call 0 ends when another one sleeps."""
    if number:
        note(path)
        time.sleep(120)
    while not (os.path.exists(path) and os.path.getsize(path)):
        time.sleep(0.01)


def nothing(number: int) -> int:
    return number

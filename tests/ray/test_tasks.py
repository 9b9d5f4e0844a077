"""Calls as tasks: what they get, what becomes of their errors, and of those that are lost."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.outcomes import assert_clean, assert_clear
from helpers.places import FIXTURES

import loratool
from loratool.errors import MatchError, UsageError
from loratool.streams import cluster as clusters
from loratool.streams.cluster import Cluster, ClusterCall, ClusterError

ray_helpers = pytest.importorskip("helpers.ray")
psutil = pytest.importorskip("psutil")

ROOM = 300_000_000


def call(*arguments: Any, memory: int = ROOM) -> list[ClusterCall]:
    return [ClusterCall("one", arguments, memory)]


def test_memory_and_threads_are_declared(nodes: Any) -> None:
    """A task has the bytes that its call says and a core for each thread, as far as a node has."""
    with Cluster(nodes.address, 8) as cluster:
        ((_, own),) = cluster.results(ray_helpers.assigned, call())
        ((_, most),) = cluster.results(ray_helpers.assigned, call(memory=1 << 50))
    assert own["memory"] == pytest.approx(ROOM, rel=0.01)
    assert own["CPU"] == 1
    assert most["memory"] > ROOM


def test_more_calls_than_nodes_are_all_answered_once(nodes: Any) -> None:
    """Every call has its answer, under its name."""
    with Cluster(nodes.address, 1) as cluster:
        found = list(cluster.results(
            ray_helpers.nothing, [ClusterCall(str(n), (n,), ROOM) for n in range(40)]
        ))  # fmt: skip
    assert sorted(found) == sorted((str(n), n) for n in range(40))


def test_a_lost_task_is_made_again(nodes: Any, tmp_path: Path) -> None:
    """A call whose process was killed twice is answered by the third."""
    with Cluster(nodes.address, 1) as cluster:
        found = list(cluster.results(ray_helpers.die, call(str(tmp_path / "log"), 2)))
    assert found == [("one", 3)]


def test_a_task_that_is_always_lost_is_an_error(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up after some tries, in words."""
    monkeypatch.setattr(clusters, "_RETRIES", 1)
    with Cluster(nodes.address, 1) as cluster, pytest.raises(ClusterError) as caught:
        list(cluster.results(ray_helpers.die, call(str(tmp_path / "log"), 99)))
    assert_clear(caught.value, "one", "lost 2 times")
    assert caught.value.keeps_work
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_an_error_of_ours_comes_out_as_it_was_raised(nodes: Any, tmp_path: Path) -> None:
    """Kind, message and hint are the task's, without another try."""
    with Cluster(nodes.address, 1) as cluster, pytest.raises(MatchError) as caught:
        list(cluster.results(ray_helpers.refuse, call(str(tmp_path / "log"))))
    assert type(caught.value) is MatchError
    assert (caught.value.message, caught.value.hint) == (
        "Nothing fits at /a/path.", "Look at it.",
    )  # fmt: skip
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_an_unforeseen_error_is_told_in_words(nodes: Any, tmp_path: Path) -> None:
    """What a task raised is named with its call, without another try."""
    with Cluster(nodes.address, 1) as cluster, pytest.raises(ClusterError) as caught:
        list(cluster.results(ray_helpers.fail, call(str(tmp_path / "log"))))
    assert_clear(caught.value, "one", "ZeroDivisionError")
    assert "\n" not in caught.value.message
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_what_still_runs_at_the_end_is_ended(nodes: Any, tmp_path: Path) -> None:
    """When the run ends before them, no task works any more, and none that waits begins."""
    log = tmp_path / "log"
    calls = [ClusterCall(str(number), (str(log), number), ROOM) for number in range(4)]
    with Cluster(nodes.address, 1) as cluster:
        assert next(cluster.results(ray_helpers.sleep_unless_first, calls)) == ("0", None)
    pids = [int(line) for line in log.read_text().splitlines()]
    assert pids
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(alive, timeout=3)
    assert not [task for task in alive if task.status() != psutil.STATUS_ZOMBIE]
    time.sleep(2)
    assert len(log.read_text().splitlines()) == len(pids)


def test_another_address_than_the_programs_own_is_refused(nodes: Any) -> None:
    """Tasks do not go to a cluster that was not meant."""
    with pytest.raises(UsageError) as caught, Cluster("127.0.0.1:1", 1):
        pass
    assert_clear(caught.value, nodes.address, "127.0.0.1:1")


def test_without_ray_the_hint_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that fails is an error in words, with nothing left."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError) as caught:
        loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out", ray="")
    assert_clear(caught.value, "Ray is not installed")
    assert "pip install 'loratool[ray]'" in caught.value.hint
    assert_clean(tmp_path / "out")


def test_a_free_port_is_told_apart_from_a_cluster() -> None:
    """Where nothing listens, no time is spent on it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        clusters._refuse_silent(f"127.0.0.1:{port}")
    with pytest.raises(OSError, match="refused"):
        clusters._refuse_silent(f"ray://127.0.0.1:{port}")
    clusters._refuse_silent("local")

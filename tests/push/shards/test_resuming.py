"""merge --push that was stopped goes on where it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import contents, run
from helpers.outcomes import beside
from helpers.shard_pushes import (
    COUNT,
    INPUTS,
    SHARDS,
    assert_pushed,
    cached,
    fetched,
    own_commits,
    puts,
    staging,
    through,
    weights_in,
)


def stopped(
    hub: HubServer, home: Path, number: int, at: int, command: list[object]
) -> tuple[int, str]:
    """Send a signal to a merge in the middle of its upload number `at`; exit code and stderr."""
    child: list[subprocess.Popen[str]] = []

    def strike() -> None:
        child[0].send_signal(number)
        child[0].wait(60)

    for _ in range(at - 1):
        hub.on("^/upload/", lambda: None)
    hub.on("^/upload/", strike)
    home.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "loratool", *map(str, command)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child.append(subprocess.Popen(line, env=hub.environment(home), cwd=home.parent, **streams))
    _, errors = child[0].communicate(timeout=120)
    return child[0].returncode, errors


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes], number: signal.Signals
) -> None:
    """Shards that are on the Hub are not computed, downloaded or uploaded again."""
    command = [*INPUTS, "--push", repo, "--no-keep"]
    code, errors = stopped(hub, home, number, 4, command)
    assert code == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert "interrupted" in errors
        assert not (home / "loratool").exists()
    assert own_commits(hub, repo) == []
    assert len(staging(hub, repo)) == 1
    before = len(weights_in(home / "hub"))
    hub.clear()
    report = through(hub, home, repo, "--json").json
    assert report["resumed"] == SHARDS[:3]
    assert puts(hub) in (COUNT - 3, COUNT - 4)  # the fourth may have come through
    assert not set(SHARDS[:3]) & set(fetched(hub))
    assert_pushed(hub, repo, local)
    assert list((home / "loratool").glob("*")) == []
    # What the first run had downloaded for shards to come may stay; it is not much.
    assert len(weights_in(home)) <= before <= 2


@pytest.mark.process
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_stopped_and_run_again_with_an_output(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes], tmp_path: Path, where: str
) -> None:
    """Here what was finished is taken up; on another machine it is made anew, but not uploaded."""
    out = tmp_path / "out"
    code, said = stopped(hub, home, signal.SIGTERM, 6, [*INPUTS, "-o", out, "--push", repo])
    assert code == 130
    assert not out.exists()
    assert beside(out) == [".out.loratool-work"]
    assert "finished" in said or "main branch" in said
    hub.clear()
    if where == "elsewhere":
        out = tmp_path / "elsewhere" / "out"
    done = run(hub, tmp_path / "other", *INPUTS, "-o", out, "--push", repo)
    assert ("[taken-up]" in done.err) == (where == "here")
    assert puts(hub) in (COUNT - 5, COUNT - 6)
    kept = contents(out)
    kept.pop("README.md", None)
    assert kept == local
    assert beside(out) == []
    assert_pushed(hub, repo, local)


def test_other_merges_do_not_resume_from_each_other(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes]
) -> None:
    """The last commit fails; then weight, dtype and adapter are others; then the first again.

    Each is what its own options say, and the first goes on where it was: nothing of it is
    downloaded or uploaded again."""
    cached(hub, home, "org/base", "*")
    hub.fail("/commit/main", 500)
    done = through(hub, home, repo, code=1)
    assert "500" in done.err
    assert own_commits(hub, repo) == []
    first = staging(hub, repo)
    assert len(first) == 1
    assert weights_in(home / "loratool") == []
    others: list[list[str]] = [["--weight", "0.5"], ["--dtype", "float32"]]
    for number, options in enumerate(others, 1):
        hub.clear()
        report = through(hub, home, repo, *options, "--overwrite", "--json").json
        assert report["resumed"] == []
        assert puts(hub) == COUNT
        assert len(own_commits(hub, repo)) == number
        assert staging(hub, repo) == first
        files = hub.files(repo)
        changed = [name for name in SHARDS if files[name] != local[name]]
        assert len(changed) == COUNT or (options[0] == "--weight" and changed)
    hub.clear()
    report = through(hub, home.with_name("another"), repo, "--overwrite", "--json").json
    assert report["resumed"] == SHARDS
    assert (puts(hub), fetched(hub)) == (0, [])
    files = hub.files(repo)
    assert {name: files[name] for name in local} == local
    assert staging(hub, repo) == []

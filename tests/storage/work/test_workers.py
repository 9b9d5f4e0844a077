"""Several workers make one output side by side, with nothing but files between them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import run_cli
from helpers.outcomes import beside, sha256s
from helpers.places import FIXTURES
from helpers.processes import start_python, wait_for

import loratool
from loratool.errors import OutputError, UsageError
from loratool.storage import placing, presence
from loratool.storage.worksites import work_of
from loratool.streams.shares import WorkShare
from loratool.verbs import writing
from loratool.verbs.making import make_share

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one run gives."""
    output = tmp_path_factory.mktemp("wanted") / "out"
    loratool.merge(BASE, ADAPTER, output, reversible=True)
    return sha256s(output)


def work(output: Path, worker: str, **options: Any) -> loratool.MergeReport:
    return loratool.merge(BASE, ADAPTER, output, reversible=True, worker=worker, **options)


def share_of(report: loratool.MergeReport) -> Any:
    assert report.share is not None
    return report.share


def test_three_workers_make_what_one_run_makes(tmp_path: Path, wanted: dict[str, str]) -> None:
    """Each makes its own; the last one puts the output into its place."""
    output, made = tmp_path / "out", []
    for number in (1, 2, 3):
        share = share_of(work(output, f"{number}/3"))
        made += share.made
        assert share.complete == (number == 3)
        assert output.exists() == (number == 3)
        assert len(share.missing) == 3 - number
    assert sorted(made) == SHARDS
    assert sha256s(output) == wanted
    assert beside(output) == []


def test_workers_take_no_lock(
    tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks, or with some that lie, workers must not need one."""

    def refuse(folder: Path) -> int:
        raise AssertionError(f"{folder} was locked")

    for module in (placing, presence):
        monkeypatch.setattr(module, "lock_folder", refuse)
    for number in (1, 2):
        work(tmp_path / "out", f"{number}/2")
    assert sha256s(tmp_path / "out") == wanted


#: Runs a command in a process where locking is taken away.
UNLOCKED = (
    "import sys, loratool.storage.system as system\n"
    "system.fcntl = None\n"
    "from loratool.cli.main import main; main(sys.argv[1:])"
)


@pytest.mark.process
@pytest.mark.parametrize("workers", [["1/2", "2/2"], ["1/1", "1/1", "1/1"], ["1/2", "1/2", "2/2"]])
def test_workers_at_the_same_time_do_no_harm(
    tmp_path: Path, wanted: dict[str, str], workers: list[str]
) -> None:
    """Side by side, also several on one share, also at the end, where each may be the last."""
    output = tmp_path / "out"
    running = [
        start_python(
            UNLOCKED, "merge", BASE, ADAPTER, "-o", output, "--reversible", "--worker", worker
        )
        for worker in workers
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert sha256s(output) == wanted
    assert beside(output) == []


def test_ends_at_the_same_time_do_no_harm(tmp_path: Path, wanted: dict[str, str]) -> None:
    """All files are finished when several look, and each wants to complete the output."""
    for turn in range(5):
        output = tmp_path / f"out{turn}"
        work(output, "1/2")
        with ThreadPoolExecutor(4) as pool:
            shares = list(pool.map(lambda _: share_of(work(output, "2/2")), range(4)))  # noqa: B023
        assert all(share.complete for share in shares)
        assert sum(not share.before for share in shares) == 1
        assert not any(share.missing for share in shares)
        assert sha256s(output) == wanted
        assert beside(output) == []


@pytest.mark.process
def test_a_lost_worker_is_repeated(tmp_path: Path, wanted: dict[str, str]) -> None:
    """Killed in mid-work, with the same number of workers or another one."""
    output = tmp_path / "out"
    slow = (
        "import sys, time, loratool.merging.arithmetic as a\n"
        "run = a.RunningJob.compute\n"
        "a.RunningJob.compute = lambda *x: (time.sleep(0.2), run(*x))\n"
        "from loratool.cli.main import main; main(sys.argv[1:])"
    )
    command = ["merge", BASE, ADAPTER, "-o", output, "--reversible", "--worker", "1/2"]
    lost = start_python(slow, *command)
    wait_for(lambda: bool(list(work_of(output).glob("by-*/model*"))), lost)
    lost.send_signal(signal.SIGKILL)
    lost.communicate(timeout=30)
    assert not list(work_of(output).glob("output/*"))
    assert not share_of(work(output, "2/2")).complete
    share = share_of(work(output, "3/5"))
    assert share.complete or share.missing
    for number in range(1, 6):
        if not output.exists():
            work(output, f"{number}/5")
    assert sha256s(output) == wanted


def test_a_late_worker_is_told_that_all_is_done(tmp_path: Path, wanted: dict[str, str]) -> None:
    """A task that a scheduler begins again after the end has nothing to do, and does not fail."""
    output = tmp_path / "out"
    work(output, "1/1")
    before = os.stat(output / SHARDS[0])
    for options in ({}, {"overwrite": True}):
        share = share_of(work(output, "1/2", **options))
        assert share.complete
        assert share.before
    assert os.stat(output / SHARDS[0]) == before
    assert beside(output) == []
    with pytest.raises(OutputError, match=r"appeared|exists"):
        work(output, "1/2", dtype="bfloat16")
    assert sha256s(output) == wanted


def test_a_worker_of_something_else_is_refused(tmp_path: Path, wanted: dict[str, str]) -> None:
    """One with other options would spoil the output; it says in what it differs."""
    output = tmp_path / "out"
    work(output, "1/2")
    with pytest.raises(OutputError, match="dtype") as caught:
        work(output, "2/2", dtype="bfloat16")
    assert str(work_of(output)) in caught.value.hint
    work(output, "2/2")
    assert sha256s(output) == wanted


def test_a_run_by_itself_takes_up_what_workers_made(tmp_path: Path, wanted: dict[str, str]) -> None:
    output = tmp_path / "out"
    work(output, "1/2")
    report = loratool.merge(BASE, ADAPTER, output, reversible=True)
    assert "taken-up" in [notice.code for notice in report.warnings]
    assert sha256s(output) == wanted


def test_a_run_by_itself_does_not_clear_what_workers_make(tmp_path: Path) -> None:
    """They may be alive, and nobody can tell; only --restart clears it."""
    output = tmp_path / "out"
    work(output, "1/2")
    for change in ({"dtype": "bfloat16"}, {"weights": [2.0]}):
        with pytest.raises(OutputError, match="Workers make"):
            loratool.merge(BASE, ADAPTER, output, reversible=True, **change)
    with pytest.raises(OutputError, match="Workers make"):
        loratool.resize(ADAPTER, output, rank=2)
    assert (work_of(output) / "output" / SHARDS[0]).is_file()
    loratool.merge(BASE, ADAPTER, output, dtype="bfloat16", restart=True)
    assert beside(output) == []


def test_finish_leaves_what_is_complete(tmp_path: Path) -> None:
    """So a script may call it after the workers, whether or not the last of them has done it."""
    work(tmp_path / "out", "1/1")
    before = (tmp_path / "out" / "loratool.json").stat().st_mtime_ns
    assert loratool.finish(tmp_path / "out").complete
    assert (tmp_path / "out" / "loratool.json").stat().st_mtime_ns == before
    ran = run_cli("finish", tmp_path / "out")
    assert ran.exit_code == 0
    assert "complete before this" in ran.stdout


def test_finish_names_what_is_missing(tmp_path: Path, wanted: dict[str, str]) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputError, match="Nothing is being made"):
        loratool.finish(output)
    share = share_of(work(output, "1/3"))
    with pytest.raises(OutputError, match="2 parts are not finished") as caught:
        loratool.finish(output)
    for name in SHARDS:
        assert (name in caught.value.message) == (name in share.missing)
    for number in (2, 3):
        work(output, f"{number}/3")
    assert sha256s(output) == wanted


@pytest.mark.parametrize("how", ["finish", "worker"])
def test_who_comes_after_a_worker_that_died_in_its_end_goes_on(
    tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """All files are finished, and the folder is called by the name that its finisher gave it."""
    output = tmp_path / "out"
    work(output, "1/2")

    def die(*_: Any) -> None:
        raise SystemExit  # of which `finishing` must not learn, as of SIGKILL

    with monkeypatch.context() as patch:
        patch.setattr("loratool.verbs.writing.write_beside", die)
        patch.setattr(os, "rename", only_to("finishing-", os.rename))
        with pytest.raises(SystemExit):
            work(output, "2/2")
    assert list(work_of(output).glob("finishing-*"))
    monkeypatch.setattr("loratool.storage.workfolder._PATIENCE", 0.5)
    # A worker that is repeated waits for a sign of life, and completes the output itself then.
    report = loratool.finish(output) if how == "finish" else work(output, "2/2")
    assert share_of(report).complete
    assert not share_of(report).before
    assert sha256s(output) == wanted
    assert beside(output) == []


def only_to(name: str, rename: Callable[..., None]) -> Callable[..., None]:
    """A rename that does nothing but where the new name begins so."""

    def renamed(source: Path, target: Path) -> None:
        if Path(target).name.startswith(name):
            rename(source, target)

    return renamed


def test_a_finisher_that_lives_after_all_gives_way(
    tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thought to be dead, its work is taken over; it learns so, and the output is whole."""
    output = tmp_path / "out"
    work(output, "1/2")
    reports = []
    real = writing.write_beside

    def slow(*others: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(writing, "write_beside", real)
            reports.append(loratool.finish(output))
        real(*others)

    monkeypatch.setattr(writing, "write_beside", slow)
    share = share_of(work(output, "2/2"))
    assert share.complete
    assert share.before
    assert share_of(reports[0]).complete
    assert sha256s(output) == wanted
    assert beside(output) == []


def test_more_workers_than_files(tmp_path: Path, wanted: dict[str, str]) -> None:
    output = tmp_path / "out"
    made = [share_of(work(output, f"{n}/7")).made for n in range(1, 8) if not output.exists()]
    assert sorted(name for own in made for name in own) == SHARDS
    assert sha256s(output) == wanted


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_what_is_no_worker_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="no worker"):
        work(tmp_path / "out", text)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"restart": True}, "throw away"),
        ({"dry_run": True}, "dry run"),
        ({"push": "org/name"}, "--push takes one run"),
        ({"ray": ""}, "--ray splits"),
    ],
)
def test_what_does_not_go_with_workers(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        work(tmp_path / "out", "1/2", **more)


def test_what_a_worker_shows(tmp_path: Path, wanted: dict[str, str]) -> None:
    """What it made, what is missing, and how it goes on."""
    first = run_cli("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--worker", "1/2")
    assert first.exit_code == 0
    assert "worker" in first.stdout
    assert "1/2, 1 part" in first.stdout
    assert "missing    2 parts" in first.stdout
    assert SHARDS[1] in first.stdout
    assert "loratool finish" in first.stdout
    assert "written" not in first.stdout
    missing = run_cli("finish", tmp_path / "out")
    assert missing.exit_code == 1
    assert "2 parts are not finished" in missing.stderr
    told = json.loads(
        run_cli("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--worker", "2/2", "--json").stdout
    )
    assert told["share"] == {
        "worker": "2/2", "made": SHARDS[1:], "missing": [], "complete": True, "before": False,
    }  # fmt: skip
    late = run_cli("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--worker", "2/2")
    assert "completed by another worker" in late.stdout


def test_the_order_holds_what_a_merge_was_told(tmp_path: Path) -> None:
    """Parts, weights of layers and sizes of shards reach whoever makes a share by the order alone,
    as the tasks of a cluster do."""
    told: dict[str, Any] = {
        "include": "self_attn.*", "exclude": ["k_proj"], "weights": ["0.5,2@layers.1"],
        "max_shard_size": "50kB",
    }  # fmt: skip
    loratool.merge(BASE, ADAPTER, tmp_path / "wanted", **told)
    loratool.merge(BASE, ADAPTER, tmp_path / "out", worker="1/2", **told)
    report = make_share(loratool.merge, tmp_path / "out", WorkShare(2, 2))
    assert share_of(report).complete
    assert sha256s(tmp_path / "out") == sha256s(tmp_path / "wanted")

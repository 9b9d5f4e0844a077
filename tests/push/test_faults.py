"""What a broken line, or somebody else's commit, does to a push."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import refused
from helpers.pushing import WEIGHTS, add, as_json, assert_no_commit, own_commits, push, text_of

_WAIT = {"Retry-After": "1"}
ONCE: dict[str, Callable[[HubServer], None]] = {
    "cut": lambda hub: hub.cut("/upload/", after=1_000),
    "cut-reset": lambda hub: hub.cut("/upload/", after=2_000, reset=True),
    "cut-answer": lambda hub: hub.cut("/upload/", after=0, method="PUT", side="response"),
    "500-put": lambda hub: hub.fail("/upload/", 500),
    "500-batch": lambda hub: hub.fail("/objects/batch", 500),
    "503-preupload": lambda hub: hub.fail("/preupload/", 503),
    "429": lambda hub: [
        hub.fail(where, 429, headers=_WAIT) for where in ("/preupload/", "/upload/")
    ] and None,
}  # fmt: skip


@pytest.mark.parametrize("fault", ONCE)
def test_a_fault_that_passes(
    hub: HubServer, home: Path, adapter: Path, repo: str, fault: str
) -> None:
    """Retried in silence: the right bytes, one commit, nothing said of it."""
    ONCE[fault](hub)
    done = push(hub, home, adapter, repo, "-q")
    assert done.err == ""
    assert hub.files(repo)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    assert len(own_commits(hub, repo)) == 1


def test_an_upload_that_never_comes_through(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """One clear error after the retries, and no commit."""
    hub.cut("/upload/", after=1_000, times=99)
    done = push(hub, home, adapter, repo, code=1)
    assert done.out == ""
    assert done.err.count("error") == 1
    assert len(done.err.splitlines()) <= 6
    assert_no_commit(hub, repo)


def test_a_commit_that_fails(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """No half commit; what went up is not sent again by the next run."""
    hub.fail("/commit/", 500)
    found = refused(hub, home, "push", adapter, repo)
    assert found["error"] == "hub"
    assert "500" in found["message"]
    assert_no_commit(hub, repo)
    assert len(hub.requests("/upload/", "PUT")) == 1
    hub.clear()
    push(hub, home, adapter, repo)
    assert hub.requests("/upload/", "PUT") == []
    assert hub.files(repo)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    assert len(own_commits(hub, repo)) == 1


def test_a_commit_asked_to_wait(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """429 with Retry-After is waited for or told: there is a whole commit, or none."""
    hub.fail("/commit/", 429, headers=_WAIT)
    done = push(hub, home, adapter, repo, code=None)
    if done.code == 0:
        assert len(own_commits(hub, repo)) == 1
    else:
        assert "429" in done.err
        assert_no_commit(hub, repo)


@pytest.mark.parametrize("there", ["new", "branch"])
def test_an_answer_that_is_lost(
    hub: HubServer, home: Path, adapter: Path, repo: str, there: str
) -> None:
    """The commit was made and only its answer got lost: that is success, and no second commit."""
    hub.cut("/commit/", after=0, method="POST", side="response")
    options = ["--revision", "next"] if there == "branch" else []
    report = as_json(hub, home, adapter, repo, *options)
    branch = "next" if there == "branch" else "main"
    assert len(own_commits(hub, repo, branch)) == 1
    assert report["commit"] == hub.branches(repo)[branch]


def test_no_answer_after_the_commit(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """What is done is done: a question that fails after the commit does not make it a failure."""
    hub.on(
        "/commit/",
        lambda: hub.fail("/api/models/[^/]*/[^/]*(/revision.*)?$", 500, times=2, method="GET"),
    )
    push(hub, home, adapter, repo)
    assert len(own_commits(hub, repo)) == 1


def test_a_fault_of_the_first_question(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Asked again, or one clear error; nothing is taken for missing that is not."""
    hub.add(repo, {"README.md": "Words of a person.\n"})
    for where in (f"{repo}$", "/revision/main"):
        hub.fail(where, 500)
        done = push(hub, home, adapter, repo, "--json", code=None)
        assert done.code == 0 or json.loads(done.err)["error"] == "hub"
    push(hub, home, adapter, repo)
    assert b"Words of a person.\n" in hub.files(repo)["README.md"]


def test_a_lost_answer_of_nothing(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A connection that broke before the commit was read is not taken for success."""
    hub.cut("/commit/", after=10, method="POST")
    found = refused(hub, home, "push", adapter, repo)
    assert found["error"] == "hub"
    assert_no_commit(hub, repo)


def test_nobody_answers(hub: HubServer, home: Path, adapter: Path) -> None:
    """A Hub that is down, and HF_HUB_OFFLINE: one clear error."""
    found = refused(hub, home, "push", adapter, "org/x", HF_ENDPOINT="http://127.0.0.1:9")
    assert "127.0.0.1:9" in found["message"]
    found = refused(hub, home, "push", adapter, "org/x", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in text_of(found)


@pytest.mark.parametrize(
    ("name", "moment", "how"),
    [
        (WEIGHTS, "/upload/", "rewritten"),
        ("notes.txt", "/upload/", "rewritten"),
        ("notes.txt", "/upload/", "removed"),
        ("notes.txt", "/api/repos/create", "rewritten"),
    ],
)
def test_a_file_that_changes_meanwhile(
    hub: HubServer, home: Path, adapter: Path, repo: str, name: str, moment: str, how: str
) -> None:
    """Refused, whenever it happens: no commit of a mixture."""
    path = adapter / name
    if not path.exists():
        add(adapter, name, "before")

    def change() -> None:
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[::-1])

    hub.on(moment, change)
    found = refused(hub, home, "push", adapter, repo)
    assert name in found["message"]
    assert_no_commit(hub, repo)


def test_a_file_that_changes_too_late_to_be_seen(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """What is committed is what was looked at, and searched for secrets."""
    path = adapter / "notes.txt"
    add(adapter, "notes.txt", "before")
    hub.on("/api/validate-yaml", lambda: path.write_text("after!"))
    push(hub, home, adapter, repo)
    assert hub.files(repo)["notes.txt"] == b"before"


@pytest.mark.parametrize("moment", ["/upload/", "/commit/"])
def test_somebody_else_commits_meanwhile(
    hub: HubServer, home: Path, adapter: Path, repo: str, moment: str
) -> None:
    """Their commit stays, ours is refused; run again, both are there."""
    hub.add(repo, {"README.md": "First.\n"})
    hub.on(moment, lambda: hub.add(repo, {"README.md": "Second.\n", "theirs.txt": "theirs"}))
    refused(hub, home, "push", adapter, repo)
    assert hub.commits(repo)[0].changed == ("README.md", "theirs.txt")
    assert len(hub.commits(repo)) == 2
    push(hub, home, adapter, repo)
    files = hub.files(repo)
    assert files["theirs.txt"] == b"theirs"
    assert b"Second.\n" in files["README.md"]
    assert WEIGHTS in files


def test_the_repository_is_made_by_somebody_else_meanwhile(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Looked at before it was there, and public by now: nothing private is put into it."""
    hub.on("/api/repos/create", lambda: hub.add(repo, {"README.md": "Words of a person.\n"}))
    done = push(hub, home, adapter, repo, "--private", code=None)
    assert done.code != 0
    assert hub.files(repo) == {"README.md": b"Words of a person.\n"}


def test_a_card_that_appears_meanwhile_is_kept(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """The same without --private: a card that was not there when it was looked for."""
    hub.on("/api/repos/create", lambda: hub.add(repo, {"README.md": "Words of a person.\n"}))
    push(hub, home, adapter, repo, code=None)
    assert b"Words of a person.\n" in hub.files(repo)["README.md"]


#: Answers to a commit that say nothing true.
NONSENSE = {
    "no-object": b"[]",
    "no-id": b'{"commitUrl": "x", "commitOid": null, "success": true}',
    "odd-id": b'{"commitUrl": "x", "commitOid": "../../outside", "success": true}',
    "page": b"<html>Sign in</html>",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_commit_that_is_answered_with_nonsense(
    hub: HubServer, home: Path, adapter: Path, repo: str, kind: str
) -> None:
    """What the answer says is not believed: the repository is looked at, and holds no commit."""
    hub.answer("/commit/", NONSENSE[kind], times=99, headers={"Content-Type": "application/json"})
    found = refused(hub, home, "push", adapter, repo)
    assert found["error"] == "hub"
    assert_no_commit(hub, repo)

"""Logins that may not write."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import refused
from helpers.pushing import LOGIN, own_commits, push, text_of


@pytest.mark.parametrize(
    ("place", "token", "options", "words"),
    [
        ("new", None, [], [LOGIN]),
        ("new", "hf_wrong", [], ["token", LOGIN]),
        ("new", "hf_wrong", ["--dry-run"], ["token", LOGIN]),
        ("new", "hf_member", [], ["write", LOGIN]),
        ("open", "hf_member", [], ["write token", LOGIN]),
        ("open", "hf_reader", [], ["write", LOGIN]),
    ],
)
def test_logins_that_do_not_do(
    hub: HubServer, home: Path, adapter: Path, repo: str, place: str, token: str | None,
    options: list[str], words: list[str],
) -> None:  # fmt: skip
    """None, not known, or not for writing: exit 4, what to run, and nothing there has changed."""
    if place == "open":
        hub.add(repo, {"a.txt": "a"})
    before = hub.branches(repo) if hub.exists(repo) else None
    found = refused(hub, home, "push", adapter, repo, *options, token=token, code=4)
    assert found["error"] == "hub-login"
    for word in words:
        assert word in text_of(found)
    assert hub.requests("/upload/") == []
    assert (hub.branches(repo) if hub.exists(repo) else None) == before


def test_other_peoples_repositories(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A private one is as if it were not there; of a gated one it is said that it is gated."""
    hub.add(repo, {"a.txt": "a", "README.md": "Mine.\n"}, private=True)
    refused(hub, home, "push", adapter, repo, token="hf_reader", code=4)
    assert len(hub.commits(repo)) == 1
    gated = f"{repo}-gated"
    hub.add(gated, {"a.txt": "a", "README.md": "Mine.\n"}, gated=True)
    done = push(hub, home, adapter, gated, "--create-pr", token="hf_reader", code=None)
    assert done.code in (1, 4)
    assert "gated" in done.err
    assert gated in done.err
    push(hub, home, adapter, gated)  # who may read it may complete its card


def test_the_stored_login_is_used(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """What `hf auth login` wrote does; storage and other hosts never see it."""
    home.mkdir()
    (home / "token").write_text("hf_writer\n")
    done = push(hub, home, adapter, repo, token=None)
    assert "hf_writer" not in done.out + done.err
    assert len(own_commits(hub, repo)) == 1
    assert {r.token for r in hub.requests("^/upload/")} == {None}

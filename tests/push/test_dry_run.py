"""A dry run of push tells new, changed and there."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.hub import HubServer
from helpers.pushing import LOGIN, WEIGHTS, add, as_json, assert_read_only, push, states


def test_dry_run_tells_new_changed_and_there(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """By hash, with the right sums, without writing; also for a reader without a login."""
    add(adapter, "same.txt", "same")
    add(adapter, "other.txt", "here")
    hub.add(
        repo,
        {"same.txt": "same", "other.txt": "there", WEIGHTS: (adapter / WEIGHTS).read_bytes()},
    )
    head = hub.commits(repo)[0].id
    report = as_json(hub, home, adapter, repo, "--dry-run")
    card = next(f for f in report["files"] if f["name"] == "README.md")
    assert states(report) == {
        "adapter_config.json": "new", "README.md": "new", "other.txt": "changed",
        "same.txt": "there", WEIGHTS: "there",
    }  # fmt: skip
    config = (adapter / "adapter_config.json").stat().st_size
    assert report["bytes_to_upload"] == config + 4 + card["bytes"]
    assert report["bytes_there"] == 4 + (adapter / WEIGHTS).stat().st_size
    assert report["dry_run"] is True
    assert report["commit"] == ""
    shown = push(hub, home, adapter, repo, "--dry-run", token=None).out
    assert "nothing was uploaded" in shown
    for name, word in (("other.txt", "another version"), ("same.txt", "the same")):
        assert re.search(rf"^\s*{name}.*{word}", shown, re.MULTILINE)
    assert_read_only(hub)
    assert hub.commits(repo)[0].id == head
    assert not (adapter / "README.md").exists()


def test_dry_run_of_a_repository_that_is_not_there(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Everything is new, and the repository is not made. Without a login the Hub does not tell."""
    report = as_json(hub, home, adapter, repo, "--dry-run", "--private")
    assert set(states(report).values()) == {"new"}
    assert report["created"] is report["private"] is True
    assert report["bytes_there"] == 0
    shown = push(hub, home, adapter, repo, "--dry-run").out
    assert "to be created" in shown
    done = push(hub, home, adapter, repo, "--dry-run", token=None, code=None)
    assert done.code == 0 or (done.code == 4 and LOGIN in done.err)
    assert_read_only(hub)
    assert not hub.exists(repo)


def test_dry_run_of_a_new_branch_knows_what_main_has(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """A new branch starts from main, so main's files are there."""
    push(hub, home, adapter, repo)
    hub.clear()
    report = as_json(hub, home, adapter, repo, "--revision", "next", "--dry-run")
    assert_read_only(hub)
    assert set(states(report).values()) == {"there"}
    assert report["bytes_to_upload"] == 0

"""Private, branches, pull requests, messages, JSON, and what they are refused for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import refused, run
from helpers.pushing import WEIGHTS, add, as_json, assert_read_only, own_commits, push, text_of


def test_private(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """Created private and staying so; never taken for private where it is public."""
    report = as_json(hub, home, adapter, repo, "--private")
    assert hub.is_private(repo)
    assert report["private"] is report["created"] is True
    assert as_json(hub, home, adapter, repo)["private"] is True
    assert "private" in push(hub, home, adapter, repo, "--private").out
    hub.add(f"{repo}-open", {"a.txt": "a"})
    for options in ([], ["--dry-run"]):
        hub.clear()
        found = refused(hub, home, "push", adapter, f"{repo}-open", "--private", *options, code=2)
        assert "public" in found["message"]
        assert_read_only(hub)


def test_branches(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A new branch and one that is there take the commit; main stays."""
    hub.add(repo, {"a.txt": "a"})
    main = hub.branches(repo)["main"]
    for branch in ("next", "a/b"):
        done = push(hub, home, adapter, repo, "--revision", branch)
        assert hub.branches(repo)["main"] == main
        assert hub.files(repo, branch)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
        assert hub.files(repo, branch)["a.txt"] == b"a"
        assert done.out.splitlines()[-1].strip().startswith(f"{hub.url}/{repo}/tree/")
    add(adapter, "b.txt", "b")
    report = as_json(hub, home, adapter, repo, "--revision", "next")
    assert hub.commits(repo, "next")[0].changed == ("b.txt",)
    assert report["revision"] == "next"
    assert report["commit"] == hub.branches(repo)["next"]
    assert set(hub.branches(repo)) == {"main", "next", "a/b"}


def test_a_pull_request(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """main is untouched, the URL is that of the request, and whoever can read can open one."""
    hub.add(repo, {"a.txt": "a", "README.md": "Words of a person.\n"})
    main = hub.branches(repo)["main"]
    for number, token in ((1, "hf_writer"), (2, "hf_reader")):
        done = push(hub, home, adapter, repo, "--create-pr", "--json", token=token).json
        url = f"{hub.url}/{repo}/discussions/{number}"
        assert done["url"] == done["pull_request"] == url
        assert hub.branches(repo)["main"] == main
        files = hub.files(repo, f"refs/pr/{number}")
        assert files[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
        assert b"Words of a person.\n" in files["README.md"]
        assert len(hub.commits(repo, f"refs/pr/{number}")) == 2
    add(adapter, "b.txt", "b")
    push(hub, home, adapter, repo, "--revision", "refs/pr/1")
    assert hub.commits(repo, "refs/pr/1")[0].changed == ("b.txt",)
    assert hub.branches(repo)["main"] == main
    found = refused(hub, home, "push", adapter, repo, "--create-pr", "--revision", "x", code=2)
    assert "--create-pr" in found["message"]
    assert "x" not in hub.branches(repo)


def test_a_pull_request_to_a_new_repository(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """The repository is made, main holds nothing of ours, the request all of it."""
    done = push(hub, home, adapter, repo, "--create-pr")
    assert own_commits(hub, repo) == []
    assert f"{hub.url}/{repo}/discussions/1" in done.out
    assert WEIGHTS in hub.files(repo, "refs/pr/1")


def test_messages(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """As given, or one that names the tool."""
    push(hub, home, adapter, repo, "-m", "Första ★ utkastet")
    add(adapter, "b.txt", "b")
    push(hub, home, adapter, repo)
    new, old = own_commits(hub, repo)
    assert old.message == "Första ★ utkastet"
    assert "loratool" in new.message


def test_the_document(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """--json is one document, alone on stdout, with all that scripts need."""
    add(adapter, ".DS_Store", "x")
    done = push(hub, home, adapter, repo, "--json")
    assert done.err == ""
    report = done.json
    assert report["schema_version"] == 1
    wanted = {
        "source": str(adapter), "repo": repo, "revision": "main", "kind": "adapter",
        "dry_run": False, "private": False, "created": True, "card": "made",
        "left_out": [".DS_Store"], "url": f"{hub.url}/{repo}", "pull_request": "",
        "commit": hub.commits(repo)[0].id, "warnings": [],
    }  # fmt: skip
    assert {key: report[key] for key in wanted} == wanted
    sizes = {name: len(data) for name, data in hub.files(repo).items()}
    assert all(f["bytes"] == sizes[f["name"]] for f in report["files"])
    assert push(hub, home, adapter, repo, "-q").err == ""


def test_a_mixture_of_models_is_refused(
    hub: HubServer, home: Path, merged: Path, repo: str
) -> None:
    """A model.safetensors of before would be loaded in place of the shards."""
    hub.add(repo, {"model.safetensors": b"old weights"})
    found = refused(hub, home, "push", merged, repo)
    assert "model.safetensors" in found["message"]
    assert len(hub.commits(repo)) == 1


def test_a_record_of_what_was_there_before_is_told(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """loratool.json of the weights that this push replaces would be a lie about these."""
    hub.add(repo, {"loratool.json": "{}"})
    report = as_json(hub, home, adapter, repo)
    assert "stale-record" in [w["code"] for w in report["warnings"]]


def test_weights_that_stay_there_are_told(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """They do no harm, but somebody should know."""
    hub.add(repo, {"other.safetensors": b"old weights"})
    report = as_json(hub, home, adapter, repo)
    assert "other-weights" in [w["code"] for w in report["warnings"]]
    assert hub.files(repo)["other.safetensors"] == b"old weights"


@pytest.mark.parametrize(
    ("path", "place", "code", "word"),
    [
        ("{parent}/adaptr", "org/x", 1, "Did you mean"),
        ("{parent}/nowhere/at/all", "org/x", 1, "no such directory"),
        ("{adapter}/adapter_model.safetensors", "org/x", 1, "{adapter}"),
        ("{parent}/empty", "org/x", 1, "empty"),
        ("", "org/x", 2, "empty"),
        ("{adapter}", "", 2, "org/name"),
        ("{adapter}", "name", 2, "org/name"),
        ("{adapter}", "org/", 2, "org/name"),
        ("{adapter}", "org/a/b", 2, "org/name"),
        ("{adapter}", "https://example.com/org/name", 1, "org/name"),
        ("{adapter}", "../name", 2, "org/name"),
        ("{adapter}", "org/a b", 2, "org/name"),
        ("{adapter}", "org/x@next", 2, "--revision next"),
        ("{adapter}", "org/a--b", None, "org/"),
        ("{adapter}", "org/" + "a" * 120, None, "org/"),
    ],
)
def test_mistakes(
    hub: HubServer, home: Path, adapter: Path, path: str, place: str, code: int | None, word: str
) -> None:
    """One clear error, nothing sent, nothing made."""
    (adapter.parent / "empty").mkdir()
    places = {"adapter": adapter, "parent": adapter.parent}
    given = path.format(**places)
    done = run(hub, home, "push", given, place, "--json", code=code, cwd=adapter)
    assert done.code in (1, 2)
    found = json.loads(done.err)
    assert word.format(**places) in text_of(found)
    assert found["hint"]
    assert_read_only(hub)
    assert not hub.exists(place)

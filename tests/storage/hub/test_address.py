"""Ids, revisions, folders and files; paths that could be ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import TASKS, call, config, paths, refused, run, small

_ALPHAS = """
told = {}
for name in sys.argv[1:]:
    report = loratool.inspect(name)
    told[name] = [report.modules[0].alpha, report.source]
print(json.dumps(told))
"""


def test_revisions(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """A branch, a name like a tag's, a commit, a pull request; each gives its own content."""
    alphas = {"main": 1, "dev": 2, "v1.0": 3, "feature/x": 4}
    for branch, alpha in alphas.items():
        folder = small(tmp_path / f"a{alpha}", alpha)
        hub.add("org/revisions", dict(paths(folder)), branch=branch)
    main = hub.repos["org/revisions"].find("main")
    assert hub.repos["org/revisions"].open_discussion("Better", "someone", main) == 1
    hub.add("org/revisions", dict(paths(small(tmp_path / "a5", 5))), branch="refs/pr/1")
    dev = hub.branches("org/revisions")["dev"]
    expected = {
        "org/revisions": 1, "org/revisions@main": 1, "org/revisions@dev": 2,
        "org/revisions@v1.0": 3, "org/revisions@feature/x": 4, f"org/revisions@{dev}": 2,
        "org/revisions@refs/pr/1": 5, "hf://org/revisions": 1, "hf://org/revisions@v1.0": 3,
        "hf://org/revisions@refs/pr/1": 5,
        "hf://org/revisions@dev/adapter_model.safetensors": 2,
        "hf://org/revisions@refs/pr/1/adapter_model.safetensors": 5,
    }  # fmt: skip
    found = call(hub, warm, _ALPHAS, *expected)
    assert {name: alpha for name, (alpha, _) in found.items()} == expected
    assert found["org/revisions@dev"][1] == "org/revisions@dev"
    refusal = refused(hub, warm, "inspect", "org/revisions@nope")
    assert "'nope'" in refusal["message"]
    assert refusal["error"] == "hub"


def test_subfolders_and_single_files(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """Each adapter of a repository is read with the config that lies beside it, not another's."""
    one, two = small(tmp_path / "one", 6), small(tmp_path / "two", 7, seed=1)
    files = {f"{sub}/{n}": p for sub, f in (("a", one), ("b/c", two)) for n, p in paths(f).items()}
    hub.add("org/several", {**files, "b/c/README.md": "text", "adapter_config.json": config()})
    hub.add("org/nested", {f"adapter/{n}": p for n, p in paths(two).items()})
    expected = {
        "hf://org/several/a": 6, "hf://org/several/a/": 6, "hf://org/several/b/c": 7,
        "hf://org/several/b/c/adapter_model.safetensors": 7,
        "hf://org/several@main/a/adapter_model.safetensors": 6,
        "org/nested": 7, "hf://models/org/several/a": 6,
    }  # fmt: skip
    found = call(hub, warm, _ALPHAS, *expected)
    assert {name: alpha for name, (alpha, _) in found.items()} == expected
    assert found["hf://org/several/a"][1] == "hf://org/several/a"
    assert found["hf://org/several/b/c/adapter_model.safetensors"][1] == (
        "hf://org/several/b/c/adapter_model.safetensors"
    )
    for address, words in (
        ("hf://org/several/d", "no such file or folder"),
        ("hf://org/several/a/nope.safetensors", "no such file or folder"),
        ("hf://org/several/../a", "not an address"),
        ("hf://org/a/../b", "not an address"),
        ("hf://datasets/org/name", "models"),
        ("https://example.com/org/name", "not the page"),
    ):
        assert words in refused(hub, warm, "inspect", address)["message"], address


def test_the_record_says_where_in_a_repository(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """Of two adapters in one repository the provenance tells which it was."""
    commit = hub.add("org/shelf", {f"x/y/{n}": p for n, p in paths(TASKS / "html").items()})
    run(hub, warm, "resize", "hf://org/shelf/x/y", "--rank", "2", "-o", tmp_path / "out")
    text = (tmp_path / "out" / "loratool.json").read_text()
    entries = [e for e in json.loads(text)["adapters"] if e.get("repo") == "org/shelf"]
    assert [e["revision"] for e in entries] == [commit]
    assert "x/y" in entries[0]["path"]


def test_a_new_commit_is_seen(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """A repository that changes between two runs: the cache must not hide it."""
    old = hub.add("org/moving", dict(paths(small(tmp_path / "a", 3))))
    alpha = _alpha(hub, warm, "org/moving")
    hub.add("org/moving", dict(paths(small(tmp_path / "b", 5, seed=1))))
    assert (alpha, _alpha(hub, warm, "org/moving")) == (3, 5)
    assert _alpha(hub, warm, f"org/moving@{old}") == 3


def _alpha(hub: HubServer, home: Path, name: str) -> float:
    found: float = run(hub, home, "inspect", name, "--json").json["modules"][0]["alpha"]
    return found


def test_a_path_that_exists_wins(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """`org/adapter` here is read here, and hf:// still reaches the other one."""
    here = small(tmp_path / "work" / "org" / "adapter", 5)
    found = run(hub, home, "inspect", "org/adapter", "--json", cwd=tmp_path / "work").json
    assert found["modules"][0]["alpha"] == 5
    assert hub.log == []
    done = run(hub, home, "inspect", "hf://org/adapter", "--json", cwd=tmp_path / "work")
    assert len(done.json["modules"]) == 28
    (here / "adapter_model.safetensors").unlink()  # and an empty one is not passed over either
    hub.clear()
    refused(hub, home, "inspect", "org/adapter", cwd=tmp_path / "work")
    assert hub.log == []


def test_a_typing_mistake_gets_both_readings(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """It may be a path or an id; the error says what became of either, and what is near."""
    small(tmp_path / "work" / "org" / "name")
    found = refused(hub, home, "inspect", "org/nam", cwd=tmp_path / "work")
    assert "no such file or directory" in found["message"]
    assert "Hub" in found["message"]
    assert "org/name" in found["hint"]
    command = ["inspect", "org/name", "--base", "org/bsae"]
    found = refused(hub, home, *command, cwd=tmp_path / "work")
    assert "org/bsae: no such file or directory" in found["message"]
    assert "Hub" in found["message"]


@pytest.mark.parametrize(
    "path",
    ["out/model.safetensors", "out/adapter_model.bin", "./org/adapter", "/org/adapter",
     "org/adapter/sub", "adapter", "../org/adapter", "~/adapter", "org/with space", "out/x.PT"],
)  # fmt: skip
def test_what_can_only_be_a_path_is_not_asked_for(hub: HubServer, warm: Path, path: str) -> None:
    """A file that is not there is told without asking anybody."""
    found = refused(hub, warm, "inspect", path)
    assert (found["error"], hub.log) == ("bad-file", [])
    assert "no such file or directory" in found["message"]
    assert "Hub" not in found["message"]

"""What goes up: once and whole, and comes back as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import call, contents
from helpers.pushing import (
    WEIGHTS,
    add,
    as_json,
    assert_no_commit,
    assert_read_only,
    lora,
    own_commits,
    push,
    states,
)

PULL = """
from huggingface_hub import snapshot_download
print(json.dumps(snapshot_download(sys.argv[1], local_dir=sys.argv[2], revision=sys.argv[3])))
"""


def test_an_adapter_comes_back_as_it_was(
    hub: HubServer, home: Path, adapter: Path, repo: str, tmp_path: Path
) -> None:
    """All files, nested ones and those of odd names too, in one commit; the folder is untouched."""
    add(adapter, "tokenizer.json", '{"model": {"vocab": {"a": 0}}}')
    add(adapter, "samples/deep/er/one.txt", "a\r\nb\n")
    add(adapter, "samples/empty.txt", "")
    add(adapter, "samples/[1] what? 100% *.txt", "odd")
    add(adapter, "samples/ümlaut ★.md", "more")
    add(adapter, "samples/weights.npz", os.urandom(50_000))
    before = contents(adapter)
    done = push(hub, home, adapter, repo)
    assert contents(adapter) == before
    assert done.out.splitlines()[-1].strip() == f"{hub.url}/{repo}"
    (commit,) = own_commits(hub, repo)
    assert set(commit.changed) == before.keys() | {"README.md"}
    assert commit.id in done.out
    call(hub, tmp_path / "other", PULL, repo, str(tmp_path / "pulled"), "main")
    pulled = contents(tmp_path / "pulled")
    pulled = {n: data for n, data in pulled.items() if not n.startswith(".cache/")}
    assert pulled.keys() == before.keys() | {"README.md", ".gitattributes"}
    assert {name: pulled[name] for name in before} == before


def test_a_merged_model_comes_back_and_is_not_sent_twice(
    hub: HubServer, home: Path, merged: Path, repo: str, tmp_path: Path
) -> None:
    """Three shards, index, tokenizer, record: the same bytes. Again: no upload and no commit."""
    add(merged, "1_Pooling/config.json", "{}")
    report = as_json(hub, home, merged, repo)
    assert report["kind"] == "model"
    before = contents(merged)
    call(hub, tmp_path / "other", PULL, repo, str(tmp_path / "pulled"), report["commit"])
    pulled = contents(tmp_path / "pulled")
    assert {name: pulled[name] for name in before} == before
    assert len(own_commits(hub, repo)) == 1
    hub.clear()
    again = as_json(hub, home, merged, repo)
    assert_read_only(hub)
    assert len(own_commits(hub, repo)) == 1
    assert set(states(again).values()) == {"there"}
    assert again["bytes_to_upload"] == 0
    assert again["commit"] == report["commit"] == hub.commits(repo)[0].id
    assert (again["created"], again["card"], again["url"]) == (False, "kept", f"{hub.url}/{repo}")
    said = push(hub, home, merged, repo).out
    assert "none" in said
    assert f"{hub.url}/{repo}" in said


def test_only_what_changed_goes_up(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """One file's bytes; other files here and there stay out of it."""
    large = add(adapter, "large.npz", os.urandom(300_000))
    add(adapter, "notes.txt", "one")
    push(hub, home, adapter, repo)
    hub.add(repo, {"theirs.txt": "of somebody else"})
    hub.clear()
    (adapter / "notes.txt").write_text("two")
    lora(adapter, seed=1)
    report = as_json(hub, home, adapter, repo)
    size = (adapter / WEIGHTS).stat().st_size
    assert states(report)[WEIGHTS] == states(report)["notes.txt"] == "changed"
    assert states(report)["large.npz"] == states(report)["README.md"] == "there"
    assert report["bytes_to_upload"] == size + 3
    assert hub.received("/upload/") == size
    assert hub.received() < size + 10_000
    commit = hub.commits(repo)[0]
    assert commit.changed == (WEIGHTS, "notes.txt")
    assert hub.files(repo)["theirs.txt"] == b"of somebody else"
    assert hub.files(repo)["large.npz"] == large.read_bytes()


def test_renamed_content_is_not_sent_again(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """The Hub knows content by its hash, under whatever name."""
    add(adapter, "a.npz", os.urandom(50_000))
    push(hub, home, adapter, repo)
    hub.clear()
    (adapter / "a.npz").rename(adapter / "b.npz")
    push(hub, home, adapter, repo)
    assert hub.requests("/upload/") == []
    assert hub.files(repo)["b.npz"] == (adapter / "b.npz").read_bytes()


def test_a_file_in_parts(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A large file goes up in parts; a part that broke off and one that met a 500 go up again."""
    data = add(adapter, "large.npz", os.urandom(250_000)).read_bytes()
    hub.chunk_size = 100_000
    try:
        hub.cut("/upload/.*/2[?]", after=60_000)
        hub.fail("/upload/.*/3[?]", 500)
        push(hub, home, adapter, repo)
    finally:
        hub.chunk_size = 1 << 24
    assert hub.files(repo)["large.npz"] == data
    assert len(own_commits(hub, repo)) == 1


@pytest.fixture
def many(adapter: Path) -> Path:
    for i in range(260):
        add(adapter, f"samples/{i // 100}/{i:03}.txt", f"sample {i}")
    return adapter


def test_very_many_files(hub: HubServer, home: Path, many: Path, repo: str) -> None:
    """More than the Hub takes in one commit: all of them arrive, and none twice."""
    add(many, ".DS_Store", "x")
    report = as_json(hub, home, many, repo)
    found = hub.files(repo)
    local = contents(many)
    assert local.pop(".DS_Store")
    assert {name: found[name] for name in local} == local
    assert found.keys() == local.keys() | {"README.md", ".gitattributes"}
    assert report["commit"] == hub.commits(repo)[0].id
    hub.clear()
    assert as_json(hub, home, many, repo)["bytes_to_upload"] == 0
    assert_read_only(hub)


def test_very_many_files_in_a_pull_request(
    hub: HubServer, home: Path, many: Path, repo: str
) -> None:
    """One request holds them all, with the card, and its URL is told."""
    hub.add(repo, {"a.txt": "a"})
    report = as_json(hub, home, many, repo, "--create-pr")
    assert len(hub.commits(repo)) == 1
    assert set(hub.branches(repo)) == {"main", "refs/pr/1"}
    assert contents(many).keys() | {"README.md"} <= hub.files(repo, "refs/pr/1").keys()
    assert report["pull_request"] == report["url"] == f"{hub.url}/{repo}/discussions/1"


def test_one_of_very_many_files_changes_meanwhile(
    hub: HubServer, home: Path, many: Path, repo: str
) -> None:
    """What is said of commits is true."""
    path = many / WEIGHTS
    before = path.read_bytes()
    hub.on("/upload/", lambda: path.write_bytes(before[::-1]))
    done = push(hub, home, many, repo, code=None)
    if done.code == 0:  # it was read before it changed
        assert hub.files(repo)[WEIGHTS] == before
    else:
        assert_no_commit(hub, repo)

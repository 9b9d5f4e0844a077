"""merge --push: shard by shard from Hub to Hub, in one commit, with little disk."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import contents, paths, refused, run
from helpers.places import FIXTURES
from helpers.shard_pushes import (
    COUNT,
    INPUTS,
    LARGE,
    SHARDS,
    assert_pushed,
    cached,
    fetched,
    heavy,
    puts,
    staging,
    through,
    weights_in,
)
from huggingface_hub import ModelCard, ModelCardData

import loratool


def test_from_hub_to_hub_with_little_disk(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes], tmp_path: Path
) -> None:
    """The same bytes as a local merge, never more than two shards of each kind on the disk, and
    nothing of them at the end. The card knows where all of it came from."""
    peaks: list[tuple[int, int]] = []

    def watch() -> None:
        found = heavy(home)
        made = [p for p in found if p.suffix == ".safetensors"]
        cached = [p for p in found if "models--org--base" in str(p)]
        peaks.append((len(made), len(cached)))

    def wait() -> None:
        watch()
        time.sleep(1)  # an upload that is slower than all the rest

    for _ in range(3):
        hub.on("^/upload/", wait)
    for _ in range(40):
        hub.on("^/upload/|/commit/loratool|/cdn/org/base|/preupload/", watch)
    done = through(hub, home, repo, "--json")
    assert_pushed(hub, repo, local)
    assert len(peaks) >= 3 * COUNT
    assert max(made for made, _ in peaks) <= 2
    assert max(cached for _, cached in peaks) <= 2
    assert max(made for made, _ in peaks) >= 1  # or the watching is wrong
    assert weights_in(home) == []
    assert not (home / "loratool").exists()
    assert puts(hub) == COUNT
    assert fetched(hub) == SHARDS
    report = done.json
    assert (report["verified"], report["kept"], report["resumed"]) == (True, False, [])
    assert report["pushed"] == f"{hub.url}/{repo}"
    assert report["commit"] == hub.commits(repo)[0].id
    assert [p.name for p in tmp_path.iterdir()] == ["home"]

    card = hub.files(repo)["README.md"].decode()
    data = ModelCard(card).data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert data["base_model"] == ["org/base", "org/adapter"]
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "apache-2.0"
    record = json.loads(hub.files(repo)["loratool.json"])
    for name, entry in (("org/base", record["base"]), ("org/adapter", record["adapters"][0])):
        commit = hub.commits(name)[0].id
        assert (entry["repo"], entry["revision"]) == (name, commit)
        assert commit in card
    for word in (f'"{repo}"', "39 tensors", f"{COUNT} files"):
        assert word in card


def test_other_shards_than_the_base_read_each_of_its_files_once(
    hub: HubServer, home: Path, repo: str, base: Path, tmp_path: Path
) -> None:
    """With --max-shard-size a base's file is needed by several shards, and is kept as long."""
    through(hub, home, repo, "--max-shard-size", "50kB")
    assert fetched(hub) == SHARDS
    assert weights_in(home) == []
    loratool.merge(base, FIXTURES / "adapter", tmp_path / "local", max_shard_size="50kB")
    wanted = contents(tmp_path / "local")
    shards = [name for name in wanted if name.endswith(".safetensors")]
    assert len(shards) > COUNT
    pushed = hub.files(repo)
    assert {name: pushed[name] for name in shards} == {name: wanted[name] for name in shards}


def test_what_was_cached_before_stays(hub: HubServer, home: Path, repo: str, base: Path) -> None:
    """Shards that lay in the cache are used and left; those of this run go. Also where another
    snapshot of the base has them, with which the cache shares its content."""
    hub.add("org/moving", dict(paths(base)))
    old = cached(hub, home, "org/moving", "*-00002-*", "*-00005-*")
    before = contents(old)
    assert len(before) == 2
    hub.add("org/moving", {"README.md": "A later commit.\n"})
    hub.clear()
    run(hub, home, "merge", "org/moving", "org/adapter", "--push", repo, "--no-keep")
    whole = [r for r in hub.requests("/cdn/org/moving", "GET") if r.sent > LARGE]
    assert len(whole) == COUNT - 2
    assert contents(old) == before
    assert len(weights_in(home)) == 2
    assert not [p for p in home.rglob("*") if p.is_symlink() and not p.exists()]


def test_a_whole_base_in_the_cache_stays(hub: HubServer, home: Path, repo: str) -> None:
    """The plain case: nothing is downloaded, nothing is removed."""
    old = cached(hub, home, "org/base", "*")
    before = contents(old)
    hub.clear()
    through(hub, home, repo)
    assert fetched(hub) == []
    assert contents(old) == before


def test_a_base_of_this_disk_stays(
    hub: HubServer, home: Path, repo: str, base: Path, local: dict[str, bytes]
) -> None:
    """--no-keep removes its own files only."""
    before = contents(base)
    run(hub, home, "merge", base, FIXTURES / "adapter", "--push", repo, "--no-keep")
    assert contents(base) == before
    files = hub.files(repo)
    assert [name for name in SHARDS if files[name] != local[name]] == []
    assert str(base.parent) not in files["README.md"].decode() + files["loratool.json"].decode()
    assert weights_in(home) == []


def test_kept_and_pushed(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes], tmp_path: Path
) -> None:
    """OUT is complete, the Hub has the same; what somebody else wrote there stays. Once more:
    nothing is uploaded, and no commit is made."""
    hub.add(repo, {"README.md": "---\ntags: [mine]\n---\nWords of a person.\n"})
    hub.on("^/upload/", lambda: hub.add(repo, {"notes.txt": "meanwhile"}))
    for _ in range(COUNT - 2):
        hub.on("^/upload/", lambda: None)
    hub.on("^/upload/", lambda: time.sleep(1))  # the last one is on its way for long
    out = tmp_path / "out"
    done = run(hub, home, *INPUTS, "-o", out, "--push", repo)
    assert f"{hub.url}/{repo}" in done.out.splitlines()[-1]
    kept = contents(out)
    kept.pop("README.md", None)
    assert kept == local
    files = hub.files(repo)
    assert {name: files[name] for name in local} == local
    assert files["notes.txt"] == b"meanwhile"
    card = files["README.md"].decode()
    assert "Words of a person.\n" in card
    assert "mine" in card
    assert len(hub.commits(repo)) == 3
    assert staging(hub, repo) == []
    hub.clear()
    again = run(hub, home, *INPUTS, "-o", out, "--push", repo, "--overwrite", "--json").json
    assert puts(hub) == 0
    assert len(hub.commits(repo)) == 3
    assert again["commit"] == hub.commits(repo)[0].id
    assert staging(hub, repo) == []


def test_weights_of_before_are_told(hub: HubServer, home: Path, repo: str) -> None:
    """A model.safetensors that is there already would be loaded in place of the shards."""
    hub.add(repo, {"model.safetensors": b"old weights"})
    for options in ([], ["--overwrite"]):
        done = through(hub, home, repo, *options, code=1)
        assert "model.safetensors" in done.err
    assert not hub.received("/upload/")
    assert hub.files(repo) == {"model.safetensors": b"old weights"}


def test_a_reversible_merge(hub: HubServer, home: Path, repo: str, tmp_path: Path) -> None:
    """The undo file goes along, and what was pushed can be taken back from the Hub."""
    out = tmp_path / "out"
    run(hub, home, *INPUTS, "-o", out, "--push", repo, "--private", "--reversible")
    assert hub.is_private(repo)
    files = hub.files(repo)
    kept = contents(out)
    assert {name: files[name] for name in kept if name != "README.md"} == {
        name: data for name, data in kept.items() if name != "README.md"
    }
    assert "loratool/undo.safetensors" in files
    run(hub, home, "unmerge", repo, "org/adapter", "-o", tmp_path / "back")
    back, base = contents(tmp_path / "back"), hub.files("org/base")
    assert [name for name in SHARDS if back[name] != base[name]] == []


def test_dry_run(hub: HubServer, home: Path, repo: str, tmp_path: Path) -> None:
    """Nothing is written, here or there; also without a login."""
    shown = through(hub, home, repo, "--dry-run").out
    assert f"{hub.url}/{repo}" in shown
    assert "nothing was written" in shown
    out = tmp_path / "out"
    command = [*INPUTS, "-o", out, "--push", repo, "--private", "--dry-run", "--json"]
    report = run(hub, home, *command).json
    assert report["pushed"] == f"{hub.url}/{repo}"
    hub.add(f"{repo}-there", {"a.txt": "a"})
    through(hub, home, f"{repo}-there", "--dry-run", token=None)
    assert {r.method for r in hub.log} <= {"GET", "HEAD"}
    assert fetched(hub) == []
    assert not hub.exists(repo)
    assert len(hub.commits(f"{repo}-there")) == 1
    assert not out.exists()
    assert not (home / "loratool").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--no-keep"], "--push"),
        (["--no-keep", "-o", "{out}"], "--push"),
        (["--no-keep", "-o", "{out}", "--push", "org/x"], "-o"),
        (["--push", "org/x"], "-o"),
        ([], "-o"),
        (["-o", "{out}", "--private"], "--push"),
        (["--push", "org/x", "--no-keep", "--reversible"], "--reversible"),
        (["--push", "name", "--no-keep"], "org/name"),
        (["--push", "", "-o", "{out}"], "org/name"),
        (["--push", "org/x@next", "-o", "{out}"], "revision"),
    ],
)
def test_mistakes(
    hub: HubServer, home: Path, tmp_path: Path, options: list[str], word: str
) -> None:
    """Options that contradict each other: exit 2, before the Hub is asked to write anything."""
    filled = [option.format(out=tmp_path / "out") for option in options]
    found = refused(hub, home, *INPUTS, *filled, code=2)
    assert word in f"{found['message']} {found['hint']}"
    assert {r.method for r in hub.log} <= {"GET", "HEAD"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", [None, "hf_wrong", "hf_reader"])
def test_logins_that_do_not_do(hub: HubServer, home: Path, repo: str, token: str | None) -> None:
    """Exit 4 with the command to run, before the base is downloaded."""
    done = through(hub, home, repo, token=token, code=4)
    assert "hf auth login" in done.err
    assert fetched(hub) == []
    assert not hub.exists(repo)
    assert weights_in(home) == []


def test_private_on_a_public_repository(hub: HubServer, home: Path, repo: str) -> None:
    """Refused, as with push."""
    hub.add(repo, {"a.txt": "a"})
    done = through(hub, home, repo, "--private", code=2)
    assert "public" in done.err
    assert len(hub.commits(repo)) == 1
    assert fetched(hub) == []

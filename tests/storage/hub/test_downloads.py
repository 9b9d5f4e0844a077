"""Merging from the Hub: the right bytes, no more than needed, again from the cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import forked
from helpers.hub import HubServer
from helpers.hub_runs import (
    SIDE,
    assert_same_output,
    call,
    contents,
    downloads,
    paths,
    refused,
    run,
    small,
)
from helpers.places import FIXTURES
from safetensors.torch import load_file, save_file


def test_a_merge_from_ids_equals_one_from_paths(
    merged: tuple[Path, Path, list[str], int], stock: HubServer
) -> None:
    """Shards, index, tokenizer, side files and undo file; the record adds repository and commit."""
    local, remote, _, _ = merged
    record = assert_same_output(remote, local)
    for entry, name in ((record["base"], "base"), (record["adapters"][0], "adapter")):
        assert (entry["repo"], entry["revision"]) == (
            f"org/{name}", stock.branches(f"org/{name}")["main"],
        )  # fmt: skip
    files = contents(remote)
    assert "chat_template.jinja" not in files  # it is of the base's tokenizer
    assert files["extra/words.txt"] == SIDE["extra/words.txt"]
    assert "special_tokens_map.json" in files  # the adapter's
    assert not [name for name in files if "checkpoint" in name or name.endswith((".md", ".onnx"))]


def test_only_what_is_needed_is_downloaded(
    merged: tuple[Path, Path, list[str], int], places: Path
) -> None:
    """Every shard once; no other formats, no training runs, no model card."""
    _, remote, names, sent = merged
    shards = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    assert names == ["adapter_model.safetensors", *shards]
    cache = paths(remote.parent / "home")
    for name in ("README.md", "onnx", "checkpoint-10", "pytorch_model.bin", ".gitattributes"):
        assert not [path for path in cache if f"/{name}" in path.partition("snapshots")[2]]
    weights = sum((places / "base" / name).stat().st_size for name in shards)
    assert sent < weights + 293_800 + 4 * 101_000 + 60_000


def test_the_second_run_downloads_no_weights(
    merged: tuple[Path, Path, list[str], int], hub: HubServer, tmp_path: Path
) -> None:
    """The cache is found again, in the standard place and under the commit."""
    home = merged[1].parent / "home"
    run(hub, home, "merge", "org/base", "org/adapter", "-o", tmp_path / "o", "--reversible")
    assert contents(tmp_path / "o") == contents(merged[1])
    assert hub.requests("/cdn/") == []
    assert hub.sent() < 30_000
    snapshots = home / "hub" / "models--org--base" / "snapshots"
    assert (snapshots / hub.branches("org/base")["main"] / "config.json").is_file()


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "the Hub is down"])
def test_without_a_hub_a_filled_cache_gives_the_same_bytes(
    merged: tuple[Path, Path, list[str], int], hub: HubServer, tmp_path: Path, offline: str
) -> None:
    """What was merged once can be merged on a train, by the same command."""
    home, out = merged[1].parent / "home", tmp_path / "o"
    settings = {"HF_HUB_OFFLINE": "1"} if offline == "HF_HUB_OFFLINE" else {}
    down = {} if settings else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = ["merge", "org/base", "org/adapter", "-o", out, "--reversible"]
    run(hub, home, *command, **settings, **down)
    assert hub.log == []
    assert contents(out) == contents(merged[1])


def test_the_client_left_a_cache_that_is_used(hub: HubServer, home: Path) -> None:
    """What `hf download` fetched is not fetched again, and serves offline."""
    code = "from huggingface_hub import snapshot_download; snapshot_download('org/adapter')"
    env = hub.environment(home)
    assert forked.run_snippet(code, [], env, home.parent).code == 0
    hub.clear()
    run(hub, home, "inspect", "org/adapter")
    assert hub.requests("/cdn/") == []
    run(hub, home, "inspect", "org/adapter", HF_HUB_OFFLINE="1")


def test_offline_by_branch_and_by_commit(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """A revision that was read online is known offline, by the name it was given then."""
    hub.add("org/offline", dict(paths(small(tmp_path / "a", alpha=8))))
    hub.add("org/offline", dict(paths(small(tmp_path / "b", alpha=24))), branch="dev")
    commit = hub.branches("org/offline")["dev"]
    for name in ("org/offline", "org/offline@dev"):
        run(hub, home, "inspect", name)
    for name, alpha in (("org/offline", 8), ("org/offline@dev", 24), (f"org/offline@{commit}", 24)):
        told = run(hub, home, "inspect", name, "--json", HF_HUB_OFFLINE="1").json
        assert told["modules"][0]["alpha"] == alpha, name
    found = refused(hub, home, "inspect", "org/offline@other", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in found["message"] + found["hint"]


def test_a_look_at_headers_leaves_what_is_complete_in_use(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    """A whole base is in the cache; a newer commit of it is looked at; offline the whole one is
    used."""
    hub.add("org/moving", {n: hub.files("org/base")[n] for n in hub.files("org/base")})
    command = ["merge", "org/moving", "org/adapter"]
    run(hub, home, *command, "-o", tmp_path / "one")
    hub.add("org/moving", {"config.json": hub.files("org/base")["config.json"] + b"\n"})
    run(hub, home, "inspect", "org/adapter", "--base", "org/moving")
    run(hub, home, *command, "-o", tmp_path / "two", HF_HUB_OFFLINE="1")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


_LET_GO = """
import os, shutil
from pathlib import Path
from loratool.storage.hub.folder import locate
folder, name = locate("org/base").folder, "model-00001-of-00003.safetensors"
path, blobs = folder.path / name, folder.path.parents[1] / "blobs"
folder.fetch([name]); blob = path.resolve()
seen = [blob.is_file()]
other = folder.path.with_name("0" * 40); other.mkdir()
(other / name).symlink_to(os.path.relpath(blob, other))
folder.let_go([name]); seen += [os.path.lexists(path), (other / name).is_file()]
shutil.rmtree(other)
second = locate("org/base").folder
second.fetch([name]); second.let_go([name]); seen.append(blob.is_file())
blob.unlink()
third = locate("org/base").folder
third.fetch([name]); third.let_go([name]); seen += [blob.is_file(), os.path.lexists(path)]
print(json.dumps(seen))
"""


def test_only_what_was_brought_is_given_back(hub: HubServer, home: Path) -> None:
    """A file that another commit links to stays, and one that was there before; what this run
    alone downloaded goes."""
    assert call(hub, home, _LET_GO) == [True, False, True, True, False, False]


def test_offline_without_a_cache_is_one_clear_error(hub: HubServer, home: Path) -> None:
    """It says that the cache has it not, and why nobody was asked."""
    found = refused(hub, home, "inspect", "org/adapter", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in found["message"]
    assert "org/adapter" in found["message"]
    assert hub.log == []


def test_offline_with_headers_alone_says_what_is_missing(hub: HubServer, home: Path) -> None:
    """Looking at a base from afar leaves its config in the cache, which is no base."""
    run(hub, home, "inspect", "org/adapter", "--base", "org/base")
    command = ["merge", "org/base", "org/adapter", "-o", home / "out"]
    found = refused(hub, home, *command, HF_HUB_OFFLINE="1")
    assert "org/base" in found["message"]
    assert "HF_HUB_OFFLINE" in found["message"] + found["hint"]
    assert not (home / "out").exists()


@pytest.mark.parametrize("options", [[], ["--reversible"]])
def test_a_dry_run_of_a_merge(hub: HubServer, home: Path, places: Path, options: list[str]) -> None:
    """It plans from headers; only to tell the size of the undo file it must read weights."""
    out = home / "out"
    command = ["-o", out, "--dry-run", "--json", *options]
    told = run(hub, home, "merge", "org/base", "org/adapter", *command).json
    expected = run(hub, home, "merge", places / "base", places / "adapter", *command).json
    if not options:
        assert downloads(hub, "org/base") == []
        assert hub.sent("/cdn/org/base") < 3 * 101_000
    assert (told["base"], told["adapters"]) == ("org/base", ["org/adapter"])
    # What float16 loses is sampled only from weights that are on this disk.
    gone = {"base", "adapters", "seconds", "bytes_free", "range_loss"}
    assert {k: v for k, v in told.items() if k not in gone} == {
        k: v for k, v in expected.items() if k not in gone
    }
    assert not out.exists()


@pytest.mark.parametrize("verb", ["merge", "verify", "compare"])
def test_what_does_not_fit_fails_before_the_base_is_downloaded(
    hub: HubServer, home: Path, tmp_path: Path, verb: str
) -> None:
    """Headers tell it; a base may be a hundred gigabytes."""
    hub.add("org/misfit", dict(paths(small(tmp_path / "misfit"))))
    command = {
        "merge": ["merge", "org/base", "org/misfit", "-o", home / "out"],
        "verify": ["verify", "org/tuned", "--base", "org/base", "org/misfit"],
        "compare": ["compare", "org/misfit", "org/misfit", "--base", "org/base"],
    }[verb]
    done = run(hub, home, *command, "--json", code=None)
    assert done.code == 1
    assert json.loads(done.err)["error"] == "no-match"
    assert downloads(hub, "org/(base|tuned)") == []
    assert not (home / "out").exists()


@pytest.mark.parametrize("how", ["kept", "no-keep"])
def test_a_large_file_whose_download_breaks_off_goes_on_where_it_was(
    hub: HubServer, home: Path, tmp_path: Path, how: str
) -> None:
    """The library asks for the rest of it, also where shards are fetched one by one."""
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "base", base)
    name = "model-00003-of-00003.safetensors"
    state = load_file(base / name) | {"padding": torch.ones(25_000_000 // 2, dtype=torch.bfloat16)}
    save_file(state, base / name, {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["padding"] = name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("org/large", dict(paths(base)))
    hub.cut(f"/cdn/.*filename={name}", after=12_000_000)
    push = ["--push", "org/result", "--no-keep"] if how == "no-keep" else ["-o", tmp_path / "out"]
    run(hub, home, "merge", "org/large", "org/adapter", *push)
    run(hub, home, "merge", base, FIXTURES / "adapter", "-o", tmp_path / "local")
    wanted = (tmp_path / "local" / name).read_bytes()
    made = hub.files("org/result") if how == "no-keep" else contents(tmp_path / "out")
    assert made[name] == wanted
    ranges = [r.range for r in hub.requests(rf"/cdn/.*filename={name}", "GET")]
    assert f"bytes={10 << 20}-" in ranges  # what came whole of it is not asked for again
    whole = (base / name).stat().st_size
    assert hub.sent(rf"/cdn/.*filename={name}") < 1.2 * whole

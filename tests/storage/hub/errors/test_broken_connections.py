"""What goes wrong between here and the Hub, and files that are not whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import contents, paths, refused, run, small
from helpers.places import FIXTURES


def assert_nothing_left(folder: Path) -> None:
    """No output and no leftovers beside it."""
    assert [p.name for p in folder.iterdir() if p.name != "home"] == []


@pytest.mark.parametrize("verb", ["inspect", "merge"])
def test_nobody_answers(hub: HubServer, home: Path, tmp_path: Path, verb: str) -> None:
    """A Hub that is down is one clear error, soon, with its address and the repository."""
    nowhere = "http://127.0.0.1:9"
    command = ["inspect", "org/adapter"]
    if verb == "merge":
        command = ["merge", "org/base", "org/adapter", "-o", str(tmp_path / "out")]
    started = time.monotonic()
    found = refused(hub, home, *command, HF_ENDPOINT=nowhere)
    assert time.monotonic() - started < 10
    assert nowhere in found["message"]
    assert "network" in found["hint"]
    assert_nothing_left(tmp_path)


_ONCE: dict[str, Callable[[HubServer], None]] = {
    "500-listing": lambda hub: hub.fail("/api/models/org/adapter", 500),
    "503-listing": lambda hub: hub.fail("/api/models/org/adapter", 503),
    "429-listing": lambda hub: hub.fail("/api/models/", 429, headers={"Retry-After": "1"}),
    "500-metadata": lambda hub: hub.fail("/resolve/.*adapter_config", 500, method="HEAD"),
    "500-config": lambda hub: hub.fail("/resolve/.*adapter_config", 500, method="GET"),
    "500-range": lambda hub: hub.fail("/cdn/", 500),
    "429-range": lambda hub: hub.fail("/cdn/", 429, headers={"Retry-After": "1"}),
    "429-metadata": lambda hub: hub.fail("/resolve/", 429, headers={"Retry-After": "1"}),
    "cut-listing": lambda hub: hub.cut("/api/models/org/adapter", 100),
    "cut-config": lambda hub: hub.cut("/resolve/.*adapter_config", 100),
    "cut-range": lambda hub: hub.cut("/cdn/", 50_000),
    "reset-range": lambda hub: hub.cut("/cdn/", 50_000, reset=True),
    "cut-weights": lambda hub: hub.cut("/cdn/", 150_000),
    "reset-weights": lambda hub: hub.cut("/cdn/", 150_000, reset=True),
}


@pytest.mark.parametrize("fault", _ONCE)
def test_one_fault(hub: HubServer, home: Path, tmp_path: Path, fault: str) -> None:
    """Retried to the right bytes, or one clear error and nothing written; without noise."""
    out = tmp_path / "out"
    _ONCE[fault](hub)
    command = ["resize", "org/adapter", "--rank", "8", "-o", out, "--json"]
    done = run(hub, home, *command, code=None)
    if done.code:
        assert json.loads(done.err).keys() == {"error", "message", "hint"}
        assert "org/adapter" in done.err
        assert_nothing_left(tmp_path)
    else:
        assert done.err == ""
    # Whatever became of it, the same command does it now, from the same cache.
    hub.clear()
    run(hub, home, *command, "--overwrite")
    snapshot = next((home / "hub/models--org--adapter/snapshots").iterdir())
    stored = hub.files("org/adapter")
    assert contents(snapshot) == {name: stored[name] for name in contents(snapshot)}


def test_a_fault_that_stays(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """A download that never gets on is one clear error, with no output and no half a file."""
    hub.cut("/cdn/org/base.*model-00002", 150_000, times=999)  # ranges of headers are shorter
    started = time.monotonic()
    found = refused(hub, home, "merge", "org/base", "org/adapter", "-o", tmp_path / "out")
    assert time.monotonic() - started < 30
    assert "org/base" in found["message"]
    assert_nothing_left(tmp_path)
    snapshot = next((home / "hub/models--org--base/snapshots").iterdir())
    assert not (snapshot / "model-00002-of-00003.safetensors").exists()


def test_a_truncated_shard(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """Storage that holds less than was promised is refused, and forgotten when it is whole."""
    hub.add("org/short", dict(paths(FIXTURES / "base")))
    name = "model-00002-of-00003.safetensors"
    hub.truncate("org/short", name, 300_000)
    out = tmp_path / "out"
    found = refused(hub, home, "merge", "org/short", "org/adapter", "-o", out)
    assert "org/short" in found["message"]
    assert name in found["message"]
    assert_nothing_left(tmp_path)
    content = hub.repos["org/short"].find("main").files[name]
    content.available = content.size
    run(hub, home, "merge", "org/short", "org/adapter", "-o", out, "--dtype", "base")
    run(hub, home, "merge", FIXTURES / "base", FIXTURES / "adapter", "-o", tmp_path / "local",
        "--dtype", "base")  # fmt: skip
    assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS pointer"),
        (b"<!doctype html><html></html>", "web page"),
        (b"", "empty"),
        ((10_000).to_bytes(8, "little") + b"{", "truncated"),
        (b"\x10\0\0\0\0\0\0\0{", "truncated"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_damaged_files_are_named_by_their_id(
    hub: HubServer, home: Path, data: bytes, words: str
) -> None:
    """What is wrong with a remote file is told as of a local one, under the name that was given."""
    hub.add("org/damaged", {"adapter_model.safetensors": data, "adapter_config.json": "{}"})
    found = refused(hub, home, "inspect", "org/damaged")
    assert words in found["message"]
    assert "org/damaged/adapter_model.safetensors" in found["message"]


def test_a_truncated_header_in_storage(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """A range that comes back shorter than asked is no header."""
    hub.add("org/cropped", dict(paths(small(tmp_path / "a"))))
    hub.truncate("org/cropped", "adapter_model.safetensors", 100)
    found = refused(hub, home, "inspect", "org/cropped")
    assert "org/cropped" in found["message"]


def test_one_run_reads_one_commit(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """Somebody pushes while a command runs: config and weights are of the commit it began with."""
    before, after = small(tmp_path / "before", 3), small(tmp_path / "after", 9, seed=4)
    commit = hub.add("org/pushed", dict(paths(before)))
    hub.on("/resolve/", lambda: hub.add("org/pushed", dict(paths(after))))
    out = tmp_path / "out"
    run(hub, home, "resize", "org/pushed", "--rank", "2", "-o", out)
    run(hub, home, "resize", before, "--rank", "2", "-o", tmp_path / "local")
    assert len(hub.commits("org/pushed")) == 2
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    record = json.loads((out / "loratool.json").read_text())
    assert record["adapters"][0]["revision"] == commit


def test_a_listed_file_that_is_not_there(hub: HubServer, home: Path) -> None:
    """404 for a file that the listing has names the repository."""
    hub.fail("/resolve/.*adapter_model", 404, times=9, message="Entry not found")
    found = refused(hub, home, "inspect", "org/adapter")
    assert "org/adapter" in found["message"]
    assert found["error"] == "hub"


def test_a_repository_without_files(hub: HubServer, home: Path) -> None:
    """What a first push that failed leaves behind."""
    hub.add("org/empty", {".gitattributes": "*.bin filter=lfs\n"})
    found = refused(hub, home, "inspect", "org/empty")
    assert "the repository is empty" in found["message"]

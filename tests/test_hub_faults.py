"""What goes wrong between here and the Hub: logins, broken connections, files that are not whole.

Each ends well after a retry, or with one clear error: no traceback, no noise, no half an output.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES
from hub import HubServer
from test_hub_read import contents, downloads, paths, refused, run, small

LOGIN = "hf auth login"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    adapter = dict(paths(FIXTURES / "adapter"))
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add("org/base", dict(paths(FIXTURES / "base")))
        server.add("org/adapter", adapter)
        server.add("org/private", adapter, private=True)
        server.add("org/gated", adapter, gated=True)
        server.add("org/gated-base", dict(paths(FIXTURES / "base")), gated=True)
        yield server


def assert_nothing_left(folder: Path) -> None:
    """No output and no leftovers beside it."""
    assert [p.name for p in folder.iterdir() if p.name != "home"] == []


# --- logins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "token", "code", "words"),
    [
        ("org/private", None, 4, ["not logged in", LOGIN]),
        ("org/private", "hf_wrong_one", 4, ["token", LOGIN]),
        ("org/private", "hf_reader", 1, ["org/private", "not for your account"]),
        ("org/adapter", "hf_wrong_one", 4, ["token", LOGIN]),
        ("org/gated", None, 4, ["gated", "/org/gated", LOGIN]),
        ("org/gated", "hf_wrong_one", 4, ["token", LOGIN]),
        ("org/missing", None, 4, ["no such repository", "private", LOGIN]),
        ("org/missing", "hf_writer", 1, ["no such repository"]),
    ],
)
def test_logins(
    hub: HubServer, home: Path, repo: str, token: str | None, code: int, words: list[str]
) -> None:
    """A login that is missing or not known is exit code 4 and says what to run; the rest is 1."""
    found = refused(hub, home, "inspect", repo, token=token, code=code)
    assert found["error"] == ("hub-login" if code == 4 else "hub")
    for word in words:
        assert word in f"{found['message']} {found['hint']}"


def test_gated_and_not_let_in(hub: HubServer, home: Path) -> None:
    """Who is logged in learns that it is gated and where to ask; logging in again would not do."""
    done = run(hub, home, "inspect", "org/gated", "--json", token="hf_reader", code=None)
    found = json.loads(done.err)
    assert done.code in (1, 4)
    assert "gated" in found["message"]
    assert f"{hub.url}/org/gated" in found["message"]
    assert "account" in found["hint"]


def test_errors_of_a_base_name_the_base(hub: HubServer, home: Path) -> None:
    """Of two repositories the one that was refused is named."""
    command = ["merge", "org/gated-base", "org/adapter", "-o", home / "out"]
    found = refused(hub, home, *command, token=None, code=4)
    assert "org/gated-base" in found["message"]
    assert LOGIN in found["hint"]
    assert not (home / "out").exists()


@pytest.mark.parametrize("where", ["HF_TOKEN", "stored", "HF_TOKEN_PATH"])
def test_a_login_is_used(hub: HubServer, home: Path, where: str) -> None:
    """From the environment or as `hf auth login` stores it; storage never sees it."""
    home.mkdir()
    settings = {}
    if where == "stored":
        (home / "token").write_text("hf_writer\n")
    elif where == "HF_TOKEN_PATH":
        (home / "elsewhere").write_text("hf_writer")
        settings["HF_TOKEN_PATH"] = str(home / "elsewhere")
    token = "hf_writer" if where == "HF_TOKEN" else None
    for repo in ("org/private", "org/gated"):
        done = run(hub, home, "inspect", repo, token=token, **settings)
        assert "hf_writer" not in done.out + done.err
    assert {r.token for r in hub.requests("/api/|/resolve/")} == {"hf_writer"}
    assert {r.token for r in hub.requests("/cdn/")} == {None}


def test_forbidden_is_a_login_error(hub: HubServer, home: Path) -> None:
    """A token that may not read (403) is told so, in the words of the Hub."""
    hub.fail("/resolve/.*adapter_model", 403, times=9, message="Token lacks the right to read")
    found = refused(hub, home, "inspect", "org/adapter", code=4)
    assert "Token lacks the right to read" in found["message"]
    assert LOGIN in found["hint"]


# --- broken connections -------------------------------------------------------------------------


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


# --- where the cache lies -----------------------------------------------------------------------


def test_a_repository_without_files(hub: HubServer, home: Path) -> None:
    """What a first push that failed leaves behind."""
    hub.add("org/empty", {".gitattributes": "*.bin filter=lfs\n"})
    found = refused(hub, home, "inspect", "org/empty")
    assert "the repository is empty" in found["message"]


def test_a_home_that_cannot_be_made(hub: HubServer, tmp_path: Path) -> None:
    """HF_HOME below a file: one clear error that names the place, not a traceback."""
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "home")
    command = ["resize", "org/adapter", "--rank", "8", "-o", tmp_path / "out"]
    found = refused(hub, tmp_path / "home", *command, HF_HOME=place)
    assert place in found["message"]


@pytest.mark.parametrize(("verb", "size"), [("resize", "200k"), ("merge", "1000k")])
def test_a_full_disk_under_the_cache(
    hub: HubServer, disk: Callable[[str], Path], tmp_path: Path, verb: str, size: str
) -> None:
    """No room for what is downloaded is told as such, and nothing is written."""
    place = disk(f"size={size}")
    out = tmp_path / "out"
    command = {
        "resize": ["resize", "org/adapter", "--rank", "8", "-o", out],
        "merge": ["merge", "org/base", "org/adapter", "-o", out],
    }[verb]
    found = refused(hub, tmp_path / "home", *command, HF_HOME=str(place / "home"))
    assert "are free at the download cache" in found["message"]
    large = "/cdn/org/base" if verb == "merge" else "/cdn/"
    assert not [r for r in hub.requests(large, "GET") if r.range is None]  # told beforehand
    assert "printed" not in found["message"]
    assert not out.exists()


def test_the_cache_is_where_the_environment_says(hub: HubServer, home: Path) -> None:
    """HF_HUB_CACHE moves it, as for every program that uses the Hub."""
    place = home / "other"
    run(hub, home, "inspect", "org/adapter", HF_HUB_CACHE=str(place))
    assert (place / "models--org--adapter" / "snapshots").is_dir()
    assert not (home / "hub").exists()
    hub.clear()
    run(hub, home, "inspect", "org/adapter", HF_HUB_CACHE=str(place))
    assert downloads(hub) == []


# --- quiet --------------------------------------------------------------------------------------


def test_a_download_is_silent_in_a_pipe(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """stderr is for warnings: no bar, no word about a missing token, no telemetry."""
    for token in (None, "hf_writer"):
        done = run(hub, home / str(token), "inspect", "org/adapter", token=token)
        assert done.err == ""
        assert done.out


def on_terminal(command: list[str], env: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Run a command whose stderr is a terminal of 100 columns: exit code, and what it shows."""
    shown, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (30, 100))
    with subprocess.Popen(
        command, env=env, cwd=cwd, stdin=terminal, stdout=subprocess.DEVNULL, stderr=terminal
    ) as child:
        os.close(terminal)
        seen = b""
        try:
            while piece := os.read(shown, 65536):
                seen += piece
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(shown)
    return child.returncode, seen.decode(errors="replace")


@pytest.mark.parametrize("options", ["", "-q", "--json"])
def test_bars_are_for_terminals_and_not_for_the_quiet(
    hub: HubServer, home: Path, tmp_path: Path, options: str
) -> None:
    """On a terminal a download above 10 MB shows how far it is, unless asked to be quiet."""
    from test_hub_read import Q, factors, sparse

    folder = tmp_path / "a"
    sparse(folder / "adapter_model.safetensors", factors([Q], 100_000, 100_000, 16), "F32")
    shutil.copy(FIXTURES / "adapter" / "adapter_config.json", folder)
    hub.add("org/bars", dict(paths(folder)))
    home.mkdir()
    command = [sys.executable, "-m", "loratool", "inspect", "org/bars", *options.split()]
    code, seen = on_terminal(command, {**hub.environment(home), "TERM": "xterm"}, home)
    assert code == 0
    assert downloads(hub) == ["adapter_model.safetensors"]
    assert ("Downloading" in seen) == (options == "")

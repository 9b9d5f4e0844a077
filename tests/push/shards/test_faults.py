"""merge --push over broken lines, and beside others who write."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.digests import blake3_of
from helpers.hub import HubServer
from helpers.hub_runs import call, contents, paths, refused, run
from helpers.outcomes import beside
from helpers.places import FIXTURES
from helpers.shard_pushes import (
    COUNT,
    INPUTS,
    LARGE,
    SHARDS,
    assert_pushed,
    fetched,
    own_commits,
    puts,
    staging,
    through,
    weights_in,
)


def test_faults_that_pass(hub: HubServer, home: Path, repo: str, local: dict[str, bytes]) -> None:
    """Broken uploads and downloads, 500s, a 429, and lost answers of commits: all in one run."""
    hub.cut("^/upload/", after=50_000)
    hub.cut("/cdn/org/base.*00003-of", after=100_000)
    hub.fail("^/upload/", 500, method="PUT")
    hub.fail("/objects/batch", 429, headers={"Retry-After": "1"})
    hub.fail("/preupload/", 500)
    hub.cut("/commit/loratool", after=0, method="POST", side="response")
    hub.cut("/commit/main", after=0, method="POST", side="response")
    done = through(hub, home, repo)
    assert done.err.strip() == ""
    assert_pushed(hub, repo, local)
    assert weights_in(home) == []


def test_a_commit_of_a_shard_that_fails(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes]
) -> None:
    """Whether tried again or told: at the end each shard was uploaded once."""
    hub.fail("/commit/loratool", 500)
    done = through(hub, home, repo, code=None)
    assert done.code in (0, 1)
    if done.code:
        assert own_commits(hub, repo) == []
        assert weights_in(home / "loratool") == []
        through(hub, home, repo)
    assert puts(hub) <= COUNT + 1
    assert_pushed(hub, repo, local)


def test_uploads_that_never_come_through(
    hub: HubServer, home: Path, repo: str, tmp_path: Path
) -> None:
    """One clear error; main is untouched and nothing stands at OUT, but what is finished waits."""
    hub.fail("^/upload/", 400, times=99, method="PUT")  # which the client does not try again
    out = tmp_path / "out"
    done = run(hub, home, *INPUTS, "-o", out, "--push", repo, code=1)
    assert done.out == ""
    assert done.err.count("error") == 1
    assert "400" in done.err
    assert len(done.err.splitlines()) <= 6
    assert own_commits(hub, repo) == []
    assert not out.exists()
    assert beside(out) == [".out.loratool-work"]
    assert "finished and wait in" in done.err


@pytest.mark.parametrize("how", ["forbidden", "somebody"])
def test_a_last_commit_that_is_refused(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    """OUT is there and whole, the error says so, what it advises works, and nobody's commit is
    lost."""
    strike: dict[str, Callable[[], object]] = {
        "forbidden": lambda: hub.fail("/commit/main", 403, message="No."),
        "somebody": lambda: hub.on(
            "/commit/main", lambda: hub.add(repo, {"notes.txt": "theirs"}), method="POST"
        ),
    }
    hub.on("^/upload/", strike[how])
    out = tmp_path / "out"
    done = run(hub, home, *INPUTS, "-o", out, "--push", repo, code=None)
    assert done.code == (4 if how == "forbidden" else 1)
    assert contents(out) == local
    said = " ".join(done.err.split())
    assert re.sub(r"\s", "", str(out)) in re.sub(r"\s", "", done.err)
    assert "complete" in said
    assert SHARDS[0] not in hub.files(repo)
    assert len(staging(hub, repo)) == 1
    hub.clear()
    run(hub, home, "push", out, repo)
    assert puts(hub) == 0
    files = hub.files(repo)
    assert {name: files[name] for name in local} == local
    assert ("notes.txt" in files) == (how == "somebody")


def test_a_base_that_is_cut_short(hub: HubServer, home: Path, repo: str, base: Path) -> None:
    """Storage that holds less of a shard than it says: refused, and main stays as it is."""
    hub.add("org/short", dict(paths(base)))
    hub.truncate("org/short", SHARDS[4], 150_000)
    command = ["merge", "org/short", "org/adapter", "--push", repo, "--no-keep"]
    found = refused(hub, home, *command)
    assert SHARDS[4] in found["message"] or "org/short" in found["message"]
    assert own_commits(hub, repo) == []
    assert weights_in(home / "loratool") == []


def test_a_branch_whose_account_is_damaged(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes]
) -> None:
    """Somebody edited the staging branch: a shard of it that is not what the account says is made
    anew, and an account that cannot be read is a fresh start or one clear error."""
    hub.fail("/commit/main", 500)
    through(hub, home, repo, code=1)
    (branch,) = staging(hub, repo)
    hub.add(repo, {SHARDS[1]: os.urandom(LARGE), SHARDS[2]: None}, branch=branch)
    hub.clear()
    report = through(hub, home, repo, "--json").json
    assert report["resumed"] == [SHARDS[0], *SHARDS[3:]]
    assert fetched(hub) == SHARDS[1:3]
    assert_pushed(hub, repo, local)
    hub.add(repo, {SHARDS[0]: os.urandom(LARGE)})
    hub.fail("/commit/main", 500)
    through(hub, home, repo, "--overwrite", code=1)
    (branch,) = staging(hub, repo)
    hub.add(repo, {"loratool-progress.json": '{"half'}, branch=branch)
    done = through(hub, home, repo, "--overwrite", "--json")
    assert done.json["resumed"] == []
    assert hub.files(repo)[SHARDS[0]] == local[SHARDS[0]]


def test_a_branch_that_changes_at_the_last_moment(hub: HubServer, home: Path, repo: str) -> None:
    """What comes to main is what was computed, not what is on the branch by then."""

    def spoil() -> None:
        (branch,) = staging(hub, repo)
        hub.add(repo, {SHARDS[0]: os.urandom(LARGE)}, branch=branch)

    hub.on("/preupload/main", spoil)
    done = through(hub, home, repo, code=None)
    files = hub.files(repo)
    if done.code == 0:
        record = json.loads(files["loratool.json"])
        for name, digest in record["shards"].items():
            assert blake3_of(files[name]) == digest, name
    else:
        assert own_commits(hub, repo) == []


def test_a_branch_that_is_spoilt_before_the_end(hub: HubServer, home: Path, repo: str) -> None:
    """A shard that was staged long ago is another one by now: nothing of it comes to main."""

    def spoil() -> None:
        (branch,) = staging(hub, repo)
        hub.add(repo, {SHARDS[0]: os.urandom(LARGE)}, branch=branch)

    for _ in range(COUNT):  # a look before, and one after every shard but the last
        hub.on("/revision/loratool-", lambda: None)
    hub.on("/revision/loratool-", spoil)
    done = through(hub, home, repo, code=1)
    assert "is not what was uploaded" in done.err
    assert own_commits(hub, repo) == []


def test_a_model_that_is_there_is_not_replaced_unasked(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes]
) -> None:
    """As with OUT: --overwrite."""
    through(hub, home, repo)
    hub.clear()
    done = through(hub, home, repo, "--dtype", "bfloat16", code=1)
    assert "--overwrite" in done.err
    assert not hub.received()
    assert_pushed(hub, repo, local)
    through(hub, home, repo, "--dtype", "bfloat16", "--overwrite")


def test_a_login_that_may_not_write_downloads_nothing_large(
    hub: HubServer, home: Path, repo: str, tmp_path: Path
) -> None:
    """It is refused before the base comes, with --no-keep and without."""
    for options in (["--no-keep"], ["-o", tmp_path / "out"]):
        hub.clear()
        done = run(hub, home, *INPUTS, *options, "--push", repo, code=4, HF_TOKEN="hf_reader")
        assert "hf auth login" in done.err
        assert fetched(hub) == []


def test_private_inputs_do_not_become_public(hub: HubServer, home: Path, repo: str) -> None:
    """Of a private adapter no public repository is made unasked."""
    hub.add("org/secret", dict(hub.files("org/adapter")), private=True)
    command = ["merge", "org/base", "org/secret", "--push", repo, "--no-keep"]
    done = run(hub, home, *command, code=2)
    assert "--private" in done.err
    assert not hub.exists(repo)
    run(hub, home, *command, "--private")
    assert hub.is_private(repo)


_FLIPPED = """
import os
from loratool.storage.shardfile import ShardWriter
write = ShardWriter.write
def flip(self, offset, data):
    if self.path.name == sys.argv[2] and offset == 0:
        data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
    write(self, offset, data)
ShardWriter.write = flip
try:
    loratool.merge("org/base", ["org/adapter"], None, push=sys.argv[1], keep=False)
except loratool.LoraToolError as error:
    print(json.dumps([type(error).__name__, error.message]), flush=True)
    os._exit(0)
"""


def test_a_shard_that_is_not_as_computed_is_not_uploaded(
    hub: HubServer, home: Path, repo: str
) -> None:
    """A bit that the disk turned over is seen before the shard goes up."""
    kind, message = call(hub, home, _FLIPPED, repo, SHARDS[1])
    assert kind == "VerifyError"
    assert "read back" in message
    assert own_commits(hub, repo) == []
    (branch,) = staging(hub, repo)
    assert SHARDS[1] not in hub.files(repo, branch)


def test_a_base_that_changed_is_not_resumed_with(
    hub: HubServer, home: Path, repo: str, base: Path, tmp_path: Path
) -> None:
    """A base of this disk has the same headers after more training, and other values."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    command = ["merge", own, FIXTURES / "adapter", "--push", repo, "--no-keep", "--json"]
    hub.fail("/commit/main", 500)
    run(hub, home, *command, code=1)
    path = own / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[-2:] = bytes(2)
    path.write_bytes(data)
    assert run(hub, home, *command).json["resumed"] == []

"""merge --push: shard by shard from Hub to Hub, in one commit, again after it was stopped.

The command line runs in processes of its own against the Hub of `hub.py`; the client is real.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from files import beside
from hub import HubServer
from huggingface_hub import ModelCard, ModelCardData
from test_hub_read import Done, call, contents, paths, refused, run

COUNT = 7
SHARDS = [f"model-{i + 1:05}-of-{COUNT:05}.safetensors" for i in range(COUNT)]
#: Less than the smallest shard, more than any other file of a model or an adapter.
LARGE = 120_000

FETCH = """
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])
print("null")
"""


def split(source: Path, folder: Path) -> Path:
    """The base of the fixtures in seven shards of about one size."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(path))
    folder.mkdir(parents=True)
    parts: list[dict[str, Any]] = [{} for _ in SHARDS]
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        min(parts, key=lambda part: sum(t.nbytes for t in part.values()))[name] = tensor
    index: dict[str, str] = {}
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    assert min((folder / shard).stat().st_size for shard in SHARDS) > LARGE
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split(FIXTURES / "base", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def stock(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add("org/base", dict(paths(base)))
        server.add("org/adapter", dict(paths(FIXTURES / "adapter")))
        yield server


INPUTS = ("merge", "org/base", "org/adapter")


@pytest.fixture(scope="module")
def local(stock: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the merge gives without --push."""
    place = tmp_path_factory.mktemp("local")
    run(stock, place / "home", *INPUTS, "-o", place / "out")
    return contents(place / "out")


def through(hub: HubServer, home: Path, repo: str, *options: object, **more: Any) -> Done:
    """Merge from Hub to Hub."""
    # `python -m` looks for modules in its directory, which must not be HF_HOME.
    more.setdefault("cwd", home.parent)
    return run(hub, home, *INPUTS, "--push", repo, "--no-keep", *options, **more)


def cached(hub: HubServer, home: Path, name: str, *patterns: str) -> Path:
    """Have files of a repository in the cache; gives their folder there."""
    call(hub, home, FETCH, name, *patterns)
    folder = f"models--{name.replace('/', '--')}"
    return home / "hub" / folder / "snapshots" / hub.commits(name)[0].id


def own_commits(hub: HubServer, repo: str) -> list[Any]:
    """The commits on main but the one that made the repository."""
    return hub.commits(repo)[:-1]


def staging(hub: HubServer, repo: str) -> list[str]:
    return [name for name in hub.branches(repo) if name != "main"]


def puts(hub: HubServer) -> int:
    """Uploads of shards."""
    return len([r for r in hub.requests("^/upload/", "PUT") if r.received > LARGE])


def fetched(hub: HubServer) -> list[str]:
    """Shards of the base that were downloaded as a whole."""
    whole = [r for r in hub.requests("/cdn/org/base", "GET") if r.sent > LARGE]
    return sorted(r.path.partition("filename=")[2].partition("&")[0] for r in whole)


def heavy(folder: Path) -> list[Path]:
    """Files that hold the data of a shard: not links, not holes."""
    found = []
    for path in folder.rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:  # it went while we looked
            continue
        if path.is_file() and not path.is_symlink() and state.st_blocks * 512 > LARGE:
            found.append(path)
    return found


def weights_in(home: Path) -> list[str]:
    """What is left of base and result; the adapter stays in the cache as ever."""
    return sorted(p.name for p in heavy(home) if "models--org--adapter" not in str(p))


def assert_pushed(hub: HubServer, repo: str, local: dict[str, bytes]) -> None:
    """The whole model, with a card, in one commit; and no branch but main."""
    files = hub.files(repo)
    assert files.keys() == local.keys() | {"README.md", ".gitattributes"}
    assert [name for name in local if files[name] != local[name]] == []
    (commit,) = own_commits(hub, repo)
    assert set(commit.changed) == local.keys() | {"README.md"}
    assert staging(hub, repo) == []


# --- from Hub to Hub ----------------------------------------------------------------------------


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


# --- what is refused ----------------------------------------------------------------------------


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


# --- stopped, and run again ---------------------------------------------------------------------


def stopped(
    hub: HubServer, home: Path, number: int, at: int, command: list[object]
) -> tuple[int, str]:
    """Send a signal to a merge in the middle of its upload number `at`; exit code and stderr."""
    child: list[subprocess.Popen[str]] = []

    def strike() -> None:
        child[0].send_signal(number)
        child[0].wait(60)

    for _ in range(at - 1):
        hub.on("^/upload/", lambda: None)
    hub.on("^/upload/", strike)
    home.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "loratool", *map(str, command)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child.append(subprocess.Popen(line, env=hub.environment(home), cwd=home.parent, **streams))
    _, errors = child[0].communicate(timeout=120)
    return child[0].returncode, errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes], number: signal.Signals
) -> None:
    """Shards that are on the Hub are not computed, downloaded or uploaded again."""
    command = [*INPUTS, "--push", repo, "--no-keep"]
    code, errors = stopped(hub, home, number, 4, command)
    assert code == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert "interrupted" in errors
        assert not (home / "loratool").exists()
    assert own_commits(hub, repo) == []
    assert len(staging(hub, repo)) == 1
    before = len(weights_in(home / "hub"))
    hub.clear()
    report = through(hub, home, repo, "--json").json
    assert report["resumed"] == SHARDS[:3]
    assert puts(hub) in (COUNT - 3, COUNT - 4)  # the fourth may have come through
    assert not set(SHARDS[:3]) & set(fetched(hub))
    assert_pushed(hub, repo, local)
    assert list((home / "loratool").glob("*")) == []
    # What the first run had downloaded for shards to come may stay; it is not much.
    assert len(weights_in(home)) <= before <= 2


def test_stopped_and_run_again_on_another_machine(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes], tmp_path: Path
) -> None:
    """With an output that is kept all of it is made anew there, but not uploaded again."""
    out = tmp_path / "out"
    code, _ = stopped(hub, home, signal.SIGTERM, 6, [*INPUTS, "-o", out, "--push", repo])
    assert code == 130
    assert not out.exists()
    assert beside(out) == []
    hub.clear()
    run(hub, tmp_path / "other", *INPUTS, "-o", out, "--push", repo)
    assert puts(hub) in (COUNT - 5, COUNT - 6)
    kept = contents(out)
    kept.pop("README.md", None)
    assert kept == local
    assert_pushed(hub, repo, local)


def test_other_merges_do_not_resume_from_each_other(
    hub: HubServer, home: Path, repo: str, local: dict[str, bytes]
) -> None:
    """The last commit fails; then weight, dtype and adapter are others; then the first again.

    Each is what its own options say, and the first goes on where it was: nothing of it is
    downloaded or uploaded again."""
    cached(hub, home, "org/base", "*")
    hub.fail("/commit/main", 500)
    done = through(hub, home, repo, code=1)
    assert "500" in done.err
    assert own_commits(hub, repo) == []
    first = staging(hub, repo)
    assert len(first) == 1
    assert weights_in(home / "loratool") == []
    others: list[list[str]] = [["--weight", "0.5"], ["--dtype", "float32"]]
    for number, options in enumerate(others, 1):
        hub.clear()
        report = through(hub, home, repo, *options, "--overwrite", "--json").json
        assert report["resumed"] == []
        assert puts(hub) == COUNT
        assert len(own_commits(hub, repo)) == number
        assert staging(hub, repo) == first
        files = hub.files(repo)
        changed = [name for name in SHARDS if files[name] != local[name]]
        assert len(changed) == COUNT or (options[0] == "--weight" and changed)
    hub.clear()
    report = through(hub, home.with_name("another"), repo, "--overwrite", "--json").json
    assert report["resumed"] == SHARDS
    assert (puts(hub), fetched(hub)) == (0, [])
    files = hub.files(repo)
    assert {name: files[name] for name in local} == local
    assert staging(hub, repo) == []


# --- faults -------------------------------------------------------------------------------------


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
    """One clear error; main is untouched and nothing stands at OUT."""
    hub.fail("^/upload/", 400, times=99, method="PUT")  # which the client does not try again
    out = tmp_path / "out"
    done = run(hub, home, *INPUTS, "-o", out, "--push", repo, code=1)
    assert done.out == ""
    assert done.err.count("error") == 1
    assert "400" in done.err
    assert len(done.err.splitlines()) <= 6
    assert own_commits(hub, repo) == []
    assert not out.exists()
    assert beside(out) == []


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
            assert hashlib.sha256(files[name]).hexdigest() == digest, name
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
from loratool.storage.staging import ShardWriter
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

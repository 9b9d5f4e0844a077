"""The tests' own Hub, held against the real client: what it sends, keeps, refuses and survives."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import forked
from helpers.hub import HubServer, User

pytestmark = pytest.mark.long

PRELUDE = """
import json, os, sys
from huggingface_hub import *
from huggingface_hub.errors import *
from huggingface_hub.utils import get_session, build_hf_headers, http_backoff
api = HfApi()
def read(path):
    with open(path, "rb") as file:
        return file.read()
def error(call, *args, **options):
    try:
        return repr(call(*args, **options))
    except Exception as error:
        cause = error if hasattr(error, "response") else error.__cause__
        return [type(error).__name__, getattr(getattr(cause, "response", None), "status_code", 0)]
def say(value):
    print("\\n" + json.dumps(value))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(chunk_size=200_000, page_size=3) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def client(hub: HubServer, home: Path, code: str, token: str | None = "hf_writer") -> Any:
    """Run a snippet with the real client; gives what it said last."""
    home.mkdir(exist_ok=True)
    done = forked.run_snippet(PRELUDE + code, [], hub.environment(home, token), home)
    assert done.code == 0, done.err
    return json.loads(done.out.splitlines()[-1])


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_what_is_uploaded_comes_back(hub: HubServer, home: Path) -> None:
    """Small files, an LFS file in one piece and one in parts; nothing is sent twice."""
    folder = home / "out"
    (folder / "sub").mkdir(parents=True)
    files = {
        "config.json": b"{}",
        "empty.safetensors": b"",
        "one.safetensors": noise(150_000),
        "sub/parts.bin": noise(700_001, 1),
        "vocab.txt": noise(20_000, 2),  # too large for git, whatever its name
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    told = client(
        hub,
        home,
        """
api.create_repo("someone/new", private=True)
again = [error(api.create_repo, "someone/new"), api.create_repo("someone/new", exist_ok=True)]
api.upload_folder(repo_id="someone/new", folder_path="out", commit_message="All of it")
info = api.upload_folder(repo_id="someone/new", folder_path="out")
single = api.upload_file(
    repo_id="someone/new", path_in_repo="from-memory.pt", path_or_fileobj=read("out/vocab.txt")
)
root = api.snapshot_download("someone/new")
equal = [read(f"{root}/{name}") == read(f"out/{name}") for name in sys.argv[1:] or NAMES]
say([api.whoami()["name"], again, info.oid, single.oid, equal])
""".replace("NAMES", repr(list(files))),
    )
    name, (conflict, again), unchanged, single, equal = told
    assert name == "someone"
    assert conflict == ["HfHubHTTPError", 409]
    assert again == f"{hub.url}/someone/new"
    assert equal == [True] * len(files)
    stored = hub.files("someone/new")
    assert stored.pop(".gitattributes")
    assert stored.pop("from-memory.pt") == files["vocab.txt"]
    assert stored == files
    assert hub.is_private("someone/new")
    newest, folder_commit, first = hub.commits("someone/new")
    assert [newest.id, folder_commit.id] == [single, unchanged]
    assert folder_commit.message == "All of it"
    assert set(folder_commit.changed) == set(files)
    assert first.changed == (".gitattributes",)
    # One piece for what fits in one; the object that came again under a new name, not at all.
    parts = [r.received for r in hub.requests("/upload/", "PUT")]
    assert sorted(parts) == [20_000, 100_001, 150_000, 200_000, 200_000, 200_000]
    assert hub.received("/upload/") == sum(parts)
    assert hub.sent(r"/cdn/.*filename=sub/parts\.bin") == 700_001


def test_commits_are_checked_and_whole(hub: HubServer, home: Path) -> None:
    """A stale parent, a missing file or object: refused, and nothing of the commit is kept."""
    old = hub.add("org/model", {"a.txt": "a", "dir/b.txt": "b", "dir/c.txt": "c"})
    new = hub.add("org/model", {"a.txt": "changed"})
    told = client(
        hub,
        home,
        f"""
def commit(*operations, **options):
    return api.create_commit("org/model", operations, commit_message="m", **options)
new = CommitOperationAdd("new.txt", b"new")
errors = [
    error(commit, CommitOperationAdd("new.txt", b"new"), parent_commit="{old}"),
    error(commit, new, CommitOperationDelete("gone.txt")),
    error(commit, new, CommitOperationDelete("gone/")),
    error(commit, new, revision="nowhere"),
]
good = commit(new, CommitOperationDelete("dir/"), parent_commit="{new}")
api.create_branch("org/model", branch="side", revision="{old}")
taken = error(api.create_branch, "org/model", branch="side")
api.upload_file(
    repo_id="org/model", path_in_repo="s.txt", path_or_fileobj=b"s", revision="side"
)
refs = api.list_repo_refs("org/model")
say([errors, good.oid, taken, [b.name for b in refs.branches]])
""",
    )
    assert told == [
        [
            ["HfHubHTTPError", 412],
            ["RemoteEntryNotFoundError", 404],
            ["RemoteEntryNotFoundError", 404],
            ["RevisionNotFoundError", 404],
        ],
        hub.commits("org/model")[0].id,
        ["HfHubHTTPError", 409],
        ["main", "side"],
    ]
    assert hub.files("org/model") == {"a.txt": b"changed", "new.txt": b"new"}
    assert hub.commits("org/model")[0].changed == ("dir/b.txt", "dir/c.txt", "new.txt")
    assert hub.files("org/model", "side")["a.txt"] == b"a"
    # A pointer to an object that was never stored, as no sound client sends it.
    oid = "0" * 64
    lines = [
        {"key": "header", "value": {"summary": "m"}},
        {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 1}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    request = urllib.request.Request(
        f"{hub.url}/api/models/org/model/commit/main",
        data=body,
        headers={"Authorization": "Bearer hf_writer"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert len(hub.commits("org/model")) == 3


def test_pull_requests(hub: HubServer, home: Path) -> None:
    """Whoever may only read can propose; the branch itself stays as it is."""
    base = hub.add("org/model", {"README.md": "---\nlicense: mit\n---\n"})
    (home / "out").mkdir()
    (home / "out" / "w.safetensors").write_bytes(noise(50_000))
    told = client(
        hub,
        home,
        """
pushed = error(api.upload_folder, repo_id="org/model", folder_path="out")
info = api.upload_folder(repo_id="org/model", folder_path="out", create_pr=True)
opened = api.create_pull_request("org/model", "A title")
back = api.hf_hub_download("org/model", "w.safetensors", revision=info.pr_revision)
names = [f["name"] for f in HfFileSystem().ls("org/model@refs/pr/1")]
refs = api.list_repo_refs("org/model", include_pull_requests=True)
say([
    pushed, info.pr_url, info.pr_num, opened.git_reference, read(back) == read("out/w.safetensors"),
    names, [p.ref for p in refs.pull_requests],
])
""",
        token="hf_reader",
    )
    assert told == [
        ["HfHubHTTPError", 403],
        f"{hub.url}/org/model/discussions/1",
        1,
        "refs/pr/2",
        True,
        ["org/model@refs/pr/1/README.md", "org/model@refs/pr/1/w.safetensors"],
        ["refs/pr/1", "refs/pr/2"],
    ]
    assert hub.branches("org/model") == {
        "main": base,
        "refs/pr/1": hub.commits("org/model", "refs/pr/1")[0].id,
        "refs/pr/2": base,
    }
    assert hub.commits("org/model", "refs/pr/1")[0].author == "reader"


def test_listings_come_in_pages(hub: HubServer, home: Path) -> None:
    """The client follows the pages of files, folders and commits to their end."""
    names = [f"layers/{i}/w.bin" for i in range(4)] + ["config.json", "README.md"]
    for number in range(4):
        hub.add("org/model", {n: f"{number} {n}" for n in names})
    told = client(
        hub,
        home,
        """
say([
    api.list_repo_files("org/model"),
    [f.path for f in api.list_repo_tree("org/model")],
    [f.path for f in api.list_repo_tree("org/model", "layers/2", expand=True)],
    [f.path for f in api.get_paths_info("org/model", ["layers/1", "config.json", "none"])],
    [c.commit_id for c in api.list_repo_commits("org/model")],
    [s.size for s in api.model_info("org/model", files_metadata=True).siblings],
    next(api.list_repo_tree("org/model", "layers/2", expand=True)).last_commit.oid,
])
""",
    )
    commits = [c.id for c in hub.commits("org/model")]
    assert told == [
        sorted(names),
        ["README.md", "config.json", "layers"],
        ["layers/2/w.bin"],
        ["config.json", "layers/1"],
        commits,
        [len(hub.files("org/model")[n]) for n in sorted(names)],
        commits[0],
    ]
    assert len(hub.requests("/tree/main.*recursive=true")) == 4  # ten entries, three at a time
    assert len(hub.requests("/commits/")) == 2


def test_ranges(hub: HubServer, home: Path) -> None:
    """Parts of a file that takes no room on disk; the storage never sees the token."""
    sparse = home / "sparse.bin"
    with sparse.open("wb") as file:
        file.truncate(200_000_000)
        file.seek(150_000_000)
        file.write(b"needle")
    hub.add("org/model", {"sparse.bin": sparse, "short.txt": "0123456789"})
    told = client(
        hub,
        home,
        """
def get(name, asked):
    url = hf_hub_url("org/model", name)
    answer = get_session().get(url, headers={**build_hf_headers(), "Range": asked})
    return [answer.status_code, answer.headers.get("content-range"), answer.text[:20]]
with HfFileSystem().open("org/model/sparse.bin", block_size=1000) as file:
    file.seek(150_000_000)
    found = file.read(6).decode()
meta = get_hf_file_metadata(hf_hub_url("org/model", "sparse.bin"))
say([
    found, meta.size, meta.etag,
    get("short.txt", "bytes=2-4"), get("short.txt", "bytes=-3"), get("short.txt", "bytes=7-"),
    get("short.txt", "bytes=10-12"), get("sparse.bin", "bytes=200000000-"),
    get_session().get(meta.location + "0").status_code,
])
""",
    )
    with sparse.open("rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert told == [
        "needle",
        200_000_000,
        digest,
        [206, "bytes 2-4/10", "234"],
        [206, "bytes 7-9/10", "789"],
        [206, "bytes 7-9/10", "789"],
        [416, "bytes */10", '{"error": "Requested'],
        [416, "bytes */200000000", '{"error": "Requested'],
        403,
    ]
    assert 6 <= hub.sent("/cdn/") < 10_000
    assert {r.token for r in hub.requests("/cdn/")} == {None}
    assert hub.requests("/resolve/main/sparse.bin", "GET")[0].range.startswith("bytes=150000000-")


def test_refusals_are_the_clients_own_errors(hub: HubServer, home: Path) -> None:
    """By token: what is missing, private, gated, or not theirs to write."""
    for namespace in ("org", "meta"):
        hub.add(f"{namespace}/open", {"a.txt": "a"})
        hub.add(f"{namespace}/private", {"a.txt": "a"}, private=True)
        hub.add(f"{namespace}/gated", {"a.txt": "a"}, gated=True)
    hub.users["hf_readonly"] = User("colleague", ("org",), writes=False)
    code = """
say({
    "missing": error(api.hf_hub_download, "org/none", "a.txt"),
    "private": error(api.hf_hub_download, "org/private", "a.txt"),
    "theirs": error(api.snapshot_download, "meta/private"),
    "gated": error(api.hf_hub_download, "meta/gated", "a.txt"),
    "own gated": error(api.hf_hub_download, "org/gated", "a.txt"),
    "check": error(api.auth_check, "meta/gated"),
    "listed": api.list_repo_files("meta/gated") if api.token != "hf_wrong" else [],
    "no file": error(api.hf_hub_download, "org/open", "none.txt"),
    "no revision": error(api.model_info, "org/open", revision="none"),
    "write": error(api.upload_file, repo_id="org/open", path_in_repo="b", path_or_fileobj=b"b"),
    "write theirs": error(
        api.upload_file, repo_id="meta/open", path_in_repo="b", path_or_fileobj=b"b"
    ),
    "create": error(api.create_repo, "meta/new"),
    "whoami": error(api.whoami),
})
"""
    repository, gated = "RepositoryNotFoundError", "GatedRepoError"
    told = {t: client(hub, home / t, code, t) for t in ("hf_writer", "hf_reader", "hf_readonly")}
    none = client(hub, home / "none", code, None)
    for answers in (*told.values(), none):
        assert answers["listed"] == ["a.txt"]
        assert answers["no file"] == ["RemoteEntryNotFoundError", 404]
        assert answers["no revision"] == ["RevisionNotFoundError", 404]
    for answers in told.values():
        assert answers["missing"] == [repository, 404]
        assert answers["theirs"] == [repository, 404]
        assert answers["gated"] == answers["check"] == [gated, 403]
        assert answers["write theirs"] == answers["create"] == ["HfHubHTTPError", 403]
    writer, reader, readonly = told.values()
    assert "a.txt" in writer["private"]
    assert "a.txt" in writer["own gated"]
    assert "commit" in writer["write"]
    assert reader["private"] == [repository, 404]
    assert reader["own gated"] == [gated, 403]
    assert "a.txt" in readonly["private"]
    assert readonly["write"] == reader["write"] == ["HfHubHTTPError", 403]
    for key in ("missing", "private", "theirs", "write"):
        assert none[key] == [repository, 401]
    assert none["gated"] == none["check"] == [gated, 401]
    assert none["create"] == [repository, 401]
    assert none["whoami"] == ["LocalTokenNotFoundError", 0]
    wrong = 'say([error(api.model_info, "org/open"), error(api.whoami)])'
    assert client(hub, home / "wrong", wrong, "hf_wrong") == [["HfHubHTTPError", 401]] * 2
    assert len(hub.commits("org/open")) == 2  # the writer's


def test_faults_that_pass_and_faults_that_stay(hub: HubServer, home: Path) -> None:
    """Which answers the client repeats its request for, and how long it waits."""
    hub.add("org/model", {"a.txt": "a"})
    hub.fail("/tree/main", 500)
    hub.fail("/commits/main", 429, headers={"Retry-After": "0"}, message="Too many requests")
    hub.fail("/commit/main", 503, message="The Hub is resting")
    hub.fail("/api/models/org/model$", 500, times=9)
    started = time.monotonic()
    told = client(
        hub,
        home,
        """
say([
    api.list_repo_files("org/model"),
    len(api.list_repo_commits("org/model")),
    error(api.upload_file, repo_id="org/model", path_in_repo="b", path_or_fileobj=b"b"),
    error(api.model_info, "org/model"),
])
""",
    )
    failed = [["HfHubHTTPError", 503], ["HfHubHTTPError", 500]]
    assert told == [["a.txt"], 1, *failed]
    assert time.monotonic() - started > 2  # a second for the 500, and one on top of Retry-After
    assert [r.status for r in hub.requests("/tree/")] == [500, 200]
    assert [r.status for r in hub.requests("/commits/")] == [429, 200]
    assert [r.status for r in hub.requests("/commit/")] == [503]  # commits are not repeated
    assert list(hub.files("org/model")) == ["a.txt"]
    hub.clear()
    assert hub.log == []
    assert (
        client(hub, home, 'say(api.model_info("org/model").sha)')
        == hub.branches("org/model")["main"]
    )


def test_downloads_that_are_cut(hub: HubServer, home: Path) -> None:
    """A connection that ends early is resumed; one that is reset is not; a short file is told."""
    data, piece = noise(25_000_000), 10 << 20  # what the client takes up at once
    reset, short = data[:50_000], data[:60_000]
    hub.add("org/model", {"w.safetensors": data, "reset.bin": reset, "short.bin": short})
    hub.cut(r"filename=w\.safetensors", after=12_000_000)
    hub.cut(r"filename=reset", after=100, reset=True)
    hub.truncate("org/model", "short.bin", 30_000)
    told = client(
        hub,
        home,
        """
from hashlib import sha256
say([
    sha256(read(api.hf_hub_download("org/model", "w.safetensors"))).hexdigest(),
    error(api.hf_hub_download, "org/model", "reset.bin"),
    error(api.hf_hub_download, "org/model", "short.bin"),
    get_hf_file_metadata(hf_hub_url("org/model", "short.bin")).size,
])
""",
    )
    assert told == [hashlib.sha256(data).hexdigest(), ["ReadError", 0], ["OSError", 0], 60_000]
    first, second = hub.requests(r"/cdn/.*filename=w\.safetensors")
    assert first.sent == 12_000_000
    # It had no use of the piece that was begun: what is shorter than one is fetched anew.
    assert second.range == f"bytes={piece}-"
    assert second.sent == len(data) - piece
    assert hub.sent("filename=short") == 30_000


def test_uploads_that_are_cut_or_wrong(hub: HubServer, home: Path) -> None:
    """A cut PUT is sent again from its start; a body that is not what was announced is refused."""
    hub.add("org/model", {"a.txt": "a"})
    for name, seed in (("w.bin", 0), ("parts.bin", 1), ("moving.bin", 2)):
        (home / name).write_bytes(noise(700_000 if seed == 1 else 190_000, seed))
    hub.cut("/upload/", after=100_000, method="PUT")
    hub.cut(r"/200000/2\?", after=150_000, method="PUT")

    def change() -> None:
        (home / "moving.bin").write_bytes(noise(190_000, 3))

    def then() -> None:
        hub.on("objects/batch", change)

    # The third upload's file changes after it was hashed, before it is sent.
    hub.on("/commit/main", lambda: hub.on("/commit/main", then))
    told = client(
        hub,
        home,
        """
def upload(name):
    return api.upload_file(repo_id="org/model", path_in_repo=name, path_or_fileobj=name)
upload("w.bin"), upload("parts.bin")
say([error(upload, "moving.bin"), error(upload, "moving.bin")])
""",
    )
    assert told[0] == ["RuntimeError", 400]
    assert "CommitInfo" in told[1]
    names = ("w.bin", "parts.bin", "moving.bin")
    stored = hub.files("org/model")
    assert {n: stored[n] for n in names} == {n: (home / n).read_bytes() for n in names}
    assert len(hub.commits("org/model")) == 4
    dropped = [r.received for r in hub.requests("/upload/") if not r.status]
    assert dropped == [100_000, 150_000]
    assert [r.status for r in hub.requests("/190000")] == [0, 200, 400, 200]


def test_an_answer_that_is_lost(hub: HubServer, home: Path) -> None:
    """The commit is made though the client cannot know."""
    hub.add("org/model", {"a.txt": "a"})
    hub.cut("/commit/main", after=0, side="response")
    told = client(
        hub,
        home,
        """
add = CommitOperationAdd("b.txt", b"b")
say(error(api.create_commit, "org/model", [add], commit_message="m"))
""",
    )
    assert told == ["RemoteProtocolError", 0]
    assert len(hub.requests("/commit/")) == 1
    assert hub.files("org/model")["b.txt"] == b"b"


def test_model_cards(hub: HubServer, home: Path) -> None:
    """A card is read, changed and pushed; a base model that is no model id is refused."""
    hub.add("org/model", {"README.md": "---\nbase_model: org/base\n---\n# Adapter\n"})
    told = client(
        hub,
        home,
        """
card = ModelCard.load("org/model")
read_base = card.data.base_model
card.data.tags = ["lora"]
card.push_to_hub("org/model")
card.data.base_model = ["org/base", "/home/me/base"]
say([read_base, card.text.strip(), error(card.push_to_hub, "org/model")])
""",
    )
    assert told == ["org/base", "# Adapter", ["ValueError", 0]]
    assert b"tags:\n- lora" in hub.files("org/model")["README.md"]
    assert len(hub.commits("org/model")) == 2


def test_servers_are_quick_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Made and stopped often, with a client's connection still open, and no word of it."""
    started = time.monotonic()
    for _ in range(20):
        with HubServer() as hub:
            hub.add("org/model", {"a.txt": "a"})
            hub.cut("a.txt", after=0)
            url = f"{hub.url}/org/model/resolve/main/a.txt"
            with urllib.request.urlopen(url) as answer, pytest.raises(http.client.IncompleteRead):
                answer.read()
    assert time.monotonic() - started < 4
    assert capfd.readouterr() == ("", "")


def test_the_servers_own_mistakes_are_told() -> None:
    """A mistake in the server answers 500 and is raised when its block ends."""

    def fault() -> None:
        raise ZeroDivisionError

    def visit() -> None:
        with HubServer() as hub:
            hub.on("/api/whoami", fault)
            with pytest.raises(urllib.error.HTTPError, match="500"):
                urllib.request.urlopen(f"{hub.url}/api/whoami-v2")

    with pytest.raises(RuntimeError, match="made a mistake"):
        visit()

"""A small Hugging Face Hub on loopback, for tests that run the real client against it.

It speaks what `huggingface_hub` asks of the Hub for model repositories (with Xet switched off):
creating repositories and branches, listing, uploading through LFS, committing, pull requests,
model cards, and downloading whole files or ranges. Nothing of the client is mocked; it is pointed
here by `HF_ENDPOINT`, which it reads when imported, so run it in a subprocess:

    with HubServer() as hub:
        first = hub.add("org/base", {"config.json": "{}", "model.safetensors": Path("big.bin")})
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "home"))
        assert hub.files("org/base")["config.json"] == b"{}"

Two ports listen: `hub.url` is the Hub, `hub.storage_url` is its storage, to which LFS downloads
(`/cdn/<repo>/<oid>?…filename=…`) and uploads (`/upload/<repo>/<oid>/<size>[/<part>]`) go by signed
links. It must be another origin, as on the real Hub: the client reads a file's metadata from the
redirect only if that leaves the Hub, and drops its token there (the storage refuses a token).

Users: the token "hf_writer" is of "someone", a member of "org", who may write in both namespaces;
"hf_reader" is of "reader", who may only read what is public; every other token is invalid. More
in `hub.users["hf_x"] = User("x", ("x", "org"), writes=False)`: members see their namespaces'
private repositories and gated files.

State:
    hub.add(repo, {path: bytes | str | Path | None}, private=, gated=, branch=, message=)
        creates the repository or adds a commit (None deletes), returns the commit's id;
        a Path is served from where it lies, without a copy
    hub.files(repo, revision), hub.commits(repo, revision): newest first, each with
        .id .message .description .changed (paths) .files
    hub.exists(repo), hub.is_private(repo), hub.branches(repo) -> {name or "refs/pr/1": commit id}
    hub.truncate(repo, path, size): the storage holds less of the file than its metadata says
    hub.repos[repo]: .private, .gated ("auto" or False), .objects (LFS, by sha256)
Repositories created by the client begin, as on the Hub, with a commit that adds .gitattributes;
those made by hub.add do not. Settings, at any time: page_size (listings), lfs_threshold (bytes
from which a file goes to LFS; *.safetensors and the like always do), chunk_size (LFS files above
it are uploaded in parts), link_seconds (how long signed links hold).

Traffic (patterns are regular expressions, searched in the unquoted path with its query):
    hub.log: records with .method .path .status .received .sent (body bytes) .range .token; it
        leaves out /api/agent-harnesses, which the client fetches for itself with every new cache
    hub.requests(match, method), hub.sent(match), hub.received(match), hub.clear()

Faults:
    hub.fail(pattern, status, times=1, headers=, method=, message=)   answer so instead
    hub.cut(pattern, after=BYTES, times=1, method=, side=, reset=)    drop the connection once that
        many body bytes of the response were sent, or, for PUT and POST, of the request read;
        side="response" on a POST carries it out and then loses the answer; reset=True ends with
        RST in place of FIN. A body that is not longer than `after` is not cut and uses up nothing.
    hub.on(pattern, callback, method=None)    call once, before the matching request is answered

A mistake in this server answers 500 and is raised again when the `with` block ends.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import socket
import socketserver
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

PIECE = 1 << 18
LFS_NAMES = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|npz|onnx|msgpack|zip|gz|zst)$")
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class User:
    """Whom a token belongs to, the namespaces they are a member of, and if they may write there."""

    name: str
    namespaces: tuple[str, ...]
    writes: bool = True

    def member_of(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in self.namespaces


class Content:
    """One file's bytes, in memory or on disk, under the hashes by which the Hub knows them."""

    def __init__(self, data: bytes | Path, lfs: bool, sha256: str | None = None) -> None:
        self.data, self.lfs = data, lfs
        self.size = len(data) if isinstance(data, bytes) else data.stat().st_size
        self.available = self.size  # less than the size once truncated
        self.sha256 = sha256 or ""
        if not lfs:
            self.blob = self.etag = git_sha1(self.read())
            return
        if not sha256:
            digest = hashlib.sha256()
            for piece in self.pieces(0, self.size):
                digest.update(piece)
            self.sha256 = digest.hexdigest()
        self.etag = self.sha256
        self.pointer = (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()
        self.blob = git_sha1(self.pointer)  # what git itself holds for an LFS file

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        if isinstance(self.data, bytes):
            yield from (self.data[i : min(i + PIECE, stop)] for i in range(start, stop, PIECE))
            return
        with self.data.open("rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                start += len(piece)
                yield piece

    def read(self) -> bytes:
        return b"".join(self.pieces(0, self.available))


@dataclass
class Commit:
    id: str
    parent: str | None
    message: str
    description: str
    author: str
    changed: tuple[str, ...]
    files: dict[str, Content]
    date: str = field(default_factory=lambda: stamp())


class Repo:
    """A repository's commits, its branches and pull requests (both as refs), its LFS objects."""

    def __init__(self, repo_id: str, private: bool = False, gated: bool | str = False) -> None:
        self.id, self.private = repo_id, private
        self.gated: bool | str = "auto" if gated is True else gated
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.objects: dict[str, Content] = {}
        self.discussions: dict[int, dict[str, Any]] = {}
        self.created = stamp()

    def find(self, revision: str) -> Commit:
        """The commit of a branch, of a pull request's ref, or with that id."""
        commit_id = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if commit_id not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def history(self, revision: str) -> list[Commit]:
        commits = [self.find(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits

    def commit(
        self,
        ref: str,
        parent: Commit | None,
        files: dict[str, Content],
        message: str,
        description: str = "",
        author: str = "someone",
    ) -> Commit:
        before = parent.files if parent else {}
        was, now = ({p: c.etag for p, c in tree.items()} for tree in (before, files))
        changed = [p for p in {**was, **now} if was.get(p) != now.get(p)]
        number = f"{self.id} {len(self.commits)} {ref} {message} {time.time_ns()}"
        commit_id = hashlib.sha1(number.encode()).hexdigest()
        parent_id = parent.id if parent else None
        new = Commit(
            commit_id, parent_id, message, description, author, tuple(sorted(changed)), files
        )
        self.commits[commit_id] = new
        self.refs[ref] = commit_id
        return new

    def open_discussion(self, title: str, author: str, base: Commit | None) -> int:
        """Number of a new discussion; a pull request when there is a commit to base it on."""
        number = len(self.discussions) + 1
        self.discussions[number] = {
            "title": title,
            "num": number,
            "author": {"name": author},
            "createdAt": stamp(),
            "status": "draft" if base else "open",
            "repo": {"name": self.id, "type": "model"},
            "isPullRequest": base is not None,
            "events": [],
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "diff": "",
        }
        if base:
            self.refs[f"refs/pr/{number}"] = base.id
        return number


@dataclass(eq=False)
class Record:
    """One request and what became of it; `status` stays 0 when there was no answer."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    received: int = 0
    sent: int = 0


@dataclass
class Rule:
    """Something a test arranged for requests that match."""

    kind: str
    pattern: str
    method: str | None = None
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    after: int = 0
    side: str | None = None
    reset: bool = False
    callback: Callable[[], object] | None = None

    def matches(self, kind: str, record: Record) -> bool:
        return (
            self.times > 0
            and self.kind == kind
            and self.method in (None, record.method)
            and re.search(self.pattern, record.path) is not None
        )


class Refusal(Exception):
    """An answer that is an error, worded and coded as the Hub does."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} if message else {}
        if code:
            self.headers["X-Error-Code"] = code
        self.headers.update(extra.pop("headers", {}))
        self.body = {"error": message, **extra}


class HubServer:
    """The server, its state, and the handles by which tests use it (see the module)."""

    def __init__(
        self,
        tmp: Path | None = None,
        *,
        page_size: int = 1000,
        lfs_threshold: int = 10_000,
        chunk_size: int = 1 << 24,
        link_seconds: int = 3600,
    ) -> None:
        self.page_size, self.lfs_threshold = page_size, lfs_threshold
        self.chunk_size, self.link_seconds = chunk_size, link_seconds
        self.users = {
            "hf_writer": User("someone", ("someone", "org")),
            "hf_reader": User("reader", ("reader",), writes=False),
        }
        self.repos: dict[str, Repo] = {}
        self.log: list[Record] = []
        self.rules: list[Rule] = []
        self.errors: list[Exception] = []
        self.lock = threading.RLock()
        self.parts: dict[tuple[str, str], dict[int, tuple[str, Path]]] = {}
        self._tmp, self._own_tmp = tmp, tempfile.TemporaryDirectory()
        self._secret = os.urandom(16)
        self._names = 0

    def __enter__(self) -> HubServer:
        self._listeners = [Listener(self, HubHandler), Listener(self, StorageHandler)]
        self.url, self.storage_url = (f"http://127.0.0.1:{x.server_port}" for x in self._listeners)
        for listener in self._listeners:
            # The interval is how long stopping may take.
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
            listener.hang_up()
        self._own_tmp.cleanup()
        if self.errors and error is None:
            raise RuntimeError("the test Hub made a mistake") from self.errors[0]

    def environment(self, home: Path, token: str | None = "hf_writer") -> dict[str, str]:
        """The environment for a process whose client shall talk to this server only."""
        drop = re.compile(r"HF_|HUGGING_?FACE|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
        kept = {k: v for k, v in os.environ.items() if not drop.match(k)}
        return {
            **kept,
            **({} if token is None else {"HF_TOKEN": token}),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # State

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes | str | Path | None],
        *,
        private: bool = False,
        gated: bool | str = False,
        branch: str = "main",
        message: str = "Files of a test",
    ) -> str:
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id, private, gated))
            start = branch if branch in repo.refs else "main"
            parent = repo.find(start) if start in repo.refs else None
            tree = dict(parent.files) if parent else {}
            for path, data in files.items():
                if data is None:
                    del tree[path]
                    continue
                data = data.encode() if isinstance(data, str) else data
                size = data.stat().st_size if isinstance(data, Path) else len(data)
                tree[path] = content = Content(data, self.goes_to_lfs(path, size))
                if content.lfs:
                    repo.objects[content.sha256] = content
            return repo.commit(branch, parent, tree, message).id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {p: c.read() for p, c in self.repos[repo_id].find(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        return self.repos[repo_id].history(revision)

    def branches(self, repo_id: str) -> dict[str, str]:
        return dict(self.repos[repo_id].refs)

    def exists(self, repo_id: str) -> bool:
        return repo_id in self.repos

    def is_private(self, repo_id: str) -> bool:
        return self.repos[repo_id].private

    def truncate(self, repo_id: str, path: str, size: int, revision: str = "main") -> None:
        self.repos[repo_id].find(revision).files[path].available = size

    def goes_to_lfs(self, path: str, size: int) -> bool:
        return size >= self.lfs_threshold or (size > 0 and LFS_NAMES.search(path) is not None)

    # Traffic and faults

    def requests(self, match: str = "", method: str | None = None) -> list[Record]:
        found = [r for r in list(self.log) if re.search(match, r.path)]
        return [r for r in found if method in (None, r.method)]

    def sent(self, match: str = "") -> int:
        return sum(r.sent for r in self.requests(match))

    def received(self, match: str = "") -> int:
        return sum(r.received for r in self.requests(match))

    def clear(self) -> None:
        """Forget the log and every fault that was arranged."""
        self.log.clear()
        self.rules.clear()

    def fail(
        self,
        pattern: str,
        status: int,
        times: int = 1,
        headers: dict[str, str] | None = None,
        method: str | None = None,
        message: str = "",
    ) -> None:
        rule = Rule("fail", pattern, method, times, status, headers or {}, message)
        self.rules.append(rule)

    def cut(
        self,
        pattern: str,
        after: int,
        times: int = 1,
        method: str | None = None,
        side: str | None = None,
        reset: bool = False,
    ) -> None:
        self.rules.append(Rule("cut", pattern, method, times, after=after, side=side, reset=reset))

    def on(self, pattern: str, callback: Callable[[], object], method: str | None = None) -> None:
        self.rules.append(Rule("call", pattern, method, callback=callback))

    def rule(self, kind: str, record: Record) -> Rule | None:
        return next((r for r in list(self.rules) if r.matches(kind, record)), None)

    def cut_rule(self, side: str, record: Record) -> Rule | None:
        """Left open, a cut is of uploads on their way in and of all else on its way out."""
        usual = "request" if record.method in ("PUT", "POST") else "response"
        rules = [r for r in list(self.rules) if (r.side or usual) == side]
        return next((r for r in rules if r.matches("cut", record)), None)

    def take(self, rule: Rule | None) -> bool:
        """Use a rule up by one; False when another request was quicker."""
        with self.lock:
            if rule is None or rule.times <= 0:
                return False
            rule.times -= 1
            return True

    # Storage

    def sign(self, base: str, path: str, **query: str) -> str:
        """A link that needs no token for as long as it holds."""
        query["Expires"] = str(int(time.time()) + self.link_seconds)
        link = f"{quote(path)}?{urlencode(query)}"
        return f"{base}{link}&Signature={self._signature(link)}"

    def check_signature(self, link: str) -> None:
        signed, _, signature = link.rpartition("&Signature=")
        expires = parse_qs(urlsplit(signed).query).get("Expires", ["0"])[0]
        if not hmac.compare_digest(signature, self._signature(signed)):
            raise Refusal(403, "SignatureDoesNotMatch")
        if time.time() > int(expires):
            raise Refusal(403, "Request has expired")

    def _signature(self, link: str) -> str:
        return hmac.new(self._secret, link.encode(), "sha256").hexdigest()

    def new_file(self) -> Path:
        folder = self._tmp or Path(self._own_tmp.name)
        with self.lock:
            self._names += 1
            return folder / f"object-{self._names}"


class Listener(ThreadingHTTPServer):
    """One port. Quick to start (no look-up of its own name) and to stop (waits for no one)."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, handler: type[Handler]) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing to say: what matters was kept in `hub.errors`."""

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Dropped(ConnectionError):
    """The connection was cut because a test asked for it."""


class Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers, counting bytes and applying faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener
    routes: tuple[tuple[str, str, str], ...] = ()

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read stderr."""

    def serve(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.record = Record(self.command, unquote(self.path), self.headers.get("Range"), token)
        self.body = self.read_body()
        if self.path == "/api/agent-harnesses":
            # The client asks this once per cache, whatever it is about: no part of a test.
            return self.json({"standardEnvVars": [], "harnesses": {}})
        self.hub.log.append(self.record)
        self.query = {k: v[-1] for k, v in parse_qs(urlsplit(self.path).query).items()}
        try:
            call = self.hub.rule("call", self.record)
            if call and self.hub.take(call) and call.callback:
                call.callback()
            fault = self.hub.rule("fail", self.record)
            if fault and self.hub.take(fault):
                raise Refusal(fault.status, fault.message, headers=fault.headers)
            self.dispatch()
        except Refusal as refusal:
            self.json(refusal.body, refusal.status, refusal.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception as error:
            self.hub.errors.append(error)
            self.json({"error": repr(error)}, 500)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def dispatch(self) -> None:
        path = urlsplit(self.path).path  # still quoted, as revisions hold slashes
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                return getattr(self, name)(**groups)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    # The request's body

    def read_body(self) -> Iterator[bytes]:
        rule = self.hub.cut_rule("request", self.record)
        for size in self.body_sizes():
            while size:
                want = min(size, PIECE)
                if rule and rule.times:
                    want = min(want, rule.after - self.record.received)
                    if want <= 0 and self.hub.take(rule):
                        self.drop(rule.reset)
                piece = self.rfile.read(want)
                if len(piece) < want:
                    raise ConnectionError("the client went away")
                self.record.received += len(piece)
                size -= len(piece)
                yield piece

    def body_sizes(self) -> Iterator[int]:
        """The one size of a body whose length is known, or that of each chunk."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            yield int(self.headers.get("Content-Length") or 0)
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield size
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def read_json(self) -> dict[str, Any]:
        return json.loads(b"".join(self.body) or b"{}")

    # The response

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        self.reply(status, [body], len(body), headers)

    def reply(
        self, status: int, body: Iterable[bytes], length: int, headers: dict[str, str]
    ) -> None:
        for _ in self.body:  # what is left of the request would be read as the next one
            pass
        self.record.status = status
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            # A header is one line of latin-1.
            plain = " ".join(value.split()).encode("latin-1", "replace").decode("latin-1")
            self.send_header(name, plain)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body, length)

    def send_body(self, body: Iterable[bytes], length: int) -> None:
        rule = self.hub.cut_rule("response", self.record)
        for piece in body:
            room = rule.after - self.record.sent if rule else len(piece)
            if rule and room < len(piece) and self.hub.take(rule):
                self.send_piece(piece[:room])
                self.drop(rule.reset)
            self.send_piece(piece)
        if self.record.sent < length:
            self.close_connection = True  # a file that shrank

    def send_piece(self, piece: bytes) -> None:
        self.record.sent += len(piece)  # before the client can have it and the test can look
        self.wfile.write(piece)

    def drop(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The files made of the socket keep it open, so its descriptor is closed below them.
        socket.close(self.connection.detach())
        raise Dropped

    def send_content(self, content: Content, headers: dict[str, str]) -> None:
        """A file or the range of it that was asked for."""
        size = content.available
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{content.etag}"',
            **headers,
        }
        asked = re.fullmatch(r"\s*bytes\s*=\s*(\d*)-(\d*)\s*", self.headers.get("Range") or "")
        if not asked or not any(asked.groups()):
            return self.reply(200, content.pieces(0, size), size, headers)
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            wrong = {"Content-Range": f"bytes */{size}"}
            raise Refusal(416, "Requested Range Not Satisfiable", headers=wrong)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self.reply(206, content.pieces(start, stop), stop - start, headers)


class StorageHandler(Handler):
    """The storage of LFS objects: signed links only."""

    routes = (
        ("GET", r"/cdn/(?P<repo>.+)/(?P<oid>[0-9a-f]{64})", "download"),
        ("PUT", r"/upload/(?P<repo>.+)/(?P<oid>\w{64})/(?P<size>\d+)(?:/(?P<part>\d+))?", "store"),
    )

    def dispatch(self) -> None:
        if self.record.token:  # as S3 has it: one way to say who you are, not two
            raise Refusal(400, "Only one auth mechanism allowed")
        self.hub.check_signature(self.path)
        super().dispatch()

    def download(self, repo: str, oid: str) -> None:
        found = self.hub.repos.get(repo)
        if not found or oid not in found.objects:
            raise Refusal(404, "NoSuchKey")
        name = self.query["filename"].rsplit("/", 1)[-1]
        disposition = {"Content-Disposition": f'inline; filename="{name}";'}
        self.send_content(found.objects[oid], disposition)

    def store(self, repo: str, oid: str, size: str, part: str = "") -> None:
        sha256, md5, path = hashlib.sha256(), hashlib.md5(), self.hub.new_file()
        try:
            with path.open("wb") as file:
                for piece in self.body:
                    sha256.update(piece)
                    md5.update(piece)
                    file.write(piece)
            if self.record.received != int(size):
                raise Refusal(400, f"IncompleteBody: {self.record.received} bytes, not {size}")
            if not part and sha256.hexdigest() != oid:
                raise Refusal(400, f"BadDigest: the body's sha256 is not {oid}")
        except BaseException:
            path.unlink()
            raise
        with self.hub.lock:
            if part:
                stored = self.hub.parts.setdefault((repo, oid), {})
                stored[int(part)] = (md5.hexdigest(), path)
            else:
                self.hub.repos[repo].objects[oid] = Content(path, True, oid)
        self.reply(200, [], 0, {"ETag": f'"{md5.hexdigest()}"'})


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
REV = r"(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)"
API = rf"/api/models/{REPO}"


class HubHandler(Handler):
    """The Hub itself."""

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/complete_multipart", "complete_parts"),
        ("GET", rf"{API}/revision/{REV}", "info"),
        ("GET", rf"{API}/tree/{REV}(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"{API}/paths-info/{REV}", "paths_info"),
        ("GET", rf"{API}/refs", "refs"),
        ("GET", rf"{API}/commits/{REV}", "commits"),
        ("POST", rf"{API}/branch/{REV}", "create_branch"),
        ("DELETE", rf"{API}/branch/{REV}", "delete_branch"),
        ("POST", rf"{API}/preupload/{REV}", "preupload"),
        ("POST", rf"{API}/commit/{REV}", "commit"),
        ("POST", rf"{API}/discussions", "open_discussion"),
        ("GET", rf"{API}/discussions/(?P<num>\d+)", "discussion"),
        ("GET", rf"{API}/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", API, "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "lfs_verify"),
        ("GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", "resolve"),
    )

    def dispatch(self) -> None:
        if self.record.token is not None and self.record.token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.user = self.hub.users.get(self.record.token or "")
        super().dispatch()

    # Who may do what

    def access(self, repo_id: str, *, content: bool = False, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        member = self.user is not None and self.user.member_of(repo_id)
        if repo is None or (repo.private and not member):
            if self.user:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            raise self.unauthorized()
        if content and repo.gated and not member:
            restricted = f"Access to model {repo_id} is restricted"
            if self.user:
                message = f"{restricted} and you are not in the authorized list."
                raise Refusal(403, message, "GatedRepo")
            raise Refusal(401, f"{restricted}. Please log in.", "GatedRepo")
        if write:
            self.needs_write(repo_id)
        return repo

    def needs_write(self, repo_id: str) -> None:
        if self.user is None:
            raise self.unauthorized()
        if not self.user.member_of(repo_id):
            hint = "pass `create_pr=1` as a query parameter to create a Pull Request"
            raise Refusal(403, f"Forbidden: {hint}")
        if not self.user.writes:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")

    def needs_user(self) -> str:
        if self.user is None:
            raise self.unauthorized()
        return self.user.name

    def unauthorized(self) -> Refusal:
        # From the Hub a bare 401 is enough, but the client looks for it under https:// only.
        return Refusal(401, "Invalid username or password.", "RepoNotFound")

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.user.writes else "read"
        orgs = [n for n in self.user.namespaces if n != self.user.name]
        self.json(
            {
                "type": "user",
                "id": hashlib.md5(self.user.name.encode()).hexdigest()[:24],
                "name": self.user.name,
                "fullname": self.user.name.title(),
                "orgs": [{"type": "org", "name": n, "roleInOrg": role} for n in orgs],
                "auth": {
                    "type": "access_token",
                    "accessToken": {"displayName": "tests", "role": role},
                },
            }
        )

    def auth_check(self, repo: str, write: str = "") -> None:
        self.access(repo, content=True, write=bool(write))
        self.json({})

    # Repositories

    def create_repo(self) -> None:
        asked = self.read_json()
        repo_id = f"{asked.get('organization') or self.needs_user()}/{asked['name']}"
        self.needs_user()
        url = f"{self.hub.url}/{repo_id}"
        if not (self.user and self.user.writes and self.user.member_of(repo_id)):
            namespace = repo_id.partition("/")[0]
            right = f'create a model under the namespace "{namespace}"'
            raise Refusal(403, f"You don't have the rights to {right}")
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise Refusal(409, "You already created this model repo", url=url)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = self.hub.repos[repo_id] = Repo(repo_id, private)
            files = {".gitattributes": Content(GITATTRIBUTES, False)}
            repo.commit("main", None, files, "initial commit", author=self.user.name)
        self.json({"url": url, "name": repo_id, "id": repo_id})

    def info(self, repo: str, rev: str = "main") -> None:
        found = self.access(repo)
        commit = found.find(rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if self.flag("blobs"):
            for sibling in siblings:
                sibling.update(blob_details(commit.files[sibling["rfilename"]]))
        self.json(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit.id,
                "lastModified": commit.date,
                "createdAt": found.created,
                "private": found.private,
                "gated": found.gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            },
            headers={"X-Repo-Commit": commit.id},
        )

    def refs(self, repo: str) -> None:
        found = self.access(repo)
        refs = [
            {"name": n, "ref": n if n.startswith("refs/") else f"refs/heads/{n}", "targetCommit": c}
            for n, c in found.refs.items()
        ]
        pulls = [r for r in refs if r["name"].startswith("refs/pr/")]
        branches = [r for r in refs if r not in pulls]
        known = {"branches": branches, "converts": [], "tags": []}
        self.json({**known, "pullRequests": pulls} if self.flag("include_prs") else known)

    def commits(self, repo: str, rev: str) -> None:
        self.page(
            [
                {
                    "id": c.id,
                    "authors": [{"user": c.author}],
                    "date": c.date,
                    "title": c.message,
                    "message": c.description,
                }
                for c in self.access(repo).history(rev)
            ]
        )

    def create_branch(self, repo: str, rev: str) -> None:
        found, start = self.access(repo, write=True), self.read_json().get("startingPoint", "main")
        with self.hub.lock:
            if rev in found.refs:
                raise Refusal(409, f"Reference already exists: refs/heads/{rev}")
            found.refs[rev] = found.find(start).id
        self.json({}, 201)

    def delete_branch(self, repo: str, rev: str) -> None:
        found = self.access(repo, write=True)
        with self.hub.lock:
            if found.refs.pop(rev, None) is None:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        self.json({})

    def open_discussion(self, repo: str) -> None:
        found, author, asked = self.access(repo), self.needs_user(), self.read_json()
        with self.hub.lock:
            base = found.find("main") if asked.get("pullRequest") else None
            number = found.open_discussion(asked["title"], author, base)
        url = f"{self.hub.url}/{repo}/discussions/{number}"
        self.json({"num": number, "url": url, "pullRequest": base is not None})

    def discussion(self, repo: str, num: str) -> None:
        found = self.access(repo).discussions.get(int(num))
        if found is None:
            raise Refusal(404, "Discussion not found")
        self.json(found)

    # Files

    def tree(self, repo: str, rev: str, path: str = "") -> None:
        found = self.access(repo)
        history = found.history(rev)
        entries = self.entries(history, f"{path}/" if path else "", self.flag("recursive"))
        if path and not entries:
            raise Refusal(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
        self.page(entries)

    def entries(self, history: list[Commit], prefix: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders under a prefix."""
        folders: dict[str, list[Content]] = {}
        entries: list[dict[str, Any]] = []
        for path, content in sorted(history[0].files.items()):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            depth = len(inner) if recursive else min(len(inner), 2)
            for i in range(1, depth):
                folders.setdefault(prefix + "/".join(inner[:i]), []).append(content)
            if recursive or len(inner) == 1:
                entries.append({"type": "file", "path": path, **file_details(content)})
        for path, inside in folders.items():
            oid = git_sha1("".join(c.blob for c in inside).encode())
            entries.append({"type": "directory", "path": path, "oid": oid, "size": 0})
        if self.flag("expand"):
            for entry in entries:
                entry.update(last_change(history, entry["path"]))
        return sorted(entries, key=lambda e: e["path"])

    def paths_info(self, repo: str, rev: str) -> None:
        found = self.access(repo)
        raw = b"".join(self.body)
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(raw)
        else:
            asked = parse_qs(raw.decode())
            self.query["expand"] = asked.get("expand", ["false"])[-1]
        wanted = {path.strip("/") for path in asked.get("paths", [])}
        entries = self.entries(found.history(rev), "", True)
        self.json([entry for entry in entries if entry["path"] in wanted])

    def resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self.access(repo, content=True).find(rev)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        content = commit.files[path]
        if not content.lfs:
            if self.command == "HEAD":
                headers |= {"ETag": f'"{content.etag}"', "Accept-Ranges": "bytes"}
                return self.reply(200, [], content.size, headers)
            return self.send_content(content, headers)
        link = f"/cdn/{repo}/{content.sha256}"
        headers |= {
            "Location": self.hub.sign(self.hub.storage_url, link, filename=path),
            "X-Linked-Size": str(content.size),
            "X-Linked-ETag": f'"{content.etag}"',
            "Accept-Ranges": "bytes",
        }
        return self.reply(302, [], 0, headers)

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def page(self, items: list[dict[str, Any]]) -> None:
        """One page of a listing, with the link to the next."""
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.page_size
        headers = {}
        if stop < len(items):
            query = urlencode({**self.query, "cursor": stop})
            following = f"{self.hub.url}{urlsplit(self.path).path}?{query}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.json(items[start:stop], headers=headers)

    # Uploads

    def may_upload(self, repo_id: str, proposal: bool) -> Repo:
        """Whoever can read a repository may propose a change; pushing needs the right to write."""
        if proposal:
            self.needs_user()
        return self.access(repo_id, write=not proposal)

    def preupload(self, repo: str, rev: str) -> None:
        proposal = self.flag("create_pr") or rev.startswith("refs/pr/")
        files = self.may_upload(repo, proposal).find(rev).files
        answer = []
        for asked in self.read_json()["files"]:
            path, there = asked["path"], files.get(asked["path"])
            mode = "lfs" if self.hub.goes_to_lfs(path, asked["size"]) else "regular"
            told = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answer.append({**told, "oid": there.etag} if there else told)
        self.json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        asked = self.read_json()
        ref = asked.get("ref", {}).get("name")  # none given when it is for a pull request
        found = self.may_upload(repo, ref is None or ref.startswith("refs/pr/"))
        multipart = "multipart" in asked.get("transfers", [])
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if oid not in found.objects:
                verify = f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"
                upload = self.upload_action(repo, oid, size, multipart)
                objects[-1]["actions"] = {"upload": upload, "verify": {"href": verify}}
        self.json({"transfer": "basic", "objects": objects})

    def upload_action(self, repo: str, oid: str, size: int, multipart: bool) -> dict[str, Any]:
        link, chunk = f"/upload/{repo}/{oid}", self.hub.chunk_size
        if not multipart or size <= chunk:
            return {"href": self.hub.sign(self.hub.storage_url, f"{link}/{size}")}
        header = {"chunk_size": str(chunk)}
        for part, start in enumerate(range(0, size, chunk), 1):
            path = f"{link}/{min(chunk, size - start)}/{part}"
            header[str(part)] = self.hub.sign(self.hub.storage_url, path)
        # Completed at the Hub, but without a token, so that link is signed too.
        href = self.hub.sign(self.hub.url, "/api/complete_multipart", repo=repo, oid=oid)
        return {"href": href, "header": header}

    def complete_parts(self) -> None:
        self.hub.check_signature(self.path)
        repo, oid = self.query["repo"], self.query["oid"]
        stored = self.hub.parts.get((repo, oid), {})
        asked = {p["partNumber"]: p["etag"].strip('"') for p in self.read_json()["parts"]}
        if asked != {number: etag for number, (etag, _) in stored.items()}:
            raise Refusal(400, "InvalidPart")
        digest, path = hashlib.sha256(), self.hub.new_file()
        with path.open("wb") as file:
            for number in sorted(stored):
                for piece in Content(stored[number][1], True, oid).pieces(0, self.hub.chunk_size):
                    digest.update(piece)
                    file.write(piece)
        if digest.hexdigest() != oid:
            raise Refusal(400, f"BadDigest: the parts' sha256 is not {oid}")
        with self.hub.lock:
            self.hub.repos[repo].objects[oid] = Content(path, True, oid)
        self.json({"success": True})

    def lfs_verify(self, repo: str) -> None:
        asked = self.read_json()
        there = self.access(repo).objects.get(asked["oid"])
        if there is None or there.size != asked["size"]:
            raise Refusal(404, "Object not found")
        self.json({"message": "ok"})

    def commit(self, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in b"".join(self.body).splitlines() if line.strip()]
        head = lines[0]["value"]
        proposal = self.flag("create_pr")
        found = self.may_upload(repo, proposal or rev.startswith("refs/pr/"))
        author = self.needs_user()
        with self.hub.lock:  # all of it or nothing
            if rev not in found.refs:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            parent = found.find(rev)
            expected = head.get("parentCommit")
            if expected and proposal:
                parent = found.find(expected)
            elif expected and not parent.id.startswith(expected):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for line in lines[1:]:
                apply_change(found, files, line["key"], line["value"])
            summary, ref, answer = head["summary"], rev, {}
            if proposal:
                number = found.open_discussion(summary, author, parent)
                ref = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
            new = found.commit(ref, parent, files, summary, head.get("description", ""), author)
        url = f"{self.hub.url}/{repo}/commit/{new.id}"
        self.json({"success": True, "commitOid": new.id, "commitUrl": url, **answer})

    def validate_card(self) -> None:
        problems, warnings = card_problems(self.read_json()["content"])
        errors = [{"message": m} for m in problems]
        told = {"errors": errors, "warnings": [{"message": m} for m in warnings]}
        self.json(told, 400 if problems else 200)


def apply_change(repo: Repo, files: dict[str, Content], key: str, value: dict[str, Any]) -> None:
    """Carry out one line of a commit on its files."""
    path = value["path"]
    if key == "file":
        data = value["content"]
        raw = base64.b64decode(data) if value.get("encoding") == "base64" else data.encode()
        if path == "README.md" and (problems := card_problems(raw.decode())[0]):
            raise Refusal(400, f"Invalid metadata in README.md: {problems[0]}")
        files[path] = Content(raw, False)
    elif key == "lfsFile":
        if value["oid"] not in repo.objects:
            missing = "an LFS pointer pointed to a file that does not exist"
            raise Refusal(400, f"Your push was rejected because {missing}: {path}")
        files[path] = repo.objects[value["oid"]]
    elif key == "deletedFile":
        if path not in files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        inside = [p for p in files if p.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise Refusal(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for inner in inside:
            del files[inner]
    else:
        raise Refusal(400, f"Unknown operation: {key}")


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings that the Hub has for a model card: its base models must be model ids."""
    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    models, listed = [], False
    for line in found[1].splitlines():
        item = re.match(r"\s*-\s+(.*)" if listed else r"base_model:(.*)", line)
        if item and item[1].strip():
            models.append(item[1].strip().strip("'\""))
        listed = bool(item) and (listed or not item[1].strip())
    wrong = [m for m in models if not MODEL_ID.fullmatch(m)]
    hint = "is not valid. Use a model id from https://hf.co/models."
    return [f'"base_model" with value "{m}" {hint}' for m in wrong], []


def file_details(content: Content) -> dict[str, Any]:
    details: dict[str, Any] = {"size": content.size, "oid": content.blob}
    if content.lfs:
        lfs = {"size": content.size, "oid": content.sha256, "pointerSize": len(content.pointer)}
        details["lfs"] = lfs
    return details


def blob_details(content: Content) -> dict[str, Any]:
    """The same with the names that a model's siblings have."""
    details: dict[str, Any] = {"size": content.size, "blobId": content.blob}
    if content.lfs:
        size = len(content.pointer)
        details["lfs"] = {"size": content.size, "sha256": content.sha256, "pointerSize": size}
    return details


def last_change(history: list[Commit], path: str) -> dict[str, Any]:
    touched = (c for c in history if any(p == path or p.startswith(f"{path}/") for p in c.changed))
    commit = next(touched, history[-1])
    return {
        "lastCommit": {"id": commit.id, "title": commit.message, "date": commit.date},
        "securityFileStatus": {"status": "safe", "avScan": None, "pickleImportScan": None},
    }


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def stamp() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"

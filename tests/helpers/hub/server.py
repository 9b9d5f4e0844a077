"""The server, its state, and the handles by which tests use it."""

from __future__ import annotations

import hmac
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from helpers.hub.api import HubHandler
from helpers.hub.repositories import Commit, Content, Repo, User
from helpers.hub.storage import StorageHandler
from helpers.hub.traffic import Record, Refusal, Rule
from helpers.hub.wire import Listener

LFS_NAMES = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|npz|onnx|msgpack|zip|gz|zst)$")


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

    def answer(
        self, pattern: str, body: bytes, times: int = 1, method: str | None = None,
        headers: dict[str, str] | None = None, status: int = 200,
    ) -> None:  # fmt: skip
        rule = Rule("answer", pattern, method, times, status, headers or {}, body=body)
        self.rules.append(rule)

    def hang(self, pattern: str, after: int = -1, times: int = 99) -> None:
        self.rules.append(Rule("hang", pattern, None, times, after=after))

    def drip(self, pattern: str, pause: float, times: int = 99) -> None:
        """Send bodies byte by byte, with so many seconds between two."""
        self.rules.append(Rule("drip", pattern, None, times, pause=pause))

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

"""What the Hub holds: users, files, commits and repositories."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from helpers.hub.traffic import Refusal

PIECE = 1 << 18


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


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def stamp() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"

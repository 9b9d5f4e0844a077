"""A repository on the Hub to write to: what is in it, by hash, and one commit at a time.

All requests go through `huggingface_hub`: it chooses between Xet and LFS, retries, and skips what
the Hub has already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loratool.checkpoint.address import Address, parse
from loratool.checkpoint.answers import LOGIN, explained, logged_in, progress_bars
from loratool.checkpoint.hub import literal
from loratool.errors import HubError, LoginError, UsageError
from loratool.provenance import file_sha256


@dataclass(frozen=True)
class Upload:
    """A file to upload: its name in the repository, its content as a path or as bytes.

    `sha256` is known for files of which it was taken, when their time of change was `mtime_ns`.
    """

    name: str
    content: Path | bytes
    nbytes: int
    sha256: str = ""
    mtime_ns: int = 0

    @classmethod
    def of_file(cls, name: str, path: Path, sha256: str = "") -> Upload:
        """A file with its hash, taken now if it is not known."""
        before = path.stat()
        return cls(name, path, before.st_size, sha256 or file_sha256(path), before.st_mtime_ns)

    @property
    def has_changed(self) -> bool:
        """Whether the file is not any more what the hash was taken of."""
        if not isinstance(self.content, Path) or not self.sha256:
            return False
        try:
            now = self.content.stat()
        except FileNotFoundError:
            return True
        return (now.st_size, now.st_mtime_ns) != (self.nbytes, self.mtime_ns)

    def is_as(self, remote: str) -> bool:
        """Whether the Hub's hash of a file, sha256 or git's sha1, is that of this content."""
        if len(remote) == 64:
            return remote == (self.sha256 or hashlib.sha256(self._bytes()).hexdigest())
        data = self._bytes()
        return remote == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _bytes(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


@dataclass(frozen=True)
class Committed:
    """`url` of the repository, the branch or the pull request; `commit` is an id."""

    url: str
    commit: str
    pull_request: str = ""


class Repository:
    """A model repository to write to, at one branch (or `refs/pr/N`)."""

    def __init__(self, repo: str, revision: str = "main") -> None:
        from huggingface_hub import HfApi

        self.address = Address(repo, revision)
        self.repo, self.revision = repo, revision
        self.api = HfApi()
        #: The commit that `look` saw, "" where there is none yet, and the hash of its files.
        self.head = ""
        self.files: dict[str, str] = {}
        self.exists = False
        self.private = False

    @contextmanager
    def _talking(self) -> Iterator[None]:
        with explained(self.address, writing=True):
            yield

    def look(self) -> dict[str, str]:
        """The hash of every file by name, sha256 or git's sha1; {} where there is nothing yet."""
        from huggingface_hub import errors

        self.exists, self.head, self.files = False, "", {}
        with self._talking():
            try:
                self.private = bool(self.api.model_info(self.repo).private)
            except errors.GatedRepoError:
                raise
            except errors.RepositoryNotFoundError:
                if not logged_in():
                    raise
                return {}
            self.exists = True
            try:
                info = self.api.model_info(self.repo, revision=self.revision, files_metadata=True)
            except errors.RevisionNotFoundError:
                return {}
        self.head = str(info.sha)
        self.files = {
            f.rfilename: (f.lfs.sha256 if f.lfs else f.blob_id) or "" for f in info.siblings or []
        }
        return self.files

    def read(self, name: str) -> bytes:
        """A file as it is at the commit that `look` saw."""
        with self._talking(), progress_bars(False):
            path = self.api.hf_hub_download(self.repo, name, revision=self.head)
        return Path(path).read_bytes()

    def create(self, private: bool) -> None:
        """Make the repository and the branch, where they are missing."""
        with self._talking():
            if not self.exists:
                self.api.create_repo(self.repo, private=private or None, exist_ok=True)
                self.exists, self.private = True, private
            if self.revision != "main" and not self.revision.startswith("refs/"):
                self.api.create_branch(self.repo, branch=self.revision, exist_ok=True)
            self.head = str(self.api.model_info(self.repo, revision=self.revision).sha)

    def commit(
        self, uploads: Sequence[Upload], message: str, *, create_pr: bool = False,
        copied: Sequence[str] = (), source: str = "", quiet: bool = False,
    ) -> Committed:  # fmt: skip
        """Upload files, then make one commit of them all, on top of what `look` saw.

        `copied` names files that the revision `source` of the same repository has already. With
        `quiet` the library shows no bars.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy

        adds = []
        for upload in uploads:
            add = CommitOperationAdd(upload.name, upload.content)
            if upload.sha256:
                add.upload_info.sha256 = bytes.fromhex(upload.sha256)
            adds.append(add)
        copies = [CommitOperationCopy(name, name, src_revision=source) for name in copied]
        branch = None if self.revision == "main" else self.revision
        with self._talking(), progress_bars(not quiet):
            for add in adds:  # one after the other: what is up stays up if the next one fails
                self.api.preupload_lfs_files(
                    self.repo, [add], revision=branch, create_pr=create_pr, free_memory=False
                )
        _refuse_changed(uploads)
        before = self.head
        try:
            with self._talking():
                done = self.api.create_commit(
                    self.repo, [*copies, *adds], commit_message=message, revision=branch,
                    create_pr=create_pr, parent_commit=before or None,
                )  # fmt: skip
        except HubError:
            # The answer may be what got lost, not the commit.
            if create_pr or not self._holds(uploads, copied, source) or self.head == before:
                raise
            return Committed(self.url, self.head)
        if done.pr_revision:
            self.revision = str(done.pr_revision)
        if not self._holds(uploads, copied, source):
            raise HubError(
                f"{self.repo}: the Hub did not take all files into the commit {done.oid}.",
                "A .gitignore in the repository may forbid some; look at its files.",
            )
        return Committed(str(done.pr_url or self.url), self.head, str(done.pr_url or ""))

    def upload_many(
        self, folder: Path, uploads: Sequence[Upload], message: str, create_pr: bool
    ) -> None:
        """Upload very many files of a folder the library's resumable way, maybe in some commits.

        A pull request that it opens becomes what this repository writes to.
        """
        with self._talking(), progress_bars(True):
            done = self.api.upload_folder(
                repo_id=self.repo, folder_path=folder, commit_message=message,
                revision=None if self.revision == "main" else self.revision, create_pr=create_pr,
                allow_patterns=[literal(upload.name) for upload in uploads],
            )  # fmt: skip
            if done.pr_revision:
                self.revision = str(done.pr_revision)
            self.head = str(self.api.model_info(self.repo, revision=self.revision).sha)
        _refuse_changed(uploads)

    def _holds(self, uploads: Sequence[Upload], copied: Sequence[str], source: str) -> bool:
        """Whether the files are there now, by hash; `head` is the commit that was looked at."""
        there = self.look()
        staged = Repository(self.repo, source).look() if copied else {}
        return all(u.is_as(there.get(u.name, "")) for u in uploads) and all(
            there.get(name) == staged.get(name, "") for name in copied
        )

    def drop(self) -> None:
        """Remove the branch."""
        with self._talking():
            self.api.delete_branch(self.repo, branch=self.revision)

    @property
    def url(self) -> str:
        page = f"{self.api.endpoint}/{self.repo}"
        return page if self.revision == "main" else f"{page}/tree/{self.revision}"


def _refuse_changed(uploads: Sequence[Upload]) -> None:
    """Raise HubError where a file is not any more what its hash was taken of."""
    changed = [upload.name for upload in uploads if upload.has_changed]
    if changed:
        raise HubError(
            f"{changed[0]} changed while it was uploaded. Nothing was committed.",
            "Let what writes there finish; then push again.",
        )


def target_of(repo_id: str) -> str:
    """The repository that a user wants to write to. Raises UsageError for what is no id."""
    address = None if repo_id.startswith((".", "/", "~")) else parse(repo_id)
    if address is None or address.path:
        raise UsageError(f"{repo_id!r} is no repository id.", "Ids are org/name.")
    if address.revision:
        raise UsageError(
            f"{repo_id!r} names a revision.", f"Write {address.repo} --revision {address.revision}."
        )
    return address.repo


def open_target(repo_id: str, private: bool, dry_run: bool, revision: str | None) -> Repository:
    """A repository to write to, looked at but not made yet.

    Raises UsageError for no id, LoginError without a login (but for `dry_run`).
    """
    target = Repository(target_of(repo_id), revision or "main")
    if not (logged_in() or dry_run):
        raise LoginError("Writing to the Hub takes a login, and there is none.", f"Run {LOGIN}.")
    try:
        target.look()
    except LoginError:
        if not dry_run or logged_in():
            raise  # else: without a login, what is not there looks like what is private
    if private and target.exists and not target.private:
        raise UsageError(
            f"{target.repo} is there already, and public.",
            "Choose another name, or make it private on its settings page.",
        )
    return target

"""A repository on the Hub to write to: what is in it, by hash, and one commit at a time.

All requests go through `huggingface_hub`: it chooses between Xet and LFS, retries, and skips what
the Hub has already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratool.errors import HubError
from loratool.storage.hashing import BLAKE3, SHA256, digest_of, file_digests
from loratool.storage.hub.address import Address
from loratool.storage.hub.answers import commit_of, files_of, is_commit
from loratool.storage.hub.errors import explained, logged_in, progress_bars
from loratool.storage.hub.folder import literal
from loratool.storage.hub.patience import COMMIT, answered, going_on, limit_uploads
from loratool.storage.stamps import Stamp, stamp_of

#: Files up to this size, but for weights, are held from the look at them until they are sent.
_HELD = 5_000_000


@dataclass(frozen=True)
class Upload:
    """A file to upload: its name in the repository, its content as a path or as bytes.

    `sha256` is known for files on the disk; it was taken when they had `stamp` at `path`, and
    `digest` with it, of the kind that was asked for.
    """

    name: str
    content: Path | bytes
    nbytes: int
    sha256: str = ""
    path: Path | None = None
    stamp: Stamp | None = None
    digest: str = ""

    @classmethod
    def of_file(cls, name: str, path: Path, like: str = SHA256) -> Upload:
        """A file with its hash, and with its digest of the kind of `like`, taken now."""
        stamp = stamp_of(path)
        content: Path | bytes = path
        kinds = dict.fromkeys((SHA256, BLAKE3 if like.startswith(BLAKE3) else SHA256))
        if stamp.nbytes <= _HELD and path.suffix != ".safetensors":
            content = path.read_bytes()
            found = [digest_of(content, kind) for kind in kinds]
        else:
            found = file_digests(path, *kinds)
        return cls(name, content, stamp.nbytes, found[0], path, stamp, found[-1])

    @property
    def has_changed(self) -> bool:
        """Whether the file is not any more what the hash was taken of."""
        if self.path is None:
            return False
        try:
            return stamp_of(self.path) != self.stamp
        except FileNotFoundError:
            return True

    def is_as(self, remote: str) -> bool:
        """Whether the Hub's hash of a file, sha256 or git's sha1, is that of this content."""
        if len(remote) == 64 and self.sha256:
            return remote == self.sha256
        data = self.content.read_bytes() if isinstance(self.content, Path) else self.content
        if len(remote) == 64:
            return remote == hashlib.sha256(data).hexdigest()
        return remote == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


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
        limit_uploads()
        #: What `look` saw: the commit, "" where there is none yet, and its files' hashes.
        self.head = ""
        self.files: dict[str, str] = {}
        self.exists = False
        self.private = False
        #: The branch is not there; what was looked at is the main one, which it will start from.
        self.new_branch = False

    @contextmanager
    def _talking(self) -> Iterator[None]:
        with explained(self.address, writing=True):
            yield

    def look(self) -> dict[str, str]:
        """The hash of every file by name, sha256 or git's sha1; {} where there is nothing yet."""
        from huggingface_hub import errors

        self.exists, self.head, self.files, self.new_branch = False, "", {}, False
        with self._talking():
            try:
                info = self._info(self.revision)
            except errors.RevisionNotFoundError:
                if self.revision == "main" or self.revision.startswith("refs/"):
                    raise
                self.new_branch = True
                info = self._info("main")
            except errors.GatedRepoError:
                raise
            except errors.RepositoryNotFoundError:
                if not logged_in():
                    raise
                return {}
        self.exists, self.private, self.head = True, bool(info.private), commit_of(info, self.repo)
        self.files = {
            name: str((file.lfs.sha256 if file.lfs else file.blob_id) or "")
            for name, file in files_of(info, self.repo).items()
        }
        return self.files

    def _info(self, revision: str) -> Any:
        ask = partial(self.api.model_info, self.repo, revision=revision, files_metadata=True)
        return answered(ask, f"the files of {self.repo}")

    def read(self, name: str) -> bytes:
        """A file as it is at the commit that `look` saw."""
        with self._talking(), progress_bars(False):
            read = partial(self.api.hf_hub_download, self.repo, name, revision=self.head)
            path = answered(read, f"{name} of {self.repo}")
        return Path(path).read_bytes()

    def create(self, private: bool) -> None:
        """Make the repository and the branch, where `look` found them missing.

        Raises HubError for a repository that somebody else made since then.
        """
        if not self.exists:
            if self.revision.startswith("refs/"):
                raise HubError(f"{self.repo} is not there, so it has no {self.revision}.", "")
            with self._talking():
                make = partial(self.api.create_repo, self.repo, private=private or None)
                answered(make, f"a new repository {self.repo}")
                info = self._info("main")
                head = commit_of(info, self.repo)
            self.exists, self.private, self.head = True, bool(info.private), head
            self.new_branch = self.revision != "main"
        if self.new_branch:
            with self._talking():
                branch = partial(
                    self.api.create_branch, self.repo, branch=self.revision, revision=self.head
                )
                answered(branch, f"a new branch {self.revision} of {self.repo}")
            self.new_branch = False

    def commit(
        self, uploads: Sequence[Upload], message: str, *, create_pr: bool = False,
        copied: Mapping[str, str] | None = None, source: str = "", quiet: bool = False,
    ) -> Committed:  # fmt: skip
        """Upload files, then make one commit of them all, on top of what `look` saw.

        `copied` are files, with their hashes, that the commit `source` of the same repository has.
        With `quiet` the library shows no bars.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy

        adds = []
        for upload in uploads:
            add = CommitOperationAdd(upload.name, upload.content)
            if upload.sha256:
                add.upload_info.sha256 = bytes.fromhex(upload.sha256)
            adds.append(add)
        copied = copied or {}
        copies = [CommitOperationCopy(name, name, src_revision=source) for name in copied]
        branch = None if self.revision == "main" else self.revision
        try:
            with self._talking(), progress_bars(not quiet, (upload.name for upload in uploads)):
                send = partial(
                    self.api.preupload_lfs_files, self.repo, adds,
                    revision=branch, create_pr=create_pr, free_memory=False,
                )  # fmt: skip
                going_on(send, f"an upload to {self.repo}")
        except HubError:
            _refuse_changed(uploads)  # the storage refuses what has another hash than announced
            raise
        _refuse_changed(uploads)
        before = self.head
        try:
            with self._talking():
                commit = partial(
                    self.api.create_commit,
                    self.repo, [*copies, *adds], commit_message=message, revision=branch,
                    create_pr=create_pr, parent_commit=before or None,
                )  # fmt: skip
                done = answered(commit, f"a commit to {self.repo}", COMMIT)
        except HubError:
            # The answer may be what got lost, not the commit.
            if create_pr or not self._holds(uploads, copied) or self.head == before:
                raise
            return Committed(self.url, self.head)
        if done.pr_revision:
            self.revision = str(done.pr_revision)
        # An unanswered check does not void the commit.
        if self._holds(uploads, copied) is False:
            raise HubError(
                f"{self.repo}: the commit {str(done.oid)[:40]} does not hold what was sent.",
                "A .gitignore in the repository may forbid some files, or somebody else committed "
                "right after it; look at its files.",
            )
        if is_commit(done.oid):
            self.head = str(done.oid)
        return Committed(str(done.pr_url or self.url), self.head, str(done.pr_url or ""))

    def upload_many(self, folder: Path, uploads: Sequence[Upload], message: str) -> None:
        """Upload very many files of a folder the library's resumable way, in several commits."""
        _refuse_changed(uploads)
        if self.new_branch:
            self.create(self.private)
        with self._talking(), progress_bars(True, (upload.name for upload in uploads)):
            upload = partial(
                self.api.upload_folder,
                repo_id=self.repo, folder_path=folder, commit_message=message,
                revision=self.revision, allow_patterns=[literal(u.name) for u in uploads],
            )  # fmt: skip
            going_on(upload, f"an upload to {self.repo}")
        there = self.look()
        wrong = [u.name for u in uploads if not u.is_as(there.get(u.name, ""))]
        if wrong:
            raise HubError(
                f"{wrong[0]} changed while it was uploaded. Nothing was committed to the main "
                "branch.",
                "Let what writes there finish; then push again.",
            )

    def _holds(self, uploads: Sequence[Upload], copied: Mapping[str, str]) -> bool | None:
        """Look whether the files are there now, by hash; None if the Hub does not say."""
        try:
            there = self.look()
        except HubError:
            return None
        return all(u.is_as(there.get(u.name, "")) for u in uploads) and all(
            there.get(name) == digest for name, digest in copied.items()
        )

    def drop(self) -> None:
        """Remove the branch."""
        with self._talking():
            drop = partial(self.api.delete_branch, self.repo, branch=self.revision)
            answered(drop, f"the end of its branch {self.revision}")

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

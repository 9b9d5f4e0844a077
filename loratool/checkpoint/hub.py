"""Repositories of the Hugging Face Hub as folders: headers by range requests, files by the cache.

All of it goes through `huggingface_hub`, which keeps the cache, the login, the retries and the
endpoint; HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loratool.checkpoint.folder import Folder, Place, origin_of
from loratool.errors import FileError, HubError, LoginError, LoraToolError, call, nearest

SCHEME = "hf://"
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")
_ADDRESS = re.compile(
    r"(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<revision>refs/(pr|convert)/[^/@\s]+|[^/@\s]+))?"
    r"(/(?P<path>.+?))?/?"
)
#: A path with such an ending means a file on the disk.
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".gguf", ".zip")

#: Bytes of a header that are fetched at once; most headers are shorter.
_FIRST_BYTES = 100_000

#: A download of fewer bytes is over before a progress bar is read.
_WORTH_A_BAR = 10_000_000


class Address(NamedTuple):
    """A repository, a revision of it, and a folder or a file inside."""

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        text = self.repo + (f"@{self.revision}" if self.revision else "")
        return f"{SCHEME}{text}/{self.path}" if self.path else text


def parse(text: str) -> Address | None:
    """The address that `org/name`, `org/name@revision` or `hf://org/name/sub/folder` stands for.

    None for what can only be a path. Raises FileError for an `hf://` that is none.
    """
    if text.startswith(SCHEME):
        found = _ADDRESS.fullmatch(text.removeprefix(SCHEME).removeprefix("models/"))
        if found is None or ".." in (found["path"] or "").split("/"):
            raise FileError(
                f"{text}: not an address on the Hub.",
                "Write hf://org/name, hf://org/name@revision or hf://org/name/folder.",
            )
        return Address(found["repo"], found["revision"], found["path"] or "")
    found = _ID.fullmatch(text)
    if found is None or text.lower().endswith(_FILES):
        return None
    return Address(found["repo"], found["revision"])


def locate(source: str | Path) -> Place:
    """The folder or file that `source` names: a path if there is one, a place on the Hub otherwise.

    For a path that does not exist and cannot be a Hub id, the folder is one that does not exist.
    Raises FileError, HubError and LoginError for what is not found, naming both readings.
    """
    path = Path(source)
    address = parse(str(source)) if isinstance(source, str) else None
    if address is None or os.path.lexists(path):
        return Place(Folder(path.parent), path.name) if path.is_file() else Place(Folder(path))
    try:
        return _open(address)
    except HubError as error:
        if str(source).startswith(SCHEME):
            raise
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        guess = f"Did you mean the path {path.with_name(near)}? " if near else ""
        raise type(error)(
            f"{source}: no such file or directory here; read as a Hub id: {error.message}",
            guess + error.hint,
        ) from error


def _open(address: Address) -> Place:
    sizes, commit = _listing(address)
    root = _snapshot(address, commit)
    label = Address(address.repo, address.revision)
    call(root, f"{SCHEME}{label}" if address.path else str(label))
    prefix = f"{address.path}/" if address.path else ""
    if sizes is None:  # the Hub cannot be reached: what the cache has is all there is
        path = root / address.path
        return Place(Folder(path.parent), path.name) if path.is_file() else Place(Folder(path))
    if address.path in sizes:
        folder, _, file = address.path.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        return Place(HubFolder(address.repo, commit, root, prefix, sizes), file)
    if not any(name.startswith(prefix) for name in sizes):
        raise HubError(
            f"{address}: the repository has no such file or folder.",
            f"It holds: {', '.join(sorted({n.partition('/')[0] for n in sizes})[:8])}.",
        )
    return Place(HubFolder(address.repo, commit, root, prefix, sizes))


def _listing(address: Address) -> tuple[dict[str, int] | None, str]:
    """Sizes by file name, and the commit; (None, commit) where only the cache can tell."""
    from huggingface_hub import HfApi

    try:
        with explained(address):
            info = HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
    except Unreachable:
        commit = _cached_commit(address)
        if commit is None:
            raise
        return None, commit
    return {f.rfilename: f.size or 0 for f in info.siblings or []}, str(info.sha)


def _cached_commit(address: Address) -> str | None:
    """The commit that the cache knows the revision by."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            address.repo, revision=address.revision, local_files_only=True, allow_patterns=[]
        )
    except Exception:  # whatever the library says, it is not there
        return None
    return Path(found).name


def _snapshot(address: Address, commit: str) -> Path:
    from huggingface_hub import constants

    repo = "models--" + address.repo.replace("/", "--")
    return Path(constants.HF_HUB_CACHE) / repo / "snapshots" / commit


class HubFolder(Folder):
    """A folder of a repository at one commit; `path` is its place in the download cache."""

    def __init__(
        self, repo: str, commit: str, root: Path, prefix: str, sizes: dict[str, int]
    ) -> None:
        super().__init__(root / prefix if prefix else root)
        self.repo, self.commit = repo, commit
        self._prefix = prefix
        self._sizes = {
            name.removeprefix(prefix): size
            for name, size in sizes.items()
            if name.startswith(prefix)
        }
        self._brought: set[str] = set()
        self._files: Any = None

    def is_there(self) -> bool:
        return True

    def names(self, depth: int | None = None) -> list[str]:
        return sorted(n for n in self._sizes if depth is None or n.count("/") <= depth)

    def has(self, name: str) -> bool:
        return name in self._sizes

    @contextmanager
    def reading(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        if (self.path / name).is_file():
            with super().reading(name) as found:
                yield found
            return
        size = self._sizes[name]
        with explained(Address(self.repo, self.commit)), self._stream(name, size) as stream:
            yield stream, size

    def _stream(self, name: str, size: int) -> Any:
        from huggingface_hub import HfFileSystem

        if self._files is None:
            self._files = HfFileSystem()
        place = f"{self.repo}@{self.commit}/{self._prefix}{name}"
        return self._files.open(place, "rb", block_size=_FIRST_BYTES, size=size)

    def missing(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes to download, by name, before all of `names` are on the disk."""
        return {n: self._sizes[n] for n in names if n in self._sizes and not self._is_here(n)}

    def _is_here(self, name: str) -> bool:
        return (self.path / name).is_file()

    def fetch(self, names: Iterable[str]) -> None:
        wanted = self.missing(names)
        if not wanted:
            return
        from huggingface_hub import snapshot_download

        shows = sum(wanted.values()) > _WORTH_A_BAR
        with explained(Address(self.repo, self.commit)), progress_bars(shows):
            snapshot_download(
                self.repo,
                revision=self.commit,
                allow_patterns=[literal(self._prefix + name) for name in wanted],
            )
        for name, size in wanted.items():
            found = (self.path / name).stat().st_size if self._is_here(name) else -1
            if found != size:
                raise HubError(
                    f"{self.repo}: {name} came with {max(found, 0)} bytes instead of {size}.",
                    "Run the command again; what is complete is not downloaded twice.",
                )
        self._brought |= wanted.keys()

    def let_go(self, names: Iterable[str]) -> None:
        for name in self._brought & set(names):
            path = self.path / name
            # The cache keeps the content beside the snapshots and links to it.
            content = path.resolve()
            path.unlink(missing_ok=True)
            if content != path and origin_of(path) is not None:
                content.unlink(missing_ok=True)
            self._brought.discard(name)


def literal(name: str) -> str:
    """`name` as a glob that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Let the library show its bars, on a terminal alone and if the user lets it."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if (shown and sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


class Unreachable(HubError):
    """No answer from the Hub: no network, or HF_HUB_OFFLINE."""


@contextmanager
def explained(address: Address, writing: bool = False) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into errors for people."""
    try:
        yield
    except LoraToolError:
        raise
    except Exception as error:
        found = _explanation(error, address, writing)
        if found is None:
            raise
        raise found from error


def _explanation(error: Exception, address: Address, writing: bool) -> HubError | None:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{address.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        text = f"{address.repo} is gated: who wants to read it must ask at {page}."
        if logged_in():
            return HubError(text, "The account you are logged in with has no access yet.")
        return LoginError(text, f"Ask for access there, then log in: {LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        if logged_in():
            return HubError(
                f"{address.repo}: no such repository on the Hub, or not for your account.",
                f"Check the name at {page}.",
            )
        return LoginError(
            f"{address.repo}: no such repository on the Hub, or a private one, and you are not "
            "logged in.",
            f"Check the name; for a private repository log in: {LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{address.repo} has no revision {address.revision!r}.",
            f"Its branches and tags are at {page}/tree/main.",
        )
    if status == 401:
        return LoginError(
            "The Hub does not know the token that you are logged in with."
            if logged_in()
            else "The Hub asks for a login.",
            f"Log in again: {LOGIN}",
        )
    if status == 403:
        what = f"write to {address.repo}" if writing else f"read {address.repo}"
        return LoginError(
            f"The Hub does not let this login {what}{_said(error)}.",
            f"Use a token that may {'write' if writing else 'read'} there: {LOGIN}",
        )
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{address.repo}: not a repository id ({error}).", "Ids are org/name.")
    if isinstance(error, errors.OfflineModeIsEnabled) or (
        isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return Unreachable(
            f"{address}: not in the download cache, and HF_HUB_OFFLINE is set.",
            "Unset HF_HUB_OFFLINE to download it.",
        )
    if status == 429:
        return HubError("The Hub asks for fewer requests (429).", "Wait a few minutes; try again.")
    if status is not None:
        return HubError(
            f"The Hub answered {status} for {address.repo}{_said(error)}.",
            "Try again later." if status >= 500 else f"Look at {page}.",
        )
    family = type(error).__module__.partition(".")[0]
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError) or (
        family in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    ):
        return Unreachable(
            f"{address.repo}: the Hub at {constants.ENDPOINT} cannot be reached, or broke off.",
            "Check the network and try again; HF_HUB_OFFLINE=1 uses what the cache has.",
        )
    return None


LOGIN = "hf auth login (or set HF_TOKEN)"


def logged_in() -> bool:
    """Whether there is a token, stored or in HF_TOKEN."""
    from huggingface_hub import get_token

    return get_token() is not None


def _said(error: Exception) -> str:
    """What the Hub gave as reason, in brackets."""
    message = getattr(error, "server_message", None)
    return f" ({str(message).strip().rstrip('.')})" if message else ""

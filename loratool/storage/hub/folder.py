"""Repositories of the Hugging Face Hub as folders: headers by range requests, files by the cache.

All of it goes through `huggingface_hub`, which keeps the cache, the login, the retries and the
endpoint; HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from loratool.errors import FileError, HubError, OutputError, nearest, show_as
from loratool.storage.folder import CachedFolder, Folder, Location, snapshot_of
from loratool.storage.hub.address import Address, other_reading, parse
from loratool.storage.hub.answers import commit_of, files_of
from loratool.storage.hub.errors import explained, progress_bars
from loratool.storage.hub.patience import PatientStream, Unreachable, answered, going_on
from loratool.storage.stamps import Stamp
from loratool.words import format_bytes

#: Bytes of a header that are fetched at once; most headers are shorter.
_FIRST_BYTES = 100_000

#: A download of fewer bytes is over before a progress bar is read.
_WORTH_A_BAR = 10_000_000


def locate(source: str | Path) -> Location:
    """The folder or file that `source` names: a path if there is one, a place on the Hub otherwise.

    For a path that does not exist and cannot be a Hub id, the folder is one that does not exist.
    Raises FileError, HubError and LoginError for what is not found, naming both readings.
    """
    path = Path(source)
    address = parse(str(source)) if isinstance(source, str) else None
    if address is None or os.path.lexists(path):
        if path.is_file():
            return Location(Folder(path.parent), path.name)
        snapshot, note = snapshot_of(path)
        return Location(Folder(snapshot), note=note)
    try:
        return _open(address)
    except HubError as error:
        if str(source).lower().startswith(("hf:", "http:", "https:")):
            raise
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        guess = f"Did you mean the path {path.with_name(near)}? " if near else ""
        raise type(error)(
            f"{source}: no such file or directory here; and as a Hub id: "
            f"{error.message.removeprefix(f'{address.repo}: ')}",
            guess + error.hint,
        ) from error


def not_there(source: str | Path, path: Path) -> FileError:
    """The error for a path where no file and no folder is, and that cannot be a Hub id."""
    if path.exists():
        return FileError(f"{source}: a pipe, a socket or a device, not a file.", "Check the path.")
    if path.is_symlink():
        return FileError(
            f"{source}: a broken link, to {os.readlink(path)}.", "Check where it should lead."
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return FileError(
        f"{source}: no such file or directory.",
        f"Did you mean {path.with_name(near)}?"
        if near
        else "Check the path." + other_reading(str(source)),
    )


def _open(address: Address) -> Location:
    sizes, commit, private = _listing(address)
    root = _snapshot(address, commit)
    label = Address(address.repo, address.revision)
    show_as(root, str(label))
    prefix = f"{address.path}/" if address.path else ""
    if sizes is None:  # the Hub cannot be reached: what the cache has is all there is
        path = root / address.path
        if path.is_file():
            return Location(CachedFolder(path.parent), path.name)
        return Location(CachedFolder(path))
    _remember(root, address.revision or "main", commit)
    if address.path in sizes:
        folder, _, file = address.path.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        return Location(HubFolder(address, commit, root, prefix, sizes, private), file)
    if not sizes.keys() - {".gitattributes"}:
        raise HubError(f"{address}: the repository is empty.", "Nothing was pushed to it yet.")
    if not any(name.startswith(prefix) for name in sizes):
        raise HubError(
            f"{address}: the repository has no such file or folder.",
            f"It holds: {', '.join(sorted({n.partition('/')[0] for n in sizes})[:8])}.",
        )
    return Location(HubFolder(address, commit, root, prefix, sizes, private))


def _listing(address: Address) -> tuple[dict[str, int] | None, str, bool]:
    """Sizes by file name, the commit, and if it is private; no sizes where only the cache tells."""
    from huggingface_hub import HfApi

    try:
        with explained(address):
            ask = partial(
                HfApi().model_info, address.repo, revision=address.revision, files_metadata=True
            )
            info = answered(ask, f"the files of {address}")
    except Unreachable:
        commit = _cached_commit(address)
        if commit is None:
            raise
        return None, commit, False
    sizes = {name: file.size or 0 for name, file in files_of(info, address.repo).items()}
    return sizes, commit_of(info, address.repo), bool(info.private)


def _remember(root: Path, revision: str, commit: str) -> None:
    """Note the commit of a branch or a tag where the cache has such notes, for times offline.

    The library does so only when it is asked for the revision by its name. A note stays where the
    commit that it names has files in the cache that this one has not.
    """
    note = root.parent.parent / "refs" / revision
    if revision == commit:
        return
    with suppress(OSError):
        if note.is_file():
            before = root.with_name(note.read_text(encoding="utf-8").strip())
            if before.is_dir() and any(not (root / n).exists() for n in Folder(before).names()):
                return
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f".{note.name}.{os.getpid()}")
        draft.write_text(commit, encoding="utf-8")
        os.replace(draft, note)


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
        self,
        address: Address,
        commit: str,
        root: Path,
        prefix: str,
        sizes: dict[str, int],
        private: bool,
    ) -> None:
        super().__init__(root / prefix if prefix else root)
        self.repo, self.commit = address.repo, commit
        self._revision = address.revision or "main"
        self.private = private
        self._root, self._prefix = root, prefix
        self._sizes = {
            name.removeprefix(prefix): size
            for name, size in sizes.items()
            if name.startswith(prefix)
        }
        #: Bytes that one fetch may download; who only looks at headers sets a limit.
        self.most: int | None = None
        self._brought: set[str] = set()
        self._unfinished = set(self._halves())
        self._files: Any = None

    def inside(self, name: str) -> Folder:
        sizes = {self._prefix + key: size for key, size in self._sizes.items()}
        address = Address(self.repo, self._revision)
        prefix = f"{self._prefix}{name}/"
        folder = HubFolder(address, self.commit, self._root, prefix, sizes, self.private)
        folder._seen = self._seen
        folder.most = self.most
        return folder

    def is_there(self) -> bool:
        return True

    def names(self, depth: int | None = None) -> list[str]:
        return sorted(n for n in self._sizes if depth is None or n.count("/") <= depth)

    def has(self, name: str) -> bool:
        return name in self._sizes

    @contextmanager
    def reading(self, name: str) -> Iterator[tuple[BinaryIO, int, Stamp | None]]:
        if (self.path / name).is_file():
            with super().reading(name) as found:
                yield found
            return
        size = self._sizes[name]
        what = f"{name} of {self.repo}"
        with explained(Address(self.repo, self.commit)):
            stream = answered(partial(self._stream, name, size), what)
            try:
                yield cast(BinaryIO, PatientStream(stream, what)), size, None
            finally:
                stream.close()

    def _stream(self, name: str, size: int) -> Any:
        from huggingface_hub import HfFileSystem

        if self._files is None:
            self._files = HfFileSystem()
        place = f"{self.repo}@{self.commit}/{self._prefix}{name}"
        return self._files.open(place, "rb", block_size=_FIRST_BYTES, size=size)

    def missing(self, names: Iterable[str]) -> dict[str, int]:
        return {n: self._sizes[n] for n in names if n in self._sizes and not self._is_here(n)}

    def _is_here(self, name: str) -> bool:
        return (self.path / name).is_file()

    def fetch(self, names: Iterable[str]) -> None:
        names = list(names)
        wanted = self.missing(names)
        if self.most is not None and sum(wanted.values()) > self.most:
            raise HubError(
                f"{self.repo}: {next(iter(wanted))} tells nothing before it is downloaded "
                f"({format_bytes(sum(wanted.values()))}).",
                f"loratool inspect {self.repo} downloads it.",
            )
        if wanted:
            self._download(wanted)
        self.note(names)

    def _download(self, wanted: dict[str, int]) -> None:
        from huggingface_hub import snapshot_download

        # What another revision brought into the cache is not this run's to remove.
        contents = self._contents
        before = {p.name for p in contents.iterdir()} if contents.is_dir() else set()
        shows = sum(wanted.values()) > _WORTH_A_BAR
        _refuse_full_cache(self._root, sum(wanted.values()))
        with explained(Address(self.repo, self.commit)), progress_bars(shows, wanted):
            download = partial(
                snapshot_download,
                self.repo,
                revision=self.commit,
                allow_patterns=[literal(self._prefix + name) for name in wanted],
            )
            going_on(download, f"the files of {self.repo}", self._arrived)
        for name, size in wanted.items():
            found = (self.path / name).stat().st_size if self._is_here(name) else -1
            if found != size:
                raise HubError(
                    f"{self.repo}: {name} did not come whole ({max(found, 0)} of {size} bytes).",
                    "Run the command again; what is complete is not downloaded twice.",
                )
            if _linked(self.path / name).name not in before:
                self._brought.add(name)
        _remember(self._root, self._revision, self.commit)

    def _halves(self) -> Iterator[Path]:
        return self._contents.glob("*.incomplete")

    def _arrived(self) -> int:
        """Bytes in the cache's store, which grow while a download goes on."""
        total = 0
        for path in self._contents.glob("*"):
            with suppress(OSError):
                total += path.stat().st_blocks * 512 or path.stat().st_size
        return total

    @property
    def _contents(self) -> Path:
        """Where the cache keeps what the snapshots link to."""
        return self._root.parent.parent / "blobs"

    def sweep(self) -> None:
        for path in set(self._halves()) - self._unfinished:
            path.unlink(missing_ok=True)

    def let_go(self, names: Iterable[str]) -> None:
        for name in self._brought & set(names):
            path = self.path / name
            # The cache keeps the content beside the snapshots and links to it.
            content = _linked(path)
            path.unlink(missing_ok=True)
            self._seen.pop(path, None)
            others = self._root.parent.glob("*/" + literal(self._prefix + name))
            # Repositories may share contents: those are links to where they lie.
            own = content.parent == self._contents and not content.is_symlink()
            if own and not any(_linked(other) == content for other in others):
                content.unlink(missing_ok=True)
            self._brought.discard(name)


def _linked(path: Path) -> Path:
    """What a link names, without following it further; the path itself if it is none."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path


def _refuse_full_cache(root: Path, needed: int) -> None:
    place = next(p for p in root.parents if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"The download takes {format_bytes(needed)}, and {format_bytes(free)} are free at the "
            f"download cache, {root.parents[2]}.",
            "Free some space, or set HF_HOME to a place on another disk.",
        )


def literal(name: str) -> str:
    """`name` as a glob that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)

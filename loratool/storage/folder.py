"""The files of a model or an adapter by name: a folder on the disk, or one on the Hub.

Whoever opens a checkpoint asks a `Folder` what is there and reads headers through it; tensor data
is read from the paths of the files, once `fetch` has seen to it that they are on the disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loratool.errors import FileError, listed
from loratool.storage.bounded import open_regular
from loratool.storage.jsonfile import read_json
from loratool.storage.stamps import Stamp, changed_file, stamp_of
from loratool.storage.yamltext import read_yaml_file


@dataclass(frozen=True)
class Origin:
    """Where on the Hub a file or a folder comes from: repository, commit, path inside."""

    repo: str
    revision: str
    path: str = ""

    @property
    def name(self) -> str:
        """What people call it: the last part."""
        return (self.path or self.repo).rpartition("/")[2]


def cached_repository(path: Path) -> Path | None:
    """The folder of the repository in a download cache that `path` lies in; None elsewhere.

    A cache keeps files under `models--org--name/snapshots/<commit>/`.
    """
    folders = (path, *path.parents)
    found = (f.parent for f in folders[1:] if f.name == "snapshots")
    return next((repo for repo in found if repo.name.startswith("models--")), None)


def origin_of(path: Path) -> Origin | None:
    """Where `path` comes from, told from its place in a download cache; None elsewhere."""
    repository = cached_repository(path.absolute())
    if repository is None:
        return None
    revision, *inside = path.absolute().relative_to(repository / "snapshots").parts
    repo = repository.name.removeprefix("models--").replace("--", "/")
    return Origin(repo, revision, "/".join(inside))


def snapshot_of(path: Path) -> tuple[Path, str]:
    """The snapshot that the folder of a repository in a download cache stands for, and why it is
    that one: the commit of `main`, else the only one there; `path` and "" for any other folder.

    Raises FileError where several could be meant, or none is there.
    """
    named = path.absolute()
    repository = named.parent if named.name == "snapshots" else named
    of_cache = any((repository / inner).is_dir() for inner in ("snapshots", "refs", "blobs"))
    if not repository.name.startswith("models--") or not of_cache:
        return path, ""
    snapshots = repository / "snapshots"
    inside = snapshots.iterdir() if snapshots.is_dir() else ()
    there = {p.name: p for p in inside if p.is_dir()}
    main = ""
    with suppress(OSError, UnicodeError):
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    if main in there:
        why = f"{main}, the commit of main"
    elif len(there) == 1:
        main = next(iter(there))
        why = f"{main}, the only one"
    else:
        repo = repository.name.removeprefix("models--").replace("--", "/")
        if not there:
            raise FileError(
                f"{path}: a folder of the download cache without a snapshot: the download was not "
                "finished, or its files were removed.",
                f"Fetch it: hf download {repo}, or give {repo} itself.",
            )
        raise FileError(
            f"{path}: a folder of the download cache with {len(there)} snapshots, and which one is "
            f"main is not known:\n{listed(sorted(there), shown=8)}",
            f"Name one of them, for instance {there[max(there)]}.",
        )
    text = f"{path.name} is a folder of the download cache; its snapshot {why}, was taken."
    return there[main], text


#: What is said of a name that leads to no file; everything else is a fault of the disk.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}


class Folder:
    """A directory on the disk. Names are relative paths with slashes."""

    #: Whether only some may see it: a private repository.
    private = False
    #: What to do about a file that is not here.
    remedy = "Finish the download."

    def __init__(self, path: Path) -> None:
        self.path = path
        #: What every file was when this run first saw it, also those of the folders in it.
        self._seen: dict[Path, Stamp] = {}

    def inside(self, name: str) -> Folder:
        """The folder of this name in it."""
        folder = type(self)(self.path / name)
        folder._seen = self._seen
        return folder

    def is_there(self) -> bool:
        return self.path.is_dir()

    def names(self, depth: int | None = None) -> list[str]:
        """Every file below, sorted. Hidden folders and links to folders are not entered, but named
        with a slash at their end. With `depth` only that many levels of folders are entered.
        """

        def fail(error: OSError) -> None:
            raise error

        found: list[str] = []
        for place, folders, files in os.walk(self.path, onerror=fail):
            where = Path(place).relative_to(self.path)
            found += [str(where / name) for name in files]
            closed = [
                name
                for name in folders
                if name.startswith(".") or (Path(place) / name).is_symlink()
            ]
            found += [f"{where / name}/" for name in closed]
            enter = depth is None or len(where.parts) < depth
            folders[:] = [name for name in folders if enter and name not in closed]
        return sorted(found)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name. Raises OSError where the disk does not tell."""
        try:
            return stat.S_ISREG(os.stat(self.path / name).st_mode)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        except ValueError:  # a name that no file can have
            pass
        return False

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file. Raises FileError for anything else."""
        self.fetch([name])
        return read_json(self.path / name)

    def yaml(self, name: str) -> dict[str, Any]:
        """The mapping in a YAML file. Raises FileError for anything else."""
        self.fetch([name])
        return read_yaml_file(self.path / name)

    @contextmanager
    def reading(self, name: str) -> Iterator[tuple[BinaryIO, int, Stamp | None]]:
        """A stream of a file that can be sought, its size in bytes, and its stamp, None for one
        that is read over the network."""
        path = self.path / name
        try:
            with open_regular(path) as stream:
                stamp = stamp_of(stream.fileno())
                self._hold(path, stamp)
                yield stream, stamp.nbytes, stamp
        except OSError as error:
            error.filename = error.filename or str(path)  # reads do not know it
            raise

    def ranges(self, name: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """What is in a file at these places, each a first byte and how many; fewer at its end."""
        found = []
        with self.reading(name) as (stream, _, _):
            for start, count in places:
                stream.seek(start)
                found.append(stream.read(count))
        return found

    def missing(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes that `fetch` would download, by name; nothing for what is on this disk."""
        return {}

    def fetch(self, names: Iterable[str]) -> None:
        """See to it that these files are on the disk, where `path` says, and `note` them."""
        self.note(names)

    def note(self, names: Iterable[str]) -> None:
        """Know these files again, as far as they are on this disk.

        Raises FileError for one that is not any more what it was when it was first seen.
        """
        for name in names:
            with suppress(OSError, ValueError):  # whoever opens it says what is wrong with it
                self._hold(self.path / name, stamp_of(self.path / name))

    def _hold(self, path: Path, stamp: Stamp) -> None:
        if self._seen.setdefault(path, stamp) != stamp:
            raise changed_file(path)

    def nbytes_of(self, files: Iterable[Path]) -> int:
        """Bytes of files that are noted; the disk is not asked again."""
        return sum(self._seen[path].nbytes for path in files)

    def refuse_changed(self) -> None:
        """Raise FileError if a file that this run has read is not any more what it was.

        Tensors are held against their stamps at each reading; this is for the rest: configs,
        tokenizers, whatever is hashed or copied whole.
        """
        for path, stamp in self._seen.items():
            try:
                same = stamp_of(path) == stamp
            except OSError:
                same = False
            if not same:
                raise changed_file(path)

    def let_go(self, names: Iterable[str]) -> None:
        """Give back the disk space of what `fetch` brought in this run, and nothing else."""

    def sweep(self) -> None:
        """Remove what downloads of this run left that were stopped."""


class CachedFolder(Folder):
    """What the download cache has of a repository while the Hub cannot be asked."""

    remedy = (
        "The Hub cannot be asked, and the download cache holds only a part. "
        "Try again with a network, and without HF_HUB_OFFLINE."
    )


class Location(NamedTuple):
    """What somebody pointed at: a folder, or with `file` one file in it; `note` says how it was
    found, where that is not plain."""

    folder: Folder
    file: str = ""
    note: str = ""

    @property
    def path(self) -> Path:
        return self.folder.path / self.file if self.file else self.folder.path

"""Links among the files that are copied or uploaded: none may bring what lies outside its folder.

A folder that somebody else made can link to any file of whoever works on it. Weights may be links
to anywhere, since only tensors are read of them; what goes along as a file must lie in the folder,
or in the download cache's own stores. (A hard link looks like a file, and is one.)
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import BinaryIO

from loratool.errors import FileError
from loratool.storage.bounded import open_regular
from loratool.storage.folder import cached_repository


def leads_out(path: Path, name: str) -> bool:
    """Whether `path`, the file `name` of its folder, lies elsewhere once links are followed."""
    return _own_place(path, name) is None


def refuse_leading_out(files: Mapping[str, Path]) -> None:
    """Raise FileError where one of these files, by name in its folder, lies outside of it."""
    for name, path in files.items():
        if leads_out(path, name):
            raise _leading_out(path, name)


def open_own(path: Path, name: str) -> BinaryIO:
    """The file `name` of its folder, at `path`, to be copied. What is looked at is what is open.

    Raises FileError for a link out of the folder, and for what is no file: a pipe would never end.
    """
    if path.is_symlink() and not path.exists():
        raise FileError(f"{path}: a broken link.", "Put the file there, or remove this.")
    stream = open_regular(path)
    try:
        place = _own_place(path, name)
        if place is None or not os.path.samestat(os.fstat(stream.fileno()), os.lstat(place)):
            raise _leading_out(path, name)
    except BaseException:
        stream.close()
        raise
    return stream


def copy_own(path: Path, name: str, target: Path) -> None:
    """Copy the file `name` of its folder, at `path`, to `target`, whose folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_own(path, name) as stream, target.open("wb") as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)


def _leading_out(path: Path, name: str) -> FileError:
    return FileError(
        f"{path}: a link out of its folder, to {os.path.realpath(path)}. Such a file does not go "
        "along.",
        "If it belongs there, make a copy with what the links lead to, and use that: "
        f"cp -rL {shlex.quote(str(_folder(path, name)))} COPY.",
    )


def _folder(path: Path, name: str) -> Path:
    return path.parents[len(PurePath(name).parts) - 1]


def _own_place(path: Path, name: str) -> Path | None:
    """Where the file lies in truth; None outside its folder."""
    folder, place = (Path(os.path.realpath(p)) for p in (_folder(path, name), path))
    return place if folder in place.parents or _is_cached(folder, place) else None


def _is_cached(folder: Path, place: Path) -> bool:
    """Whether a folder of the download cache has its content at `place`.

    It is among the repository's contents, or among those that repositories share
    (huggingface_hub, utils/_shared_blobs.py).
    """
    repository = cached_repository(folder)
    if repository is None:
        return False
    shared = place.parent.parent == repository.parent / "blobs" and _SHARED.search(str(place))
    return place.parent == repository / "blobs" or bool(shared)


_SHARED = re.compile(r"/[0-9a-f]{2}/[0-9a-f]{64}$")

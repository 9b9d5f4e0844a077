"""The folders below a place, here or in a repository of the Hub, with the names of their files."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from loratool.notices import Notice
from loratool.storage.filenames import PROVENANCE, UNDO_FOLDER, WEIGHTS_SUFFIXES
from loratool.storage.folder import Folder


@dataclass(frozen=True)
class FilesIn:
    """A folder and the names of all files in it; `path` is where it lies below the place that is
    listed, "" for that place itself."""

    path: str
    folder: Folder
    names: frozenset[str]
    #: When something was committed there last, for a repository.
    changed: str | None = None


@dataclass
class Walk:
    """The folders in which there are weights, what was not entered, and how many files there are
    that are no weights."""

    folders: list[FilesIn] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    others: int = 0

    def add(self, path: str, folder: Folder, names: set[str], changed: str | None = None) -> None:
        weights = sum(os.path.splitext(name)[1] in WEIGHTS_SUFFIXES for name in names)
        self.others += len(names) - weights
        if weights:
            self.folders.append(FilesIn(path, folder, frozenset(names), changed))


def walk_disk(top: Path) -> Walk:
    """Every folder below. Hidden ones are passed over; links to folders are not entered, so that a
    loop of them has an end, and named."""
    found = Walk()
    waiting = [""]
    while waiting:
        path = waiting.pop()
        names, inside = _look(top, path, found)
        found.add(path, Folder(top / path if path else top), names)
        if PROVENANCE in names:  # an undo file is no weights
            inside = [name for name in inside if name != UNDO_FOLDER]
        waiting += [f"{path}/{name}" if path else name for name in inside]
    return found


def _look(top: Path, path: str, found: Walk) -> tuple[set[str], list[str]]:
    """The files and the folders in one folder; what cannot be entered becomes a notice."""
    names: set[str] = set()
    inside: list[str] = []
    try:
        with os.scandir(top / path if path else top) as entries:
            for entry in entries:
                if entry.is_symlink() and os.path.isdir(entry.path):
                    if not entry.name.startswith("."):
                        where = f"{path}/{entry.name}".lstrip("/")
                        found.notices.append(_not_entered(where, entry.path))
                elif entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        inside.append(entry.name)
                else:
                    names.add(entry.name)
    except OSError as error:
        if not path:
            raise
        text = f"{path}: this folder cannot be read ({error.strerror or error})."
        found.notices.append(Notice("folder-not-read", text, path))
    return names, inside


def _not_entered(where: str, path: str) -> Notice:
    target = os.path.realpath(path)
    text = f"{where}: a link to the folder {target}, not entered. Name it to list what is there."
    return Notice("link-not-entered", text, where)


def walk_repository(folder: Folder, above: str = "", changed: str | None = None) -> Walk:
    """Every folder of a repository, or below a folder of it, that somebody would enter.

    `above` is what their paths begin with, and `changed` when something was committed last.
    """
    found = Walk()
    names: dict[str, set[str]] = defaultdict(set)
    for name in folder.names():
        path, _, file = name.rpartition("/")
        if file and not any(part.startswith(".") for part in path.split("/")):
            names[path].add(file)
    for path, inside in names.items():
        parent, _, last = path.rpartition("/")
        if last == UNDO_FOLDER and PROVENANCE in names.get(parent, ()):
            continue
        where = "/".join(part for part in (above, path) if part)
        found.add(where, folder.inside(path) if path else folder, inside, changed)
    return found

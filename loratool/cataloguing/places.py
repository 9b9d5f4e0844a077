"""What somebody asked to list: a folder, a file, a repository, or all of an owner on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loratool.cataloguing.entry import CatalogEntry
from loratool.cataloguing.units import Unit, units_of
from loratool.cataloguing.walking import FilesIn, Walk, walk_disk, walk_repository
from loratool.errors import HubError, LoraToolError, nearest
from loratool.notices import Notice
from loratool.storage.folder import Folder
from loratool.storage.hub.address import SCHEME, parse
from loratool.storage.hub.folder import HubFolder, locate, not_there
from loratool.storage.hub.owner import MOST_REPOSITORIES, Owned, repositories_of
from loratool.storage.hub.patience import Unreachable
from loratool.streams.threads import computed

#: Bytes that are downloaded of one entry: configs and indexes, and no weights.
_MOST = 5_000_000
#: How many repositories are asked for at a time.
_STREAMS = 8

#: What is to be read, and what could not even be opened.
Found = tuple[Walk, list[tuple[FilesIn, Unit]], list[CatalogEntry]]


def found_at(source: str | Path, advance: Callable[[int, int, str], None]) -> Found:
    """What there is to read at a place. Raises FileError, HubError and LoginError where the place
    itself cannot be read."""
    path = Path(source)
    if path.is_dir():
        return _units(walk_disk(path))
    if os.path.lexists(path):
        if not path.is_file():
            raise not_there(source, path)
        place = FilesIn("", Folder(path.parent), frozenset([path.name]))
        return Walk(), [(place, Unit(path.name, "file"))], []
    text = str(source)
    owner = _owner_in(text) if isinstance(source, str) else None
    if owner is not None:
        alone = not text.lower().startswith("hf:")
        if alone and _near(path):  # a misspelt folder, sooner than somebody on the Hub
            raise not_there(source, path)
        try:
            repos, more = repositories_of(owner)
        except LoraToolError as error:
            if alone:
                raise _nothing_there(text, path, error) from error
            if isinstance(error, Unreachable):
                raise
            return _repository_of_nobody(text, error)
        return _of_owner(owner, repos, more, advance)
    return _at_address(source, path)


def _repository_of_nobody(text: str, error: LoraToolError) -> Found:
    """The oldest models have no owner: hf://gpt2. The error is what was said of it as an owner."""
    try:
        return _at_address(text, Path(text))
    except LoraToolError:
        raise error from None


def _at_address(source: str | Path, path: Path) -> Found:
    """What there is in a repository, or in a part of one."""
    place_there = locate(source)
    folder = place_there.folder
    if not folder.is_there():
        raise not_there(source, path)
    if isinstance(folder, HubFolder):
        folder.most = _MOST
    if place_there.file:
        place = FilesIn("", folder, frozenset([place_there.file]))
        return Walk(), [(place, Unit(place_there.file, "file"))], []
    return _units(walk_repository(folder))


def _owner_in(text: str) -> str | None:
    """The user or the organisation that a text names, if it can be one: a word, or hf://word."""
    address = parse(text)
    if address is not None:
        alone = "/" not in address.repo and not address.path and address.revision is None
        return address.repo if alone else None
    word = text.rstrip("/")
    is_word = word.replace("-", "").replace("_", "").isalnum() and word.isascii()
    return word if is_word else None


def _nothing_there(text: str, path: Path, error: LoraToolError) -> LoraToolError:
    return type(error)(
        f"{text}: no such file or directory here; and on the Hub {error.message}", error.hint
    )


def _near(path: Path) -> str | None:
    """What lies beside a path that is not there and is called nearly the same."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, siblings)


def _of_owner(
    owner: str, repos: list[Owned], more: bool, advance: Callable[[int, int, str], None]
) -> Found:
    """All repositories of an owner; one that cannot be looked into is an entry of its own."""
    walk, units, wrong = Walk(), [], []
    opened = computed((partial(_repository, owned) for owned in repos), _STREAMS)
    for number, (owned, found) in enumerate(zip(repos, opened, strict=True), 1):
        advance(number, len(repos), owned.repo)
        if isinstance(found, LoraToolError):
            entry = CatalogEntry(owned.repo, owned.repo, "other", trained=owned.changed)
            entry.state, entry.message = "not-read", found.message
            entry.trained_from = "commit" if owned.changed else ""
            wrong.append(entry)
            continue
        walk.others += found.others
        walk.folders += found.folders
        units += _units(found)[1]
    if more:
        text = (
            f"{owner} has more than {MOST_REPOSITORIES} repositories; these are the first "
            f"{MOST_REPOSITORIES} that the Hub names. List others by their ids."
        )
        walk.notices.append(Notice("owner-cut", text, owner))
    return walk, units, wrong


def _repository(owned: Owned) -> Walk | LoraToolError:
    try:
        folder = locate(f"{SCHEME}{owned.repo}").folder
    except LoraToolError as error:
        empty = isinstance(error, HubError) and "is empty" in error.message
        return Walk() if empty else error
    if isinstance(folder, HubFolder):
        folder.most = _MOST
    return walk_repository(folder, owned.repo, owned.changed)


def _units(walk: Walk) -> Found:
    return walk, [(place, unit) for place in walk.folders for unit in units_of(place.names)], []

"""list: every adapter and model below a folder, or of somebody on the Hub, from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loratool.answers import Answer
from loratool.cataloguing.choosing import chosen, sorted_by
from loratool.cataloguing.describing import entry_of_unit
from loratool.cataloguing.duplicates import Listed, count_alike, mark_copies, mark_equal
from loratool.cataloguing.entry import CatalogEntry
from loratool.cataloguing.places import found_at
from loratool.cataloguing.units import Unit
from loratool.cataloguing.walking import FilesIn
from loratool.errors import UsageError, explained_os_errors, shown
from loratool.notices import Notice
from loratool.storage.hub.folder import HubFolder
from loratool.streams.processes import Processes
from loratool.streams.progress import Progress
from loratool.streams.threads import computed

#: How many headers of the Hub are asked for at a time.
_STREAMS = 8

#: Headers on this disk from which on processes are worth a third of a second that they take to
#: start.
_MANY = 100


@dataclass(repr=False)
class CatalogReport(Answer):
    """What `catalog` found. `to_dict()` is what `--json` prints.

    `found` is how many entries there are before any was left out, and `others` how many files
    below are no weights of an adapter or a model. `equal` says that duplicates are adapters with
    equal deltas too; `values_read` whether weights lay on this disk, so that duplicates, and
    adapters that do nothing, would have been seen.
    """

    ROWS = "entries"

    source: str
    entries: list[CatalogEntry]
    found: int
    others: int
    equal: bool
    values_read: bool
    warnings: list[Notice] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, int]:
        """How many entries there are of each kind."""
        return dict(Counter(entry.kind for entry in self.entries))

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, each copy counted."""
        return sum(entry.bytes or 0 for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "source": self.source,
            "totals": {
                **dict.fromkeys(("adapter", "model", "other"), 0),
                **self.kinds,
                "bytes": self.nbytes,
                "found": self.found,
                "other_files": self.others,
            },
            "equal": self.equal,
            "values_read": self.values_read,
            "entries": [entry.to_dict() for entry in self.entries],
            "warnings": [notice.to_dict() for notice in self.warnings],
        }


@explained_os_errors()
def catalog(
    source: str | Path = ".",
    *,
    sort: str = "name",
    reverse: bool = False,
    base: str | None = None,
    dialect: str | None = None,
    rank: str | int | None = None,
    equal: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CatalogReport:
    """List every adapter and every model below a folder, or on the Hub.

    Parameters
    ----------
    source: a folder, a file, a repository of the Hub (`org/name`, `hf://org/name/folder`), or the
        name of a user or an organisation there (`org`, `hf://org`).
    sort: "name", "size", "rank", "base", "dialect" or "date"; smallest first, or last if `reverse`.
    base: only entries with this text in the name of their base or architecture.
    dialect: only adapters of this dialect. rank: only adapters whose ranks are all this one, or in
        a range "8-64".
    equal: find adapters with equal deltas too, whatever their dialect, rank or dtype; this reads
        those whole that adapt the same modules.
    progress: called with (entries done, entries in all, entry).

    Headers are read, and some kilobytes of values; whole files only where names, dtypes, shapes and
    samples of two are the same. Of the Hub no weights are downloaded. What is damaged is an entry
    with a `message`; errors are raised only where `source` itself cannot be read.
    """
    if not str(source):
        raise UsageError("A path is empty.", "Check the variables in your command.")
    chosen([], base, None, None if rank is None else str(rank))  # a wrong call fails at once
    sorted_by([], sort, reverse)

    def advance(done: int, total: int, label: str) -> None:
        if progress is not None:
            progress(done, total, label)

    walk, units, wrong = found_at(source, advance)
    on_hub = any(isinstance(place.folder, HubFolder) for place, _ in units)
    listed: list[Listed] = []
    for number, entry in enumerate(_entries(units, on_hub, threads), 1):
        advance(number, len(units), units[number - 1][0].path)
        if entry is None:
            walk.others += 1
        else:
            listed.append((entry, *units[number - 1]))
    listed.sort(key=_age(sorted_by([one[0] for one in listed], "name", False)))
    _mark_duplicates(listed, equal, progress)
    entries = [one[0] for one in listed] + wrong
    kept = chosen(entries, base, dialect, None if rank is None else str(rank))
    return CatalogReport(
        source=shown(source),
        entries=sorted_by(kept, sort, reverse),
        found=len(entries),
        others=walk.others,
        equal=equal,
        values_read=not on_hub,
        warnings=walk.notices,
    )


def _entries(
    units: Sequence[tuple[FilesIn, Unit]], on_hub: bool, threads: int | None
) -> Iterator[CatalogEntry | None]:
    """What the headers of every unit say, in order: of many on this disk in processes, since what
    takes the time is Python; of the Hub in threads, which wait together."""
    processes = Processes(threads)
    if on_hub or len(units) < _MANY or processes.count == 1:
        calls = (partial(entry_of_unit, place, unit) for place, unit in units)
        yield from computed(calls, threads or (_STREAMS if on_hub else None))
        return
    with processes:
        asked = (partial(processes.call, entry_of_unit, place, unit) for place, unit in units)
        yield from computed(asked, processes.count)


def _age(ordered: Sequence[CatalogEntry]) -> Any:
    """The place of a listed entry in this order: a duplicate names the first of its kind."""
    places = {id(entry): number for number, entry in enumerate(ordered)}
    return lambda one: places[id(one[0])]


def _mark_duplicates(listed: Sequence[Listed], equal: bool, progress: Progress | None) -> None:
    total, done = count_alike(listed, equal), 0

    def advance(label: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, label)

    mark_copies(listed, advance)
    if equal:
        from loratool.verbs.compare import compare  # a quarter of a second that most do not need

        mark_equal(listed, lambda one, other: compare([one, other]).equal, advance)

"""Which entries are shown, and in which order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loratool.adapters.dialects import DIALECTS
from loratool.cataloguing.entry import CatalogEntry
from loratool.errors import UsageError, unknown

#: What entries can be sorted by.
ORDERS: dict[str, Callable[[CatalogEntry], Any]] = {
    "name": lambda entry: "",
    "size": lambda entry: entry.bytes,
    "rank": lambda entry: max(entry.ranks, default=None),
    "base": lambda entry: (entry.base or entry.family).lower() or None,
    "dialect": lambda entry: entry.dialect or None,
    "date": lambda entry: entry.trained,
}

_NUMBER = re.compile(r"(\d+)", re.ASCII)


def sorted_by(entries: Iterable[CatalogEntry], by: str, reverse: bool) -> list[CatalogEntry]:
    """Entries by this; those of which it is not known come last, and equal ones by name, in which
    numbers count as numbers: checkpoint-200 before checkpoint-1000."""
    if by not in ORDERS:
        raise unknown("order", by, ORDERS)
    value = ORDERS[by]
    named = sorted(
        entries, key=lambda entry: _natural(entry.path), reverse=reverse and by == "name"
    )
    known = [entry for entry in named if value(entry) is not None]
    known.sort(key=value, reverse=reverse)
    return known + [entry for entry in named if value(entry) is None]


def _natural(path: str) -> list[list[tuple[bool, int, str]]]:
    """A path as parts that compare as people count."""
    return [
        [
            (piece.isdecimal(), int(piece) if piece.isdecimal() and len(piece) < 19 else 0, piece)
            for piece in _NUMBER.split(part.lower())
        ]
        for part in path.split("/")
    ]


def chosen(
    entries: Sequence[CatalogEntry], base: str | None, dialect: str | None, rank: str | None
) -> list[CatalogEntry]:
    """The entries that all of what is asked for fits.

    `base` is a part of the name of the base or of the architecture, in any case of letters,
    `dialect` the word for it, `rank` a number or a range, in which all ranks of an adapter are.
    Raises UsageError for a dialect that is none and for what is no range.
    """
    if dialect is not None:
        choices = sorted({d.name for d in DIALECTS} | {e.dialect for e in entries if e.dialect})
        if dialect not in choices:
            raise unknown("dialect", dialect, choices)
        entries = [entry for entry in entries if entry.dialect == dialect]
    if base is not None:
        part = base.lower()
        entries = [e for e in entries if part in e.base.lower() or part in e.family.lower()]
    if rank is not None:
        low, high = _range(rank)
        entries = [e for e in entries if e.ranks and low <= e.ranks[0] and e.ranks[-1] <= high]
    return list(entries)


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", text, re.ASCII)
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise UsageError(f"{text!r} is no range of ranks.", "Write --rank 16, or --rank 8-64.")
    return int(found[1]), int(found[2] or found[1])

"""Where rows of a delta and rows of a tensor are the same rows of a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from loratool.models.layouts.parameter import Holder, Rows, matrix_of
from loratool.models.layouts.place import Place


@dataclass(frozen=True)
class Target:
    """Some rows of a delta `[out, in]`, all where `rows` is None, and the place where they go.

    `member` is the number of the delta among those of a stack, None where there is one delta.
    """

    place: Place
    rows: Rows | None = None
    member: int | None = None


def overlap(
    held: Holder, expert: int | None, experts: int | None, memory: Rows, own: range, out: int | None
) -> Iterator[Target]:
    """The rows of a delta with `out` rows that a tensor has a place for.

    `out` is None for a delta that lies transposed against the parameter, and is the whole of it.
    """
    if expert is not None and held.expert not in (None, expert):
        return
    common = _common(memory, own, held.memory, held.own)
    if common is None:
        return
    rows, there = common
    members: range | tuple[int | None, ...] = (None,)
    if experts is not None:
        members = (held.expert,) if held.expert is not None else range(held.experts)
    for member in members:
        number = member if expert is None else expert
        place = Place(
            held.info.name,
            expert=number if held.stacked and held.expert is None else None,
            rows=None if out is None else _unless_all(there, _rows_of(held)),
            transposed=held.transposed != (out is None),
        )
        yield Target(place, None if out is None else _unless_all(rows, out), member)


def across(held: Holder, expert: int | None, columns: range) -> Target:
    """Where a delta goes whose rows are these columns of the matrices of a tensor."""
    number = expert if held.stacked and held.expert is None else None
    return Target(Place(held.info.name, "", number, columns, not held.transposed))


def _rows_of(held: Holder) -> int:
    return matrix_of(held.info, held.transposed, held.stacked and held.expert is None)[0]


@lru_cache(maxsize=1024)
def _common(memory: Rows, own: range, theirs: Rows, there: Rows) -> tuple[Rows, Rows] | None:
    """Rows of a delta, and those of a tensor, that are the same rows of the parameter."""
    if memory == theirs:
        return own, there
    known = np.full(1 + max(max(memory), max(theirs)), -1)
    known[np.asarray(theirs)] = np.asarray(there)
    found = known[np.asarray(memory)]
    here = found >= 0
    if not here.any():
        return None
    return _tidy(np.asarray(own)[here]), _tidy(found[here])


def _tidy(rows: npt.NDArray[np.int_]) -> Rows:
    """As a range, where it is one."""
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    if step > 0 and (np.diff(rows) == step).all():
        return range(int(rows[0]), int(rows[-1]) + 1, step)
    return tuple(int(row) for row in rows)


def _unless_all(rows: Rows, size: int) -> Rows | None:
    return None if rows == range(size) else rows

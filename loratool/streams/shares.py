"""Work that is split by hand over processes: which parts are whose.

Each process finds out by itself, from the sizes alone, so they need not talk to one another.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from dataclasses import dataclass

from loratool.errors import UsageError


@dataclass(frozen=True)
class WorkShare:
    """What one of several workers makes: that of `number` (from 1) of `count`.

    The last of them completes the output, unless somebody else is there for that (`completes`).
    Number 0 makes nothing, and completes what the others made.
    """

    number: int
    count: int
    completes: bool = True
    #: Names that were given to the worker, in place of those that it finds to be its own.
    names: tuple[str, ...] | None = None

    def of(self, sizes: Mapping[str, int]) -> list[str]:
        """The names among `sizes` (bytes) that are this worker's."""
        if self.names is not None:
            return [name for name in sizes if name in self.names]
        return share(sizes, self.number, self.count) if self.number else []

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


#: The share of whoever only completes an output.
NO_SHARE = WorkShare(0, 1)


@dataclass(frozen=True)
class SharedOut:
    """How far an output is that several workers make, when one of them ends.

    `made` are the files of this worker, `missing` those that nobody has finished. `complete` says
    whether the output is in its place; `before` marks one that others had completed.
    """

    worker: str
    made: list[str]
    missing: list[str]
    complete: bool
    before: bool = False

    def to_dict(self) -> dict[str, object]:
        """For `--json`."""
        return dict(self.__dict__)


def parse_share(text: str | WorkShare | None) -> WorkShare | None:
    """The share that "2/8" is. Raises UsageError for anything else."""
    if text is None or isinstance(text, WorkShare):
        return text
    found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        count = found[2] if found and int(found[2]) else "8"
        hint = f"I goes from 1 to N: workers of {count} are --worker 1/{count} to {count}/{count}."
        if found is not None and found[1] == "0":
            hint += f" Where tasks are numbered from 0, add 1: $((N + 1))/{count}."
        raise UsageError(f"There is no worker {text!r}.", hint)
    return WorkShare(int(found[1]), int(found[2]))


def share(sizes: Mapping[str, int], number: int, count: int) -> list[str]:
    """The names that worker `number` (from 1) of `count` takes, in the order of `sizes`.

    The largest goes first, each to the worker with the least so far (Graham's rule: no worker has
    more than 4/3 of what the best split gives the fullest). Who gets what depends on names and
    sizes only, not on their order. Together the workers have every name once; with more workers
    than names some have none.
    """
    if not 1 <= number <= count:
        raise ValueError(f"there is no worker {number} of {count}")
    # What is without bytes takes its time too, so equal loads are told apart by the count.
    workers = [(0, 0, worker) for worker in range(1, count + 1)]
    mine = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, length, worker = workers[0]
        heapq.heapreplace(workers, (load + sizes[name], length + 1, worker))
        if worker == number:
            mine.add(name)
    return [name for name in sizes if name in mine]

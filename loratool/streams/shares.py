"""Work that is split by hand over processes: which parts are whose.

Each process finds out by itself, from the sizes alone, so they need not talk to one another.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping


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

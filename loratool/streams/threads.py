"""Threads whose results come in order, each computing with one BLAS thread.

So a result depends neither on the number of threads nor on the cores of the machine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

R = TypeVar("R")


def cores() -> int:
    """Cores this process may use; not every system can tell them from those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def few(threads: int | None) -> int:
    """Threads for work that holds dense matrices, each its own: as many as asked, else two."""
    return threads or min(2, cores())


def in_order(pool: ThreadPoolExecutor, count: int, calls: Iterable[Callable[[], R]]) -> Iterator[R]:
    """The results of `calls` in their order, with two calls per thread of the pool in flight."""
    running: deque[Future[R]] = deque()
    for call in calls:
        if len(running) >= 2 * count:
            yield running.popleft().result()
        running.append(pool.submit(call))
    while running:
        yield running.popleft().result()


def computed(calls: Iterable[Callable[[], R]], threads: int | None = None) -> Iterator[R]:
    """The results of NumPy computations in their order; at most a few are held at a time."""
    count = threads or min(8, cores())
    # The command line has set this before NumPy was imported. Looking for BLAS libraries goes
    # through a callback from C, in which a Ctrl-C would be lost.
    limited = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
    limits = nullcontext() if limited else threadpool_limits(1, "blas")
    pool = ThreadPoolExecutor(count)
    try:
        with limits:
            yield from in_order(pool, count, calls)
        pool.shutdown()
    finally:  # after an error or Ctrl-C nobody waits for what still runs
        pool.shutdown(wait=False, cancel_futures=True)

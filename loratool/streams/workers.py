"""Worker threads: blocks are computed in any order, their results taken in the order asked for.

Every worker computes with one BLAS thread, so that a result depends neither on the number of
workers nor on the cores of the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

from loratool.storage.tensors import Bytes
from loratool.streams.threads import R, cores, in_order

#: Blocks that one worker computes before it hands its result over: handing work from thread to
#: thread costs about as much as a tenth of a block.
BLOCKS_PER_TASK = 8


P = TypeVar("P")


class Workers:
    """Threads and the large buffers that travel between them. Use as a context manager."""

    def __init__(self, threads: int | None = None) -> None:
        self._count = threads or min(8, cores())
        self._spare: deque[Bytes] = deque()

    def __enter__(self) -> Workers:
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(
            self._count, initializer=torch.set_num_threads, initargs=(1,)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def stop(self) -> None:
        """Wait for the calls that run, drop the others: nothing is written after this."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(self, calls: Iterable[Callable[[], R]]) -> Iterator[R]:
        """The results of `calls` in their order, with two calls per worker in flight."""
        return in_order(self._pool, self._count, calls)

    def ahead(
        self, parts: Iterable[P], early: Callable[[Any], Callable[[], object] | None]
    ) -> Iterator[P]:
        """The parts in their order. What `early` says a part needs beforehand, and takes long,
        begins some parts before its turn; whoever needs it waits for it, and meets its errors."""
        waiting: deque[P] = deque()
        for part in parts:
            call = early(part)
            if call is not None:
                self._pool.submit(call)
            waiting.append(part)
            if len(waiting) > self._count:
                yield waiting.popleft()
        yield from waiting

    def take(self, size: int) -> Bytes:
        """A buffer of at least `size` bytes with arbitrary content; give it back after use."""
        try:
            buffer = self._spare.popleft()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        return buffer if len(buffer) >= size else np.empty(max(size, 1 << 21), np.uint8)

    def give(self, buffer: Bytes) -> None:
        self._spare.append(buffer)

"""Carry out a plan: stream every tensor through float32 blocks and write it, rounded once.

For each output shard and each tensor in the order of the data: read a block of rows, widen it to
float32, add the factors' product for these rows, round once, check, write. Worker threads take
blocks; the calling thread takes their results in order and hashes. A block holds whole rows, its
size depends on the tensor's shape alone, and every thread computes with one BLAS thread, so the
result does not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from loratool.arithmetic import Bytes, Result, RunningJob
from loratool.checkpoint.tensors import FilePool, blocks
from loratool.checkpoint.writer import ShardWriter
from loratool.plan import Job, Plan

#: Blocks that one thread computes before it hands its result over.
BLOCKS_PER_TASK = 8

#: Written bytes after which flushing begins, so that little is left to flush at the end.
FLUSH_BYTES = 64 << 20

#: `progress(bytes, shard)`: so many more output bytes are done.
Progress = Callable[[int, str], None]


@dataclass
class Written:
    """What was written: sha256 by shard, and how many values rounding pushed out of range."""

    shards: dict[str, str] = field(default_factory=dict)
    subnormal: int = 0
    zeroed: int = 0


def execute(plan: Plan, folder: Path, progress: Progress, threads: int | None = None) -> Written:
    """Write the shards of `plan` into `folder`.

    `progress(bytes, shard)` is called as output bytes are done. Raises ValueRangeError for NaN,
    infinity and overflow, naming the tensor, the count and the cause.
    """
    workers = threads or min(8, _cores())
    written = Written()
    before = torch.get_num_threads()
    with (
        FilePool() as files,
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ThreadPoolExecutor(1) as flusher,
    ):
        flushed: list[Future[None]] = []  # one thread flushes, in the order of this list
        try:
            unflushed = 0
            writers: list[ShardWriter] = []
            for name, jobs in plan.shards.items():
                contents = [(j.name, j.dtype, j.source.shape) for j in jobs]
                writer = ShardWriter(folder / name, contents, {"format": "pt"})
                writers.append(writer)
                try:
                    for result in _results(writer, jobs, files, pool, 2 * workers):
                        writer.hash_next(result.data.data)
                        written.subnormal += result.subnormal
                        written.zeroed += result.zeroed
                        unflushed += len(result.data)
                        if unflushed > FLUSH_BYTES and all(f.done() for f in flushed):
                            flushed.append(flusher.submit(writer.flush))
                            unflushed = 0
                        progress(len(result.data), name)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    flusher.shutdown(wait=True, cancel_futures=True)
                    for opened in writers:
                        opened.close()
                    raise
                written.shards[name] = writer.sha256()
                flushed.append(flusher.submit(writer.flush_and_close))
            for done in flushed:
                done.result()
        finally:
            torch.set_num_threads(before)
    return written


def _cores() -> int:
    """Cores this process may use; not every system can tell them from those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _results(
    writer: ShardWriter, jobs: list[Job], files: FilePool, pool: ThreadPoolExecutor, window: int
) -> Iterator[Result]:
    """Compute and write a shard, with at most `window` tasks in flight.

    Results come in file order; one is valid until the next is asked for, then its buffer is reused.
    """
    spare: deque[Bytes] = deque()
    running: deque[Future[Result]] = deque()
    for task in _tasks(jobs, files):
        if len(running) >= window:
            result = running.popleft().result()
            yield result
            spare.append(result.buffer)
        buffer = spare.popleft() if spare else None
        running.append(pool.submit(task.run, writer, buffer))
    while running:
        yield running.popleft().result()


@dataclass
class _Task:
    """Some blocks of one job: elements `[low, high)` of the tensor, whole rows where rows matter.

    Several, because handing work from thread to thread costs about as much as a tenth of a block.
    """

    job: RunningJob
    low: int
    high: int
    offset: int

    def run(self, writer: ShardWriter, buffer: Bytes | None) -> Result:
        size = (self.high - self.low) * self.job.itemsize
        if buffer is None or len(buffer) < size:
            buffer = np.empty(max(size, 1 << 21), np.uint8)
        result = Result(buffer[:size], buffer)
        for low, high in blocks(self.high - self.low, self.job.block_elements):
            data = result.data[low * self.job.itemsize : high * self.job.itemsize]
            self.job.compute(self.low + low, self.low + high, data, result)
            writer.write(self.offset + (self.low + low) * self.job.itemsize, data.data)
        return result


def _tasks(jobs: list[Job], files: FilePool) -> Iterator[_Task]:
    offset = 0
    for job in jobs:
        running = RunningJob(job, files)
        for low, high in blocks(running.length, BLOCKS_PER_TASK * running.block_elements):
            yield _Task(running, low, high, offset)
        offset += job.nbytes

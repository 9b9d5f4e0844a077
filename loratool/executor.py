"""Carry out a plan: stream every tensor through float32 blocks and write it, rounded once.

For each output shard and each tensor in the order of the data: read a block of rows, widen it to
float32, add the factors' product for these rows, round once, check, write. Workers take blocks; the
calling thread takes their results in order and hashes. A block holds whole rows and its size
depends on the tensor's shape alone, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from loratool.arithmetic import Counts, RunningJob
from loratool.checkpoint.header import build_header
from loratool.checkpoint.tensors import FilePool, blocks
from loratool.checkpoint.writer import ShardWriter
from loratool.plan import Job, Plan
from loratool.workers import BLOCKS_PER_TASK, Bytes, Workers

#: Written bytes after which flushing begins, so that little is left to flush at the end.
FLUSH_BYTES = 64 << 20

#: `progress(bytes, shard)`: so many more output bytes are done.
Progress = Callable[[int, str], None]


class Task(Protocol):
    """Some blocks of one output tensor, computed by one worker."""

    def compute(self, low: int, high: int, data: Bytes) -> None:
        """Fill `data` with the output bytes of elements `[low, high)`."""

    def finish(self) -> None:
        """Called by the worker after the last block."""


class Part(Protocol):
    """One tensor of an output shard: `length` elements of `itemsize` bytes, made by tasks."""

    @property
    def length(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def block_elements(self) -> int: ...
    def begin(self, low: int, high: int, workers: Workers) -> Task:
        """The task that makes elements `[low, high)`."""


@dataclass(frozen=True)
class Shard:
    """An output file: the bytes of its header, and its tensors in the order of their data.

    `parts` is gone through once; each is made when its turn comes, so that few are in memory.
    """

    header: bytes
    parts: Iterable[Part]


#: `consume(shard, part, task, data)`: called in file order with each finished task; `data` is valid
#: until it returns.
Consume = Callable[[str, Part, Task, Bytes], None]


def write_shards(
    folder: Path,
    shards: Mapping[str, Shard],
    workers: Workers,
    consume: Consume,
    progress: Progress,
) -> None:
    """Compute and write output files; flushing goes on beside the work."""
    with ThreadPoolExecutor(1) as flusher:
        flushed: list[Future[None]] = []  # one thread flushes, in the order of this list
        writers: list[ShardWriter] = []
        unflushed = 0
        try:
            for name, shard in shards.items():
                writer = ShardWriter(folder / name, shard.header)
                writers.append(writer)
                for part, task, buffer, size in workers.in_order(_calls(writer, shard, workers)):
                    consume(name, part, task, buffer[:size])
                    workers.give(buffer)
                    unflushed += size
                    if unflushed > FLUSH_BYTES and all(f.done() for f in flushed):
                        flushed.append(flusher.submit(writer.flush))
                        unflushed = 0
                    progress(size, name)
                flushed.append(flusher.submit(writer.flush_and_close))
        except BaseException:
            workers.stop()
            flusher.shutdown(wait=True, cancel_futures=True)
            for opened in writers:
                opened.close()
            raise
        for done in flushed:
            done.result()


_Finished = tuple[Part, Task, Bytes, int]


def _calls(
    writer: ShardWriter, shard: Shard, workers: Workers
) -> Iterator[Callable[[], _Finished]]:
    offset = 0
    for part in shard.parts:
        for low, high in blocks(part.length, BLOCKS_PER_TASK * part.block_elements):
            yield partial(_run, part, low, high, writer, offset, workers)
        offset += part.length * part.itemsize


def _run(
    part: Part, low: int, high: int, writer: ShardWriter, offset: int, workers: Workers
) -> _Finished:
    size = (high - low) * part.itemsize
    buffer = workers.take(size)
    task = part.begin(low, high, workers)
    for first, last in blocks(high - low, part.block_elements):
        data = buffer[first * part.itemsize : last * part.itemsize]
        task.compute(low + first, low + last, data)
        writer.write(offset + (low + first) * part.itemsize, data.data)
    task.finish()
    return part, task, buffer, size


class _Merging(RunningJob):
    """A job of the plan as a part of its shard."""

    def begin(self, low: int, high: int, workers: Workers) -> Task:
        return _MergeTask(self)


@dataclass
class _MergeTask:
    job: RunningJob
    counts: Counts = field(default_factory=Counts)

    def compute(self, low: int, high: int, data: Bytes) -> None:
        self.job.compute(low, high, data, self.counts)

    def finish(self) -> None:
        pass


@dataclass
class Written:
    """What was written: sha256 by shard, and how many values rounding pushed out of range."""

    shards: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


def execute(plan: Plan, folder: Path, progress: Progress, threads: int | None = None) -> Written:
    """Write the shards of `plan` into `folder`.

    `progress(bytes, shard)` is called as output bytes are done. Raises ValueRangeError for NaN,
    infinity and overflow, naming the tensor, the count and the cause.
    """
    written = Written()
    with FilePool() as files, Workers(threads) as workers:
        shards = {
            name: Shard(header_of(jobs), (_Merging(job, files) for job in jobs))
            for name, jobs in plan.shards.items()
        }
        digests = {name: hashlib.sha256(shard.header) for name, shard in shards.items()}

        def consume(shard: str, part: Part, task: Task, data: Bytes) -> None:
            digests[shard].update(data.data)
            assert isinstance(task, _MergeTask)
            written.counts += task.counts

        write_shards(folder, shards, workers, consume, progress)
    written.shards = {name: digest.hexdigest() for name, digest in digests.items()}
    return written


def header_of(jobs: Sequence[Job]) -> bytes:
    return build_header([(j.name, j.dtype, j.source.shape) for j in jobs], {"format": "pt"})

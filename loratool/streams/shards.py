"""Write output files part by part: workers compute blocks, the calling thread takes them in order.

What a part is, the caller says: a tensor of a merge, or one of a base that is being restored. Every
byte has its place before it is computed, so workers write by themselves; flushing to the disk goes
on beside the work, and little is left of it at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from loratool.storage.shardfile import ShardWriter
from loratool.storage.tensors import Bytes, blocks
from loratool.streams.progress import Advance
from loratool.streams.workers import Workers

#: Written bytes after which flushing begins, so that little is left to flush at the end.
FLUSH_BYTES = 64 << 20


class Task(Protocol):
    """Some blocks of one output tensor, computed by one worker."""

    def compute(self, low: int, high: int, data: Bytes) -> None:
        """Fill `data` with the output bytes of elements `[low, high)`."""

    def finish(self) -> None:
        """Called by the worker after the last block."""


class OutputTensor(Protocol):
    """One tensor of an output shard: `length` elements of `itemsize` bytes.

    A task makes `task_elements` of them, in blocks of `block_elements`.
    """

    @property
    def length(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def block_elements(self) -> int: ...
    @property
    def task_elements(self) -> int: ...
    def begin(self, low: int, high: int, workers: Workers) -> Task:
        """The task that makes elements `[low, high)`."""


@dataclass(frozen=True)
class Shard:
    """An output file: the bytes of its header, and its tensors in the order of their data.

    `parts` is gone through once; each is made when its turn comes, so that few are in memory.
    """

    header: bytes
    parts: Iterable[OutputTensor]


#: `consume(shard, part, task, data)`: called in file order with each finished task; `data` is valid
#: until it returns.
Consume = Callable[[str, OutputTensor, Task, Bytes], None]


def write_shards(
    folder: Path,
    shards: Mapping[str, Shard],
    workers: Workers,
    consume: Consume,
    progress: Advance,
    ended: Callable[[str], Callable[[], None]],
) -> None:
    """Compute and write output files; flushing goes on beside the work.

    `ended(shard)` is called when all tasks of a file have been consumed; what it returns is called
    when the file is on the disk, by another thread.
    """
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
                flushed.append(flusher.submit(_close, writer, ended(name)))
        except BaseException:
            workers.stop()
            flusher.shutdown(wait=True, cancel_futures=True)
            for opened in writers:
                opened.close()
            raise
        for done in flushed:
            done.result()


def _close(writer: ShardWriter, afterwards: Callable[[], None]) -> None:
    writer.flush_and_close()
    afterwards()


_Finished = tuple[OutputTensor, Task, Bytes, int]


def _calls(
    writer: ShardWriter, shard: Shard, workers: Workers
) -> Iterator[Callable[[], _Finished]]:
    offset = 0
    for part in shard.parts:
        for low, high in blocks(part.length, part.task_elements):
            yield partial(_run, part, low, high, writer, offset, workers)
        offset += part.length * part.itemsize


def _run(
    part: OutputTensor, low: int, high: int, writer: ShardWriter, offset: int, workers: Workers
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

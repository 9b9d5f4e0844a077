"""Carry out a plan: stream every tensor through float32 blocks and write it, rounded once.

For each output shard and each tensor in the order of the data: read a block of rows, widen it to
float32, add the factors' product for these rows, round once, check, write. A block holds whole rows
and its size depends on the tensor's shape alone, so the result does not depend on the number of
threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from loratool.merging.arithmetic import MergeTask, Merging
from loratool.merging.counts import Counts
from loratool.merging.plan import Job, OutputShard
from loratool.storage.hashing import Hasher
from loratool.storage.tensors import Bytes, FilePool
from loratool.streams.progress import Advance
from loratool.streams.run import Run
from loratool.streams.shards import OutputTensor, Shard, Task, write_shards
from loratool.streams.workers import Workers


@dataclass
class Written:
    """What was written: digests by shard, and how many values rounding pushed out of range."""

    shards: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def __iadd__(self, other: Written) -> Written:
        self.shards |= other.shards
        self.counts += other.counts
        return self


class Courier(Protocol):
    """Takes each shard away once it is complete, while the others are still to be made."""

    def fetch(self, shard: OutputShard) -> Written | None:
        """Called before a shard is computed, to have its inputs at hand.

        What is returned, of a shard that was taken away before, takes the place of computing it.
        """

    def take(self, shard: OutputShard, written: Written) -> None:
        """Called when a shard is complete on the disk and none of its inputs is open any more."""


class Recorder(Protocol):
    """Notes beside the writing what takes the merge back; see `undo.recording`."""

    def part(self, job: Job, files: FilePool) -> Merging:
        """A job as a tensor of its shard."""

    def take(self, task: MergeTask, data: Bytes, workers: Workers) -> None:
        """Called in file order with each finished task, and what was written."""

    def finish(self, files: FilePool, workers: Workers) -> None:
        """Called after the last shard."""


def execute(
    shards: Sequence[OutputShard],
    folder: Path,
    run: Run,
    recorder: Recorder | None = None,
    courier: Courier | None = None,
) -> Written:
    """Write these shards of a plan into `folder`, and with a `recorder` what takes the merge back.

    Raises ValueRangeError for NaN, infinity and overflow, naming the tensor, the count and the
    cause.
    """
    advance = run.counted(sum(shard.nbytes for shard in shards))
    with FilePool() as files, Workers(run.threads) as workers:
        write = partial(_write, folder, advance, recorder, files, workers)
        if courier is None:
            written = write(shards)
        else:
            written = Written()
            for shard in shards:
                done = courier.fetch(shard)
                if done is None:
                    done = write([shard])
                    files.close()  # inputs may go now; those that do not are opened again
                    courier.take(shard, done)
                written += done
        if recorder is not None:
            recorder.finish(files, workers)
    return written


def _write(
    folder: Path,
    advance: Advance,
    recorder: Recorder | None,
    files: FilePool,
    workers: Workers,
    outputs: Sequence[OutputShard],
) -> Written:
    part = recorder.part if recorder else Merging
    shards = {
        output.name: Shard(
            output.header,
            workers.ahead((part(job, files) for job in output.jobs), Merging.long_before),
        )
        for output in outputs
    }
    hashers = {name: Hasher() for name in shards}
    for name, shard in shards.items():
        hashers[name].update(shard.header)
    written = Written()

    def consume(shard: str, part: OutputTensor, task: Task, data: Bytes) -> None:
        hashers[shard].update(data)
        assert isinstance(task, MergeTask)
        written.counts += task.counts
        if recorder is not None:
            recorder.take(task, data, workers)

    write_shards(folder, shards, workers, consume, advance)
    written.shards = {name: hasher.text for name, hasher in hashers.items()}
    return written

"""Carry out a plan: stream every tensor through float32 blocks and write it, rounded once.

For each output shard and each tensor in the order of the data: read a block of rows, widen it to
float32, add the factors' product for these rows, round once, check, write. A block holds whole rows
and its size depends on the tensor's shape alone, so the result does not depend on the number of
threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from loratool.merging.arithmetic import MergeTask, Merging
from loratool.merging.plan import Job, Plan
from loratool.merging.rounding import Counts
from loratool.merging.undo.recording import Recorder
from loratool.storage.header import build_header
from loratool.storage.tensors import Bytes, FilePool
from loratool.streams.progress import Advance
from loratool.streams.shards import OutputTensor, Shard, Task, write_shards
from loratool.streams.workers import Workers


@dataclass
class Written:
    """What was written: sha256 by shard, and how many values rounding pushed out of range."""

    shards: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def __iadd__(self, other: Written) -> Written:
        self.shards |= other.shards
        self.counts += other.counts
        return self


class Courier(Protocol):
    """Takes each shard away once it is complete, while the others are still to be made."""

    def fetch(self, shard: str) -> Written | None:
        """Called before a shard is computed, to have its inputs at hand.

        What is returned, of a shard that was taken away before, takes the place of computing it.
        """

    def take(self, shard: str, written: Written) -> None:
        """Called when a shard is complete on the disk and none of its inputs is open any more."""


def execute(
    plan: Plan,
    folder: Path,
    progress: Advance,
    threads: int | None = None,
    recorder: Recorder | None = None,
    courier: Courier | None = None,
) -> Written:
    """Write the shards of `plan` into `folder`, and with a `recorder` what takes the merge back.

    `progress(bytes, shard)` is called as output bytes are done. Raises ValueRangeError for NaN,
    infinity and overflow, naming the tensor, the count and the cause.
    """
    with FilePool() as files, Workers(threads) as workers:
        write = partial(_write, plan, folder, progress, recorder, files, workers)
        if courier is None:
            written = write(list(plan.shards))
        else:
            written = Written()
            for name in plan.shards:
                done = courier.fetch(name)
                if done is None:
                    done = write([name])
                    files.close()  # inputs may go now; those that do not are opened again
                    courier.take(name, done)
                written += done
        if recorder is not None:
            recorder.finish(files, workers)
    return written


def _write(
    plan: Plan,
    folder: Path,
    progress: Advance,
    recorder: Recorder | None,
    files: FilePool,
    workers: Workers,
    names: Sequence[str],
) -> Written:
    part = recorder.part if recorder else Merging
    shards = {
        name: Shard(header_of(plan.shards[name]), (part(job, files) for job in plan.shards[name]))
        for name in names
    }
    digests = {name: hashlib.sha256(shard.header) for name, shard in shards.items()}
    written = Written()

    def consume(shard: str, part: OutputTensor, task: Task, data: Bytes) -> None:
        digests[shard].update(data.data)
        assert isinstance(task, MergeTask)
        written.counts += task.counts
        if recorder is not None:
            recorder.take(task, data, workers)

    write_shards(folder, shards, workers, consume, progress)
    written.shards = {name: digest.hexdigest() for name, digest in digests.items()}
    return written


def header_of(jobs: Sequence[Job]) -> bytes:
    return build_header([(j.name, j.dtype, j.source.shape) for j in jobs], {"format": "pt"})

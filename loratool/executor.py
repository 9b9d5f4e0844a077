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
from pathlib import Path

from loratool.checkpoint.header import build_header
from loratool.checkpoint.tensors import FilePool
from loratool.plan import Job, Plan
from loratool.recording import MergeTask, Merging, Recorder
from loratool.rounding import Counts
from loratool.streaming import Part, Progress, Shard, Task, write_shards
from loratool.workers import Bytes, Workers


@dataclass
class Written:
    """What was written: sha256 by shard, and how many values rounding pushed out of range."""

    shards: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


def execute(
    plan: Plan,
    folder: Path,
    progress: Progress,
    threads: int | None = None,
    recorder: Recorder | None = None,
) -> Written:
    """Write the shards of `plan` into `folder`, and with a `recorder` what takes the merge back.

    `progress(bytes, shard)` is called as output bytes are done. Raises ValueRangeError for NaN,
    infinity and overflow, naming the tensor, the count and the cause.
    """
    written = Written()
    part = recorder.part if recorder else Merging
    with FilePool() as files, Workers(threads) as workers:
        shards = {
            name: Shard(header_of(jobs), (part(job, files) for job in jobs))
            for name, jobs in plan.shards.items()
        }
        digests = {name: hashlib.sha256(shard.header) for name, shard in shards.items()}

        def consume(shard: str, part: Part, task: Task, data: Bytes) -> None:
            digests[shard].update(data.data)
            assert isinstance(task, MergeTask)
            written.counts += task.counts
            if recorder is not None:
                recorder.take(task, data, workers)

        write_shards(folder, shards, workers, consume, progress)
        if recorder is not None:
            recorder.finish(files, workers)
    written.shards = {name: digest.hexdigest() for name, digest in digests.items()}
    return written


def header_of(jobs: Sequence[Job]) -> bytes:
    return build_header([(j.name, j.dtype, j.source.shape) for j in jobs], {"format": "pt"})

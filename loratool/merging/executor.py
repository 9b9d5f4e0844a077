"""Carry out a plan: stream every tensor through float32 blocks and write it, rounded once.

For each output shard and each tensor in the order of the data: read a block of rows, widen it to
float32, add the factors' product for these rows, round once, check, write. A block holds whole rows
and its size depends on the tensor's shape alone, so the result does not depend on the number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from loratool.merging.arithmetic import MergeTask, Merging
from loratool.merging.plan import Job, OutputShard
from loratool.merging.written import ShardPlace, Written
from loratool.storage.hashing import Hasher
from loratool.storage.tensors import Bytes, FilePool
from loratool.streams.progress import Advance
from loratool.streams.run import Run
from loratool.streams.shards import OutputTensor, Shard, Task, write_shards
from loratool.streams.workers import Workers


class Courier(Protocol):
    """Takes each shard away once it is complete, while the others are still to be made."""

    def fetch(self, shard: OutputShard) -> Written | None:
        """Called before a shard is computed, to have its inputs at hand.

        What is returned, of a shard that was taken away before, takes the place of computing it.
        """

    def take(self, shard: OutputShard, written: Written) -> None:
        """Called when a shard is finished and none of its inputs is open any more."""


class Recorder(Protocol):
    """Notes beside the writing what takes the merge back; see `undo.recording`."""

    def part(self, job: Job, files: FilePool) -> Merging:
        """A job as a tensor of its shard."""

    def take(self, shard: str, task: MergeTask, data: Bytes, workers: Workers) -> None:
        """Called in file order with each finished task of a shard, and what was written."""

    def end(self, shard: str) -> tuple[Any, str]:
        """Called after the last task of a shard: what to note of it, and the name of its part,
        a file beside the shard."""


@dataclass(frozen=True)
class Care:
    """What is done with shards beside their writing.

    `check` raises VerifyError for a shard in a folder that is not what it should be.
    """

    recorder: Recorder | None = None
    courier: Courier | None = None
    check: Callable[[OutputShard, Path], None] | None = None


def execute(
    shards: Sequence[OutputShard], place: ShardPlace, run: Run, care: Care | None = None
) -> Written:
    """Write these shards of a plan, but for those that are finished.

    Raises ValueRangeError for NaN, infinity and overflow, naming the tensor, the count and the
    cause.
    """
    care = care or Care()
    advance = run.counted(sum(shard.nbytes for shard in shards))
    with FilePool() as files, Workers(run.threads) as workers:
        writing = _Writing(place, advance, care, files, workers)
        if care.courier is None and care.check is None:
            writing.make([shard for shard in shards if not writing.takes_up(shard)])
        else:
            for shard in shards:
                writing.make_by_itself(shard)
    # Shard by shard, so that sums do not depend on which of them an earlier run had finished.
    total = Written()
    for shard in shards:
        total += writing.written[shard.name]
    return total


@dataclass
class _Writing:
    """Shards on their way to the disk."""

    place: ShardPlace
    advance: Advance
    care: Care
    files: FilePool
    workers: Workers
    written: dict[str, Written] = field(default_factory=dict)
    _hashers: dict[str, Hasher] = field(default_factory=dict)
    _parts: dict[str, list[str]] = field(default_factory=dict)

    def takes_up(self, shard: OutputShard) -> bool:
        """Whether a shard is finished already."""
        note = self.place.note_of(shard.name)
        if note is None:
            return False
        self.written[shard.name] = Written.noted(shard.name, note)
        self.advance(shard.nbytes, shard.name)
        return True

    def make_by_itself(self, shard: OutputShard) -> None:
        """One shard, checked before it is finished, and handed to the courier then."""
        courier, check = self.care.courier, self.care.check
        if self.takes_up(shard):
            note = self.place.note_of(shard.name) or {}
            if check is not None and not note.get("checked"):
                check(shard, self.place.finished)
        else:
            sent = courier.fetch(shard) if courier is not None else None
            if sent is not None:
                self.written[shard.name] = sent
                return
            self._write([shard], lambda _: None)
            self.files.close()  # inputs may go then; those that do not are opened again
            if check is not None:
                check(shard, self.place.own)
            self._publish(shard.name)
        if courier is not None:
            courier.take(shard, self.written[shard.name])

    def make(self, shards: Sequence[OutputShard]) -> None:
        """Shards one after the other, each finished while the next is made."""
        self._write(shards, self._publish)

    def _write(self, outputs: Sequence[OutputShard], flushed: Callable[[str], None]) -> None:
        recorder = self.care.recorder
        part = recorder.part if recorder else Merging
        shards = {
            output.name: Shard(
                output.header,
                self.workers.ahead(
                    (part(job, self.files) for job in output.jobs), Merging.long_before
                ),
            )
            for output in outputs
        }

        def ended(name: str) -> Callable[[], None]:
            if recorder is not None:
                noted, part_file = recorder.end(name)
                self.written[name].recorded[name] = noted
                self._parts[name] = [part_file]
            self.written[name].shards[name] = self._hashers.pop(name).text
            return partial(flushed, name)

        for name, shard in shards.items():
            self._hashers[name] = Hasher()
            self._hashers[name].update(shard.header)
            self.written[name] = Written()
        write_shards(self.place.own, shards, self.workers, self._consume, self.advance, ended)

    def _consume(self, shard: str, part: OutputTensor, task: Task, data: Bytes) -> None:
        assert isinstance(task, MergeTask)
        self._hashers[shard].update(data)
        self.written[shard].counts += task.counts
        if self.care.recorder is not None:
            self.care.recorder.take(shard, task, data, self.workers)

    def _publish(self, name: str) -> None:
        written = self.written[name]
        note = {
            "digest": written.shards[name], "counts": written.counts.__dict__,
            "recorded": written.recorded.get(name), "checked": self.care.check is not None,
        }  # fmt: skip
        self.place.publish(name, written.shards[name], note, *self._parts.get(name, ()))

"""Record, in the merge's own pass, what gives the base back: see `undo.file`.

Each shard is recorded by itself, into a part of its own, because shards are made by several runs or
on several machines; `assembling` makes one file of the parts. For every block that was merged or
cast, the base is predicted from the output as it will be when it is restored, and compared with the
bytes that were read. The digest of each base tensor is taken beside that, by a thread of its own.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loratool.merging.arithmetic import MergeTask, Merging
from loratool.merging.derivation import scale_folded
from loratool.merging.plan import Job, Plan
from loratool.merging.undo.predicted import Predicted, predicted_by
from loratool.merging.undo.prediction import Reversal
from loratool.merging.undo.residual import Distances, Positions, encode, find
from loratool.models.quantised.base import as_stored
from loratool.storage.hashing import Hasher
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import values_of
from loratool.streams.workers import Workers


class RecordedMerging(Merging):
    """A job from which a tensor of the base is predicted, with what its blocks need for that."""

    def __init__(self, job: Job, of_base: Predicted, files: FilePool) -> None:
        super().__init__(job, files)
        self.of_base = of_base
        self.is_copy = of_base.is_copied(job)
        self.stored = self.values if of_base.info is job.source else values_of(of_base.info, files)
        self._reversal: Reversal | None = None

    @property
    def reversal(self) -> Reversal:
        if self._reversal is None:
            with self._lock:
                self.prepare()
                self._reversal = Reversal(
                    self.job, self.source.dtype, self.files, self.gains,
                    [scale_folded(delta) for delta in self.taken],
                )  # fmt: skip
        return self._reversal

    def begin(self, low: int, high: int, workers: Workers) -> MergeTask:
        return RecordedTask(self, low=low, high=high, workers=workers)


@dataclass
class RecordedTask(MergeTask):
    """Some blocks of one job, the base's bytes of them, and what a prediction of these misses."""

    job: RecordedMerging
    low: int = 0
    high: int = 0
    workers: Workers | None = None
    base: Bytes | None = None
    chunk: bytes = b""
    _found: list[tuple[Positions, Distances]] = field(default_factory=list)

    def compute(self, low: int, high: int, data: Bytes) -> None:
        if self.job.is_copy:
            self._compute(low, high, data, None)
            return
        size = self.job.of_base.info.itemsize
        begin, end = self.span
        if self.base is None:
            assert self.workers is not None
            self.base = self.workers.take((end - begin) * size)
        first, last = self.job.of_base.span(low, high)
        raw = self.base[(first - begin) * size : (last - begin) * size]
        if self.job.stored is self.job.values:
            self._compute(low, high, data, raw)
        else:
            self._compute(low, high, data, None)
            self.job.stored.read_into(first, last, raw)
        positions, distances = find(raw, self.job.reversal.predict(low, high, data), size)
        self._found.append((positions + (first - begin), distances))

    @property
    def span(self) -> tuple[int, int]:
        """The elements of the base's tensor that are recorded."""
        return self.job.of_base.span(self.low, self.high)

    def finish(self) -> None:
        if self._found:
            positions, distances = zip(*self._found, strict=True)
            self.chunk = encode(np.concatenate(positions), np.concatenate(distances))
            self._found.clear()


class UndoRecorder:
    """Notes, shard by shard, what an undo file is made of. Use as a context manager.

    Of each shard there is a part in `folder`, `SHARD.undo`: entries one after the other. Their
    names and lengths, and the rows of the base's tensors, are what is noted of the shard.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.base = as_stored(plan.base)
        self._folder = folder
        self._shard = ""
        self._part: BinaryIO | None = None
        self._entries: dict[str, int] = {}
        self._table: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, Hasher] = {}
        self._current: RecordedMerging | None = None

    def __enter__(self) -> UndoRecorder:
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: deque[Future[None]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown(wait=True, cancel_futures=True)
        if self._part is not None:
            self._part.close()

    def part(self, job: Job, files: FilePool) -> Merging:
        of_base = predicted_by(job, self.plan.base)
        return Merging(job, files) if of_base is None else RecordedMerging(job, of_base, files)

    def take(self, shard: str, task: MergeTask, data: Bytes, workers: Workers) -> None:
        """Record a finished task; called in file order. `data` is what was written."""
        self._begin(shard)
        if self._current is not None and task.job is not self._current:
            self._end_tensor(self._current)
        self._current = task.job if isinstance(task.job, RecordedMerging) else None
        if not isinstance(task, RecordedTask):
            return
        of_base = task.job.of_base
        name = of_base.info.name
        if name not in self._table:
            self._table[name] = new_row(of_base.info, of_base.span(0, task.job.task_elements)[1])
            self._digests[name] = Hasher()
        self._table[name]["sizes"].append(len(task.chunk))
        self._append(f"residual:{name}", task.chunk)
        if task.base is None:
            self._digests[name].update(data)  # a copy: what was written is what is read
            return
        begin, end = task.span
        size = (end - begin) * of_base.info.itemsize
        self._hashing.append(self._hasher.submit(self._hash, name, task.base, size, workers))
        if (
            len(self._hashing) > 2
        ):  # on many cores the hash is slowest; the buffers must not pile up
            self._hashing.popleft().result()

    def _begin(self, shard: str) -> None:
        if self._shard != shard or self._part is None:
            self._shard = shard
            self._part = (self._folder / f"{shard}.undo").open("xb")

    def end(self, shard: str) -> tuple[dict[str, Any], str]:
        """What is noted of a shard whose tasks were all taken, and the file of its part."""
        self._begin(shard)  # a shard may have no tasks
        if self._current is not None:
            self._end_tensor(self._current)
        while self._hashing:
            self._hashing.popleft().result()
        assert self._part is not None
        self._part.flush()
        os.fsync(self._part.fileno())
        self._part.close()
        for name, row in self._table.items():
            finish_row(row, self._digests[name])
        noted = {"tensors": self._table, "entries": list(self._entries.items())}
        self._current = self._part = None
        self._entries, self._table, self._digests = {}, {}, {}
        return noted, f"{shard}.undo"

    def _append(self, entry: str, data: bytes) -> None:
        """Add to the newest entry of the part, or begin another one."""
        if data:
            assert self._part is not None
            self._part.write(data)
            self._entries[entry] = self._entries.get(entry, 0) + len(data)

    def _hash(self, name: str, base: Bytes, size: int, workers: Workers) -> None:
        self._digests[name].update(base[:size])
        workers.give(base)

    def _end_tensor(self, part: RecordedMerging) -> None:
        if not part.is_copy:
            self._keep_taken(part)
            name = part.of_base.info.name
            gains = self._table[name]["gains"]
            for index, gain in enumerate(part.gains):
                gains.append(0 if gain is None else gain.numel())
                if gain is not None:
                    self._append(f"gain:{name}:{index}", gain.numpy().tobytes())

    def _keep_taken(self, part: RecordedMerging) -> None:
        """Store what was taken off the base: another machine would decompose it otherwise."""
        name = part.of_base.info.name
        places = [delta.place for delta in part.job.deltas]
        for index, delta in enumerate(part.reversal.taken):
            pair = delta.factors.left_right()
            assert pair is not None
            left, right = pair
            numbers = [places.index(delta.place), left.shape[0], *right.shape]
            self._table[name]["taken"].append(numbers)
            self._append(f"taken:{name}:{index}", left.tobytes() + right.tobytes())


def new_row(info: TensorInfo, step: int) -> dict[str, Any]:
    """What the undo file says of a tensor of the base of which nothing is recorded yet."""
    return {
        "dtype": info.dtype, "shape": info.shape, "whole": False, "step": step, "sizes": [],
        "gains": [], "taken": [],
    }  # fmt: skip


def finish_row(row: dict[str, Any], hasher: Hasher) -> None:
    """Complete the row of a tensor of which everything is recorded."""
    row["digest"] = hasher.text
    if not any(row["sizes"]):
        row["sizes"], row["step"] = [], 0

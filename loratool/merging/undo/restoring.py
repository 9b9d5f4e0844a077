"""Write the base of a reversible merge again, bit for bit, from the output and its undo file.

The plan is the merge's own, made again from the base's description in the undo file. Every tensor
of the base is predicted from the output as it was when the undo file was written, what the
prediction misses is added, and its digest must be that of the base.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from loratool.errors import FileError, RestoreError
from loratool.merging.derivation import computed_delta
from loratool.merging.plan import Job, Plan
from loratool.merging.undo.file import BaseShard, BaseTensor, Undo
from loratool.merging.undo.predicted import Predicted, predicted_jobs
from loratool.merging.undo.prediction import Reversal
from loratool.merging.undo.residual import Distances, Positions, apply
from loratool.merging.written import ShardPlace
from loratool.models.checkpoint import Checkpoint
from loratool.storage.hashing import Hasher, shortened
from loratool.storage.header import build_header
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, block_elements
from loratool.storage.values import values_of
from loratool.streams.run import Run
from loratool.streams.scratch import scratch
from loratool.streams.shards import OutputTensor, Shard, Task, write_shards
from loratool.streams.workers import BLOCKS_PER_TASK, Workers


def restore(
    plan: Plan,
    merged: Checkpoint,
    undo: Undo,
    shards: Sequence[BaseShard],
    place: ShardPlace,
    run: Run,
) -> None:
    """Write these shards of the base, but for those that are finished.

    Raises RestoreError for a tensor that does not come out as it was.
    """
    jobs = predicted_jobs(plan)
    hashers: dict[str, Hasher] = {}
    of_files: dict[str, Hasher] = {}
    left = {name: tensor.info.nbytes for name, tensor in undo.tensors.items()}
    advance = run.counted(sum(_size(shard, undo) for shard in shards))
    todo = []
    for shard in shards:
        if place.note_of(shard.file) is None:
            todo.append(shard)
            of_files[shard.file] = Hasher()
            of_files[shard.file].update(header_of(shard, undo))
        else:
            advance(_size(shard, undo), shard.file)

    def consume(shard: str, part: OutputTensor, task: Task, data: Bytes) -> None:
        assert isinstance(part, RestoredPart)
        name = part.info.name
        if name not in hashers:
            hashers[name] = Hasher(part.tensor.digest)
        hashers[name].update(data)
        of_files[shard].update(data)
        left[name] -= len(data)
        if not left[name]:
            _check_hash(name, hashers.pop(name).text, undo, merged)

    def parts(shard: BaseShard, files: FilePool) -> Iterator[OutputTensor]:
        for name in shard.tensors:
            tensor = undo.tensors[name]
            if tensor.whole:
                yield WholePart(tensor, undo, files)
            else:
                job, of_base = jobs[name]
                yield ReversedPart(tensor, undo, files, job, of_base, merged.tensors[job.name])

    def ended(name: str) -> Callable[[], None]:
        return partial(place.publish, name, of_files.pop(name).text, {})

    with FilePool() as files, Workers(run.threads) as workers:
        outputs = {s.file: Shard(header_of(s, undo), parts(s, files)) for s in todo}
        write_shards(place.own, outputs, workers, consume, advance, ended)


def _size(shard: BaseShard, undo: Undo) -> int:
    return sum(undo.tensors[name].info.nbytes for name in shard.tensors)


def header_of(shard: BaseShard, undo: Undo) -> bytes:
    """The first bytes of the base's file, or such as describe its tensors."""
    if shard.header:
        return shard.header
    infos = [undo.tensors[name].info for name in shard.tensors]
    return build_header([(i.name, i.dtype, i.shape) for i in infos], {"format": "pt"})


def _check_hash(name: str, found: str, undo: Undo, merged: Checkpoint) -> None:
    expected = undo.tensors[name].digest
    if found != expected:
        raise RestoreError(
            f"{name}: it does not come out as it was in the base ({shortened(found)}, expected "
            f"{shortened(expected)}).",
            f"{merged.label} was changed after the merge, or its undo file is of another one. "
            "Nothing was written. `loratool unmerge --subtract` does without the undo file, but "
            "not exactly.",
        )


class RestoredPart(ABC):
    """A tensor of the base as a part of its shard."""

    def __init__(self, tensor: BaseTensor, undo: Undo, files: FilePool) -> None:
        self.tensor = tensor
        self.info = tensor.info
        self.undo = undo
        self.files = files

    @property
    def length(self) -> int:
        return self.info.nbytes // self.itemsize

    @property
    def itemsize(self) -> int:
        return self.info.itemsize

    @property
    def block_elements(self) -> int:
        return block_elements()

    @property
    def task_elements(self) -> int:
        """The elements of a chunk, so that a task needs one."""
        return self.tensor.step or BLOCKS_PER_TASK * self.block_elements

    @abstractmethod
    def begin(self, low: int, high: int, workers: Workers) -> Task:
        """The task that restores elements `[low, high)`."""


class WholePart(RestoredPart):
    """A tensor that the merge replaced; the undo file holds it."""

    def begin(self, low: int, high: int, workers: Workers) -> Task:
        return _WholeTask(self, low, self.undo.whole(self.info.name, low, self.files))


@dataclass
class _WholeTask:
    part: WholePart
    low: int
    data: Bytes

    def compute(self, low: int, high: int, data: Bytes) -> None:
        size = self.part.itemsize
        data[:] = self.data[(low - self.low) * size : (high - self.low) * size]

    def finish(self) -> None:
        pass


class ReversedPart(RestoredPart):
    """A tensor that was merged, cast or copied."""

    def __init__(
        self,
        tensor: BaseTensor,
        undo: Undo,
        files: FilePool,
        job: Job,
        of_base: Predicted,
        merged: TensorInfo,
    ) -> None:
        super().__init__(tensor, undo, files)
        self.job, self.of_base = job, of_base
        self.merged = values_of(merged, files)
        self._lock = threading.Lock()

    @property
    def block_elements(self) -> int:
        return self.of_base.span(0, block_elements(self.job.columns))[1]

    @cached_property
    def reversal(self) -> Reversal:
        source = self.job.source
        kind = "f8" if source.dtype == "F64" else "f4"
        gains = [
            self.undo.gain(self.info.name, index, kind, self.files)
            for index in range(len(self.job.deltas))
        ]
        tensors = [None if gain is None else torch.from_numpy(gain) for gain in gains]
        taken = []
        for index, (place, out, _, width) in enumerate(self.tensor.taken):
            fitting = self.job.deltas[place : place + 1]
            if not fitting or fitting[0].place.shape(source.shape) != (out, width):
                raise FileError(
                    f"{self.undo.path}: it is damaged at taken:{self.info.name}:{index}.",
                    "Fetch it again.",
                )
            pair = self.undo.taken(self.info.name, index, self.files)
            taken.append(computed_delta(fitting[0], *pair))
        return Reversal(self.job, source.dtype, self.files, tensors, taken)

    def prepared(self) -> Reversal:
        with self._lock:
            return self.reversal

    def begin(self, low: int, high: int, workers: Workers) -> Task:
        return _ReversedTask(self, low, *self.undo.residual(self.info.name, low, self.files))


@dataclass
class _ReversedTask:
    part: ReversedPart
    low: int
    positions: Positions
    distances: Distances

    def compute(self, low: int, high: int, data: Bytes) -> None:
        part = self.part
        if part.of_base.is_copied(part.job):
            part.merged.read_into(low, high, data)
            return
        begin, end = part.of_base.span_of_job(low, high)
        size = (end - begin) * part.merged.info.itemsize
        merged = scratch.get("merged", size, torch.uint8).numpy()
        part.merged.read_into(begin, end, merged)
        data[:] = part.prepared().predict(begin, end, merged)
        first, last = np.searchsorted(self.positions, (low - self.low, high - self.low))
        apply(data, self.positions[first:last] - (low - self.low), self.distances[first:last])

    def finish(self) -> None:
        pass

"""Record, in the merge's own pass, what gives the base back: see `undo.file`.

For every block that was merged or cast, the base is predicted from the output as it will be when it
is restored, and compared with the bytes that were read. The digest of each base tensor is taken
beside that, by a thread of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.merging.arithmetic import MergeTask, Merging
from loratool.merging.derivation import scale_folded
from loratool.merging.plan import Job, Plan
from loratool.merging.undo.predicted import Predicted, predicted_by, predicted_jobs
from loratool.merging.undo.prediction import Reversal
from loratool.merging.undo.residual import (
    Distances,
    Positions,
    compress,
    encode,
    encode_whole,
    find,
)
from loratool.merging.undo.sidefiles import Kept
from loratool.merging.undo.writer import UndoWriter
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import as_stored
from loratool.storage.hashing import Hasher, digest_of
from loratool.storage.header import header_bytes, read_header
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, block_elements, blocks
from loratool.storage.values import values_of
from loratool.streams.workers import BLOCKS_PER_TASK, Workers


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
    """Fills an undo file while a plan is carried out. Use as a context manager.

    `kept` is what goes into it beside the weights.
    """

    def __init__(self, plan: Plan, kept: Kept) -> None:
        self.plan = plan
        self.base = as_stored(plan.base)
        self.kept = kept
        self.nbytes = 0
        self._of_base = predicted_jobs(plan)
        self._table: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, Hasher] = {}
        self._current: RecordedMerging | None = None
        self._headers = dict(_headers(self.base))
        self._writer = UndoWriter(kept.path, self._entries())

    def __enter__(self) -> UndoRecorder:
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: deque[Future[None]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown(wait=True, cancel_futures=True)
        self._writer.close()

    def _entries(self) -> list[str]:
        """The names of all entries that the undo file may get."""
        names = [f"residual:{n}" for n, (job, of) in self._of_base.items() if not of.is_copied(job)]
        names += [f"whole:{name}" for name in self.base.tensors if name not in self._of_base]
        for name, (job, _) in self._of_base.items():
            names += [f"gain:{name}:{i}" for i, d in enumerate(job.deltas) if d.factors.magnitude]
            names += [f"taken:{name}:{i}" for i in range(len(job.taken))]
        names += [f"header:{file}" for file in self._headers]
        return names + [f"file:{name}" for name in self.kept.files]

    def part(self, job: Job, files: FilePool) -> Merging:
        of_base = predicted_by(job, self.plan.base)
        return Merging(job, files) if of_base is None else RecordedMerging(job, of_base, files)

    def take(self, task: MergeTask, data: Bytes, workers: Workers) -> None:
        """Record a finished task; called in file order. `data` is what was written."""
        if self._current is not None and task.job is not self._current:
            self._end_tensor(self._current)
        self._current = task.job if isinstance(task.job, RecordedMerging) else None
        if not isinstance(task, RecordedTask):
            return
        of_base = task.job.of_base
        name = of_base.info.name
        row = self._row(name, of_base.span(0, task.job.task_elements)[1])
        row["sizes"].append(len(task.chunk))
        self._writer.append(f"residual:{name}", task.chunk)
        if task.base is None:
            self._digests[name].update(data)  # a copy: what was written is what was read
            return
        begin, end = task.span
        size = (end - begin) * of_base.info.itemsize
        self._hashing.append(self._hasher.submit(self._hash, name, task.base, size, workers))
        if (
            len(self._hashing) > 2
        ):  # on many cores the hash is slowest; the buffers must not pile up
            self._hashing.popleft().result()

    def _hash(self, name: str, base: Bytes, size: int, workers: Workers) -> None:
        self._digests[name].update(base[:size])
        workers.give(base)

    def _row(self, name: str, step: int) -> dict[str, Any]:
        if name not in self._table:
            info = self.base.tensors[name]
            self._digests[name] = Hasher()
            self._table[name] = {
                "dtype": info.dtype, "shape": info.shape, "whole": False, "step": step, "sizes": [],
                "gains": [],
                "taken": [],
            }  # fmt: skip
        return self._table[name]

    def _end_tensor(self, part: RecordedMerging) -> None:
        if not part.is_copy:
            self._keep_taken(part)
            name = part.of_base.info.name
            gains = self._table[name]["gains"]
            for index, gain in enumerate(part.gains):
                gains.append(0 if gain is None else gain.numel())
                if gain is not None:
                    entry = f"gain:{name}:{index}"
                    self._writer.append(entry, gain.numpy().tobytes())

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
            entry = f"taken:{name}:{index}"
            self._writer.append(entry, left.tobytes() + right.tobytes())

    def finish(self, files: FilePool, workers: Workers) -> None:
        """Store what was replaced, the files of the base and the table, and close."""
        if self._current is not None:
            self._end_tensor(self._current)
        while self._hashing:
            self._hashing.popleft().result()
        for name, info in self.base.tensors.items():
            if name not in self._table:
                self._store_whole(name, info, files, workers)
        for file, header in self._headers.items():
            self._writer.append(f"header:{file}", compress(header))
        for name, content in self.kept.files.items():
            self._writer.append(f"file:{name}", compress(content))
        for name, row in self._table.items():
            row["digest"] = self._digests[name].text
            if not any(row["sizes"]):
                row["sizes"], row["step"] = [], 0
        table: dict[str, Any] = {
            "tensors": {name: self._table[name] for name in self.base.tensors},
            "shards": [
                {"file": _file_name(self.base, shard), "tensors": names}
                for shard, names in self.base.shards.items()
            ],
            "side_files": self.kept.hashes,
            "files": {name: digest_of(content) for name, content in self.kept.files.items()},
            "headers": {name: digest_of(header) for name, header in self._headers.items()},
        }
        if self.base is not self.plan.base:
            table |= {"quantised": True, "metadata": self.base.metadata}
        self.nbytes = self._writer.finish(table)

    def _store_whole(self, name: str, info: TensorInfo, files: FilePool, workers: Workers) -> None:
        """Store a tensor itself, because no job begins with it, or it has no elements."""
        step = BLOCKS_PER_TASK * block_elements()
        row = self._row(name, step)
        row["whole"] = True
        values = values_of(info, files)

        def piece(low: int, high: int) -> tuple[Bytes, bytes]:
            raw = values.bytes(low, high)
            return raw, encode_whole(raw, info.itemsize)

        calls = (partial(piece, low, high) for low, high in blocks(info.numel, step))
        for raw, chunk in workers.in_order(calls):
            self._digests[name].update(raw)
            row["sizes"].append(len(chunk))
            self._writer.append(f"whole:{name}", chunk)


def _headers(base: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """The first bytes of each base shard that can be written again as it was.

    Torch files cannot, nor files with tensors that the index places elsewhere; their tensors come
    back, in a file with a header of our own.
    """
    for shard, names in base.shards.items():
        path = _path(base, names)
        if path.suffix == ".safetensors" and list(read_header(path)[0]) == names:
            yield _file_name(base, shard), header_bytes(path)


def _file_name(base: Checkpoint, shard: str) -> str:
    """What the restored shard is called: as in the base, unless that was a torch file."""
    path = _path(base, base.shards[shard])
    return path.name if path.suffix == ".safetensors" else shard


def _path(base: Checkpoint, names: list[str]) -> Path:
    return base.tensors[names[0]].file

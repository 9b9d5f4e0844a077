"""Carry out a plan: stream every tensor through float32 blocks and write it, rounded once.

For each output shard and each tensor in the order of the data: read a block of rows, widen it to
float32, add the factors' product for these rows, round once, check, write. Worker threads take
blocks; the calling thread takes their results in order and hashes. A block holds whole rows, its
size depends on the tensor's shape alone, and every thread computes with one BLAS thread, so the
result does not depend on the number of threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loratool.checkpoint.tensors import (
    BLOCK_ELEMENTS,
    DTYPE_BITS,
    FilePool,
    blocks,
    read_float32,
    read_raw,
)
from loratool.checkpoint.writer import ShardWriter
from loratool.errors import ValueRangeError
from loratool.matching import Delta
from loratool.plan import Job, Plan

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, str], None]

_TORCH = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

#: For each output dtype: unsigned type of the bits, mask of the magnitude, bits of infinity, bits
#: of the smallest normal number. Magnitudes compare like their bits.
_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int, int, int]] = {
    "F16": (np.uint16, 0x7FFF, 0x7C00, 0x0400),
    "BF16": (np.uint16, 0x7FFF, 0x7F80, 0x0080),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000, 0x00800000),
    "F64": (np.uint64, (1 << 63) - 1, 0x7FF << 52, 1 << 52),
}


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
    workers = threads or min(8, len(os.sched_getaffinity(0)))
    written = Written()
    before = torch.get_num_threads()
    with (
        FilePool() as files,
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ThreadPoolExecutor(1) as flusher,
    ):
        flushed: list[Future[None]] = []
        try:
            for name, jobs in plan.shards.items():
                contents = [(j.name, j.dtype, j.source.shape) for j in jobs]
                writer = ShardWriter(folder / name, contents, {"format": "pt"})
                try:
                    _write_shard(writer, jobs, files, pool, 2 * workers, progress, written)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    writer.close()
                    raise
                written.shards[name] = writer.sha256()
                flushed.append(flusher.submit(writer.flush_and_close))
            for done in flushed:
                done.result()
        finally:
            torch.set_num_threads(before)
    return written


def _write_shard(
    writer: ShardWriter,
    jobs: list[Job],
    files: FilePool,
    pool: ThreadPoolExecutor,
    window: int,
    progress: Progress,
    written: Written,
) -> None:
    """Compute and write all blocks of a shard, at most `window` of them in flight."""
    spare: deque[Bytes] = deque()
    running: deque[Future[_Block]] = deque()

    def finish_one() -> None:
        block = running.popleft().result()
        writer.hash_next(block.data.data)
        written.subnormal += block.subnormal
        written.zeroed += block.zeroed
        progress(len(block.data), writer.path.name)
        spare.append(block.buffer)

    for task in _tasks(jobs, files):
        if len(running) >= window:
            finish_one()
        buffer = spare.popleft() if spare else None
        running.append(pool.submit(task.run, writer, buffer))
    while running:
        finish_one()


@dataclass
class _Block:
    data: Bytes
    buffer: Bytes
    subnormal: int = 0
    zeroed: int = 0


@dataclass
class _Task:
    """One block of one job: elements `[low, high)` of the tensor, whole rows where rows matter."""

    job: _RunningJob
    low: int
    high: int
    offset: int

    def run(self, writer: ShardWriter, buffer: Bytes | None) -> _Block:
        size = (self.high - self.low) * self.job.out_size
        if buffer is None or len(buffer) < size:
            buffer = np.empty(max(size, 1 << 21), np.uint8)
        block = _Block(buffer[:size], buffer)
        self.job.compute(self.low, self.high, block)
        writer.write(self.offset + self.low * self.job.out_size, block.data.data)
        return block


def _tasks(jobs: list[Job], files: FilePool) -> Iterator[_Task]:
    offset = 0
    for job in jobs:
        running = _RunningJob(job, files)
        for low, high in blocks(job.source.numel, running.block_elements):
            yield _Task(running, low, high, offset)
        offset += job.nbytes


class _RunningJob:
    """A job with what its blocks share: loaded factors, and column norms where DoRA needs them.

    The tensor is seen as a matrix `[rows, columns]`, all axes but the first flattened.
    """

    def __init__(self, job: Job, files: FilePool) -> None:
        self.job = job
        self.files = files
        self.source = job.source
        self.columns = math.prod(job.source.shape[1:]) if job.deltas or job.rows else 1
        self.out_size = DTYPE_BITS[job.dtype] // 8
        self.work = torch.float64 if job.source.dtype == "F64" else torch.float32
        self._lock = threading.Lock()

    @property
    def block_elements(self) -> int:
        """Elements of a block: whole rows, about BLOCK_ELEMENTS of them; all if strided."""
        if self.source.strides is not None:
            return max(1, self.source.numel)
        return max(1, BLOCK_ELEMENTS // max(1, self.columns)) * max(1, self.columns)

    @cached_property
    def _strided(self) -> Bytes:
        return read_raw(self.source, self.files)

    @cached_property
    def _terms(self) -> list[_Term]:
        return [_Term(delta, self) for delta in self.job.deltas]

    @cached_property
    def _biases(self) -> list[torch.Tensor]:
        return [
            torch.from_numpy(read_float32(t.info, self.files)).mul_(t.scale)
            for t in self.job.biases
        ]

    @cached_property
    def _token_rows(self) -> dict[int, npt.NDArray[np.float32]]:
        return {
            index: row
            for rows in self.job.rows
            for index, row in zip(rows.indices, read_float32(rows.rows, self.files), strict=True)
        }

    def load(self, low: int, high: int) -> torch.Tensor:
        """Elements `[low, high)` of the source, flat, in the working precision."""
        return self._source_tensor(self._read(low, high)).to(self.work)

    def _read(self, low: int, high: int) -> Bytes:
        size = self.source.itemsize
        if self.source.strides is not None:
            with self._lock:
                return self._strided[low * size : high * size]
        raw = np.empty((high - low) * size, np.uint8)
        self.files.read_into(self.source.file, self.source.start + low * size, raw.data)
        return raw

    def _source_tensor(self, raw: Bytes) -> torch.Tensor:
        return torch.from_numpy(raw).view(_TORCH[self.source.dtype])

    def compute(self, low: int, high: int, block: _Block) -> None:
        """Fill `block.data` with the output bytes of elements `[low, high)`, and check them."""
        if self.job.is_verbatim:
            size = self.source.itemsize
            if self.source.strides is not None:
                block.data[:] = self._read(low, high)
            else:
                self.files.read_into(
                    self.source.file, self.source.start + low * size, block.data.data
                )
            if self.job.checked and _magnitudes(block.data, self.job.dtype)[1]:
                self.explain_values()
            return
        values = self.load(low, high)
        if self.job.is_arithmetic:
            with self._lock:
                # The first block of a tensor loads what all of them share.
                terms, biases, rows = self._terms, self._biases, self._token_rows
            if terms or rows:
                matrix = values.view(-1, self.columns)
                first, last = low // self.columns, high // self.columns
                _apply(matrix, terms, first, last)
                for index in rows.keys() & range(first, last) if rows else ():
                    matrix[index - first] = torch.from_numpy(rows[index])
            for bias in biases:
                values += bias[low:high]
        out = torch.from_numpy(block.data).view(_TORCH[self.job.dtype])
        out.copy_(values)
        magnitudes, broken = _magnitudes(block.data, self.job.dtype)
        if broken:
            self.explain_values()
        _count_underflow(magnitudes, values, self.job.dtype, block)

    def explain_values(self) -> None:
        """Walk through the tensor again to say what is wrong with it, and raise that."""
        name = self.job.name
        limit = torch.finfo(_TORCH[self.job.dtype]).max
        from_base = overflow = 0
        largest = 0.0
        for low, high in blocks(self.source.numel, self.block_elements):
            source = self.load(low, high)
            from_base += int((~torch.isfinite(source)).sum())
            if self.job.deltas:
                _apply(
                    source.view(-1, self.columns), self._terms, low // self.columns,
                    high // self.columns,
                )  # fmt: skip
            finite = source[torch.isfinite(source)].abs()
            overflow += int((finite > limit).sum())
            largest = max(largest, float(finite.max()) if len(finite) else 0.0)
        where = f"{name} ({self.source.file})"
        if from_base:
            raise ValueRangeError(
                f"{where}: {from_base} values are NaN or infinite in the input already.",
                "The file is damaged, or training diverged. Nothing was written.",
            )
        if overflow or largest > limit:
            raise ValueRangeError(
                f"{where}: {max(overflow, 1)} values overflow {self.job.dtype} (largest "
                f"{largest:.4g}, limit {limit:.5g}).",
                "Use --dtype bfloat16, float32, or base. Nothing was written.",
            )
        raise ValueRangeError(
            f"{where}: the adapter makes values NaN or infinite (or just too large for "
            f"{self.job.dtype}).",
            "Look at it with `loratool inspect`. Nothing was written.",
        )


class _Term:
    """One delta with its factors loaded, oriented like the stored tensor.

    `left [rows, r]` and `right [r, columns]` are B and A, or Aᵀ and Bᵀ where the stored matrix is
    transposed. For DoRA, `gain` holds m/‖W + Δ‖ where the norm runs over stored columns.
    """

    def __init__(self, delta: Delta, job: _RunningJob) -> None:
        b, a = delta.module.factors(job.files)
        left, right = (a.T, b.T) if delta.transposed else (b, a)
        self.left = torch.from_numpy(np.ascontiguousarray(left)).to(job.work)
        self.right = torch.from_numpy(np.ascontiguousarray(right)).to(job.work)
        self.scale = delta.scale
        self.magnitude: torch.Tensor | None = None
        self.by_column = delta.transposed
        self.gain: torch.Tensor | None = None
        if delta.module.magnitude is not None:
            values = read_float32(delta.module.magnitude, job.files).reshape(-1)
            self.magnitude = torch.from_numpy(values).to(job.work)
            if self.by_column:
                self.gain = self.magnitude / self._column_norms(job)

    def product(self, first: int, last: int) -> torch.Tensor:
        """`scale·B·A` for stored rows `[first, last)`: first the product, then the scale."""
        return torch.mm(self.left[first:last], self.right).mul_(self.scale)

    def adapted(self, weight: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """DoRA: `m/‖W + Δ‖·(W + Δ)` for stored rows, the norm over each output's weights."""
        direction = self.product(first, last).add_(weight)
        if self.gain is not None:
            return direction.mul_(self.gain)
        assert self.magnitude is not None
        norms = torch.linalg.norm(direction, dim=1, keepdim=True)
        return direction.mul_(self.magnitude[first:last, None] / norms)

    def _column_norms(self, job: _RunningJob) -> torch.Tensor:
        """‖W + Δ‖ of every stored column, `[columns]`: one more pass, summed in float64."""
        total = torch.zeros(job.columns, dtype=torch.float64)
        for low, high in blocks(job.source.numel, job.block_elements):
            first, last = low // job.columns, high // job.columns
            direction = job.load(low, high).view(-1, job.columns) + self.product(first, last)
            total += direction.double().square_().sum(dim=0)
        return total.sqrt_().to(job.work)


def _apply(matrix: torch.Tensor, terms: list[_Term], first: int, last: int) -> None:
    """`matrix += Σ Δᵢ` in place; a DoRA term adds `m/‖W + Δ‖·(W + Δ) − W` of the untouched W.

    That is the sum PEFT's forward pass computes when several adapters are active. (Its merge chains
    them instead, which is another function; see docs/design.md.)
    """
    dora = [t for t in terms if t.magnitude is not None]
    if len(terms) == 1 and dora:
        matrix.copy_(dora[0].adapted(matrix, first, last))
        return
    original = matrix.clone() if dora else matrix
    for term in terms:
        if term.magnitude is None:
            matrix += term.product(first, last)
        else:
            matrix += term.adapted(original, first, last).sub_(original)


def _magnitudes(data: Bytes, dtype: str) -> tuple[npt.NDArray[Any], bool]:
    """The bits of |x|, and whether any is infinite or NaN."""
    kind, mask, infinity, _ = _BITS[dtype]
    bits = np.bitwise_and(data.view(kind), kind(mask))
    return bits, bool(bits.size) and int(bits.max()) >= infinity


def _count_underflow(
    magnitudes: npt.NDArray[Any], values: torch.Tensor, dtype: str, block: _Block
) -> None:
    """Count nonzero values that rounding made subnormal or zero."""
    smallest_normal = _BITS[dtype][3]
    tiny = int(np.count_nonzero(magnitudes < smallest_normal))
    if not tiny:
        return
    zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
    if zeros:
        block.zeroed = zeros - int(np.count_nonzero(values.numpy() == 0))
    block.subnormal = tiny - zeros

"""What happens to the values of one tensor, block by block.

A block is a run of whole rows, widened to float32; what an initialisation took off the base before
training is taken off, the factors' product for these rows is added, the result is rounded once and
checked. Blocks of a tensor can be computed in any order and by any
thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from loratool.dtypes import DTYPE_BITS
from loratool.errors import ValueRangeError
from loratool.merging.counts import Counts, MeasuredValues
from loratool.merging.derivation import derived
from loratool.merging.match import Delta
from loratool.merging.plan import Job
from loratool.merging.products import LoadedDelta, Terms
from loratool.merging.rounding import (
    TORCH,
    count_underflow,
    magnitudes_of,
    narrowed,
    squared,
)
from loratool.storage.tensors import BLOCK_ELEMENTS, Bytes, FilePool, block_elements, blocks
from loratool.storage.values import read_float32, values_of
from loratool.streams.scratch import scratch
from loratool.streams.workers import BLOCKS_PER_TASK, Workers
from loratool.words import counted


class RunningJob:
    """A job with what its blocks share: loaded factors, and column norms where DoRA needs them.

    The tensor is seen as a matrix `[stored rows, columns]`, see `Job.columns`.
    """

    def __init__(self, job: Job, files: FilePool) -> None:
        self.job = job
        self.files = files
        self.source = job.source
        self.columns = job.columns
        self.values = values_of(job.source, files)
        self.length = self.values.length
        # Elements of less than a byte are only ever copied, as bytes.
        self.itemsize = max(1, DTYPE_BITS[job.dtype] // 8)
        smallest = {dtype: torch.finfo(TORCH[dtype]).smallest_normal for dtype in TORCH}
        #: Whether rounding can make a value subnormal that was not so before.
        self.may_underflow = job.is_arithmetic or (
            job.checked and smallest[job.dtype] > smallest[job.source.dtype]
        )
        self.work = torch.float64 if job.source.dtype == "F64" else torch.float32
        # Re-entrant: DoRA reads the tensor while its terms are being prepared.
        self._lock = threading.RLock()

    @property
    def block_elements(self) -> int:
        """Elements of a block: whole rows."""
        return block_elements(self.columns)

    @property
    def task_elements(self) -> int:
        # What is made of parts that are larger than a block anyway fills its task with fewer.
        fitting = BLOCKS_PER_TASK * BLOCK_ELEMENTS // self.block_elements
        return max(1, min(BLOCKS_PER_TASK, fitting)) * self.block_elements

    @cached_property
    def taken(self) -> list[Delta]:
        """What was taken off the base before training, in numbers; the whole tensor is read."""
        return [derived(one, self.values) for one in self.job.taken]

    @cached_property
    def loaded_taken(self) -> Terms[LoadedDelta]:
        shape = self.source.shape
        return Terms(LoadedDelta(delta, shape, self.files, self.work) for delta in self.taken)

    @cached_property
    def terms(self) -> Terms[LoadedDelta]:
        shape = self.source.shape
        terms = Terms(LoadedDelta(d, shape, self.files, self.work) for d in self.job.deltas)
        for term in terms:
            if term.transposed and term.magnitude is not None:
                term.gains = term.magnitude / self._column_norms(term)
        return terms

    def _column_norms(self, term: LoadedDelta) -> torch.Tensor:
        """‖W + Δ‖ of every stored column, `[out]`: one more pass, summed in float64."""
        assert term.magnitude is not None
        total = torch.zeros(len(term.magnitude), dtype=torch.float64)
        for low, high in blocks(self.source.numel, self.block_elements):
            window = term.window(low // self.columns, high // self.columns)
            if window is not None:
                values = self.as_trained(self.load(low, high), low, high)
                part = window.of(values.view(-1, self.columns))
                direction = part + term.product(window)
                total += direction.double().square_().sum(dim=0)
        return total.sqrt_().to(self.work)

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

    @property
    def gains(self) -> list[torch.Tensor | None]:
        """What DoRA multiplies rows or columns with, for each delta; filled block by block."""
        return [term.gains for term in self.terms]

    def prepare(self) -> None:
        """Load what the blocks share. Called before the first block, by one thread at a time."""
        with self._lock:
            _ = self._token_rows, self.loaded_taken, self.terms, self._biases

    def long_before(self) -> Callable[[], None] | None:
        """What may begin before the first block, because it takes long: a decomposition."""
        derives = any(taken.how != "given" for taken in self.job.taken)
        return self.prepare if derives else None

    def load(self, low: int, high: int, raw: Bytes | None = None) -> torch.Tensor:
        """Elements `[low, high)` of the source with trained token rows put in, flat, widened.

        Their bytes are left in `raw`. The tensor is this thread's scratch; the next call overwrites
        it.
        """
        if raw is None:
            raw = self._raw_scratch(low, high)
        self.values.read_into(low, high, raw)
        values = scratch.get("values", high - low, self.work)
        values.copy_(torch.from_numpy(raw).view(TORCH[self.source.dtype]))
        for index, row in self._token_rows.items():
            if low <= index * self.columns < high:
                values.view(-1, self.columns)[index - low // self.columns] = torch.from_numpy(row)
        return values

    def _raw_scratch(self, low: int, high: int) -> Bytes:
        return scratch.get("raw", (high - low) * self.source.itemsize, torch.uint8).numpy()

    def compute(
        self,
        low: int,
        high: int,
        data: Bytes,
        counts: Counts,
        raw: Bytes | None = None,
        measured: bool = False,
    ) -> None:
        """Fill `data` with the output bytes of elements `[low, high)`; check and count them.

        The source's bytes are left in `raw` where it is given, unless they are the output's. Where
        `measured`, what rounding takes of the delta is measured too.
        """
        if measured and isinstance(self.values, MeasuredValues):
            self.values.read_measured(low, high, data, counts)
            return
        if self.job.is_verbatim:
            self.values.read_into(low, high, data)
            if self.job.checked and magnitudes_of(data, self.job.dtype)[1]:
                self.explain_values()
            return
        self.prepare()
        if raw is None:
            raw = self._raw_scratch(low, high)
        values = self.load(low, high, raw)
        if measured:
            before = scratch.get("before", high - low, self.work).copy_(values)
        self.add(values, low, high)
        out = torch.from_numpy(data).view(TORCH[self.job.dtype])
        narrowed(values, out)
        magnitudes, broken = magnitudes_of(data, self.job.dtype)
        if broken:
            self.explain_values()
        if measured:
            delta = before.sub_(values)
            counts.delta += squared(delta)
            lost = before.copy_(out).sub_(values)
            counts.lost += squared(lost)
        if self.may_underflow:
            unchanged = raw if self.source.dtype == self.job.dtype else None
            count_underflow(magnitudes, values, unchanged, self.job.dtype, counts)

    def add(self, values: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Make `values`, elements `[low, high)` of the base, those of the merged model, in place,
        but for rounding: what was taken off before training, the deltas and the bias terms."""
        self.as_trained(values, low, high)
        matrix = values.view(-1, self.columns)
        _apply(matrix, self.terms, low // self.columns, high // self.columns)
        for bias in self._biases:
            values += bias[low:high]
        return values

    def as_trained(self, values: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Turn elements `[low, high)` of the base into those that training began with, in place:
        they were rounded to the base's dtype then."""
        if self.loaded_taken:
            matrix = values.view(-1, self.columns)
            first, last = low // self.columns, high // self.columns
            for _, taken, window in self.loaded_taken.meeting(first, last):
                part = window.of(matrix)
                part -= taken.product(window)
            values.copy_(values.to(TORCH[self.source.dtype]))
        return values

    def explain_values(self) -> None:
        """Walk through the tensor again to say what is wrong with it, and raise that."""
        dtype = TORCH[self.job.dtype]
        from_base = from_adapter = overflow = 0
        largest = 0.0
        for low, high in blocks(self.source.numel, self.block_elements):
            values = self.load(low, high)
            sound = torch.isfinite(values)
            from_base += int((~sound).sum())
            self.add(values, low, high)
            finite = torch.isfinite(values)
            from_adapter += int((sound & ~finite).sum())
            overflow += int((finite & ~torch.isfinite(values.to(dtype))).sum())
            if finite.any():
                largest = max(largest, float(values[finite].abs().max()))
        where = f"{self.job.name} ({self.source.file})"
        if from_base:
            raise ValueRangeError(
                f"{where}: {counted(from_base, 'value', 'is')} NaN or infinite before anything "
                "is added.",
                "The file is damaged, or training diverged. Nothing was written.",
            )
        if from_adapter:
            raise ValueRangeError(
                f"{where}: the adapter makes {counted(from_adapter, 'value')} NaN or infinite.",
                "Look at its norms with `loratool inspect`. Nothing was written.",
            )
        raise ValueRangeError(
            f"{where}: {counted(overflow, 'value', 'overflows')} {self.job.dtype}: the largest is "
            f"{largest:.6g}, "
            f"the limit {torch.finfo(dtype).max:.6g}.",
            "Use --dtype bfloat16, float32, or base. Nothing was written.",
        )


def _apply(matrix: torch.Tensor, terms: Terms[LoadedDelta], first: int, last: int) -> None:
    """Apply the terms to stored rows `[first, last)`, `[n, columns]`, in place, in their order.

    A plain term adds Δ. A DoRA term makes `m/‖W + Δ‖·(V + Δ)` of what came before it, V, with the
    norm of the untouched W: that is the chain PEFT 0.21 computes in its forward pass and its merge.
    """
    met = list(terms.meeting(first, last))
    chained = len(met) > 1 and any(term.magnitude is not None for _, term, _ in met)
    original = matrix.clone() if chained else None
    for _, term, window in met:
        part, delta = window.of(matrix), term.product(window)
        if term.magnitude is None:
            part += delta
        elif original is None:
            part += delta
            part *= term.gain(part, window)
        else:
            gain = term.gain(window.of(original) + delta, window)
            part += delta
            part *= gain


class Merging(RunningJob):
    """A job of a plan as a part of its output shard."""

    def begin(self, low: int, high: int, workers: Workers) -> MergeTask:
        return MergeTask(self)


@dataclass
class MergeTask:
    """Some blocks of one job. Rounding is measured on the first of them."""

    job: RunningJob
    counts: Counts = field(default_factory=Counts)
    _unmeasured: bool = True

    def compute(self, low: int, high: int, data: Bytes) -> None:
        self._compute(low, high, data, None)

    def _compute(self, low: int, high: int, data: Bytes, raw: Bytes | None) -> None:
        measured = self._unmeasured and (self.job.job.of or self.job.job).is_arithmetic
        self._unmeasured = False
        self.job.compute(low, high, data, self.counts, raw, measured)

    def finish(self) -> None:
        pass

"""Tensors that need no arithmetic: copies, and casts between formats of 16 bits by a table.

None of it needs torch, so that a merge begins with them while torch is being imported. The bytes
are those that `arithmetic` makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from loratool.dtypes import DTYPE_BITS, FLOAT_FORMATS
from loratool.merging.counts import Counts
from loratool.merging.magnitudes import count_underflow, magnitudes_of, zeros_in
from loratool.merging.plan import Job
from loratool.storage.tensors import (
    BLOCK_ELEMENTS,
    Bytes,
    FilePool,
    TensorInfo,
    as_bytes,
    as_float32,
)
from loratool.storage.values import values_of
from loratool.streams.scratch import scratch
from loratool.streams.workers import BLOCKS_PER_TASK, Workers

_SIXTEEN = ("F16", "BF16")


class Casting:
    """A job as a part of its output shard; only of a kind that `fits`."""

    block_elements = BLOCK_ELEMENTS
    task_elements = BLOCKS_PER_TASK * BLOCK_ELEMENTS

    def __init__(self, job: Job, files: FilePool) -> None:
        self.job = job
        self.files = files
        self.values = values_of(job.source, files)
        self.length = self.values.length
        self.itemsize = max(1, DTYPE_BITS[job.dtype] // 8)

    @staticmethod
    def fits(job: Job) -> bool:
        """Whether a job is a copy, or a cast by table, of what lies in a file as it is."""
        plain = type(job.source) is TensorInfo and not (job.is_arithmetic or job.taken or job.of)
        by_table = job.dtype in _SIXTEEN and job.source.dtype in _SIXTEEN
        return plain and (job.is_verbatim or by_table)

    def begin(self, low: int, high: int, workers: Workers) -> CastTask:
        return CastTask(self)

    def refuse_values(self) -> NoReturn:
        """Raise ValueRangeError with what is wrong with the tensor."""
        from loratool.merging.arithmetic import RunningJob

        RunningJob(self.job, self.files).explain_values()
        raise AssertionError("a value was not finite, and then it was")


@dataclass
class CastTask:
    """Some blocks of one job."""

    part: Casting
    counts: Counts = field(default_factory=Counts)

    def compute(self, low: int, high: int, data: Bytes) -> None:
        job, part = self.job, self.part
        if job.is_verbatim:
            part.values.read_into(low, high, data)
            if job.checked and magnitudes_of(data, job.dtype)[1]:
                part.refuse_values()
            return
        raw = scratch.array("uncast", (high - low) * 2, np.uint8)
        part.values.read_into(low, high, raw)
        before = raw.view(np.uint16)
        # Every index is in the table; to say how others are treated keeps NumPy from a copy.
        np.take(_table(job.source.dtype, job.dtype), before, out=data.view(np.uint16), mode="wrap")
        magnitudes, broken = magnitudes_of(data, job.dtype)
        if broken:
            part.refuse_values()
        if FLOAT_FORMATS[job.dtype].smallest > FLOAT_FORMATS[job.source.dtype].smallest:
            zeros = partial(_zeros, before, job.source.dtype)
            count_underflow(magnitudes, zeros, None, job.dtype, self.counts)

    @property
    def job(self) -> Job:
        return self.part.job

    def finish(self) -> None:
        pass


def _zeros(before: npt.NDArray[np.uint16], dtype: str) -> int:
    return zeros_in(before & np.uint16(FLOAT_FORMATS[dtype].magnitude_mask))


@cache
def _table(source: str, dtype: str) -> npt.NDArray[Any]:
    """What every value of a 16-bit format is in another one, rounded once, `[65536]` bits."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return as_bytes(as_float32(every, source), dtype).view(np.uint16)

"""Predict a base tensor from the merged one: take the deltas away and round to the base's dtype.

The prediction must come out the same, bit for bit, when the base is restored on another machine
with another number of threads. Sums of floats depend on their order, and every BLAS has its own. So
the factors are first rounded to a grid so coarse that float64 holds every product and every sum of
products exactly: then no order matters. For rank r each factor keeps (53 - log2 r)/2 bits below the
largest value of its row of B or column of A, 24 at rank 16, as many as float32 has. Everything else
is one IEEE operation per element.

What the grid cuts off only makes the prediction a little worse, and what it misses is stored.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from loratool.merging.matching import Delta
from loratool.merging.plan import Job
from loratool.merging.rounding import TORCH
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.values import read_float32
from loratool.streams.scratch import scratch

Factor = npt.NDArray[np.float64]


class Reversal:
    """Takes back what a job did, apart from rounding. Blocks in any order, by any thread.

    `gains` holds for each delta what DoRA multiplied rows or columns with, in the order of the
    deltas, and None for plain ones; while a merge runs they may still be filling up, row by row.
    """

    def __init__(
        self, job: Job, base_dtype: str, files: FilePool, gains: Sequence[torch.Tensor | None]
    ) -> None:
        self.job = job
        self.files = files
        self.columns = math.prod(job.source.shape[1:]) if job.deltas or job.rows else 1
        self.gains = gains
        self._lock = threading.Lock()
        self.base_dtype = TORCH[base_dtype]
        self.work = torch.float64 if base_dtype == "F64" else torch.float32

    @cached_property
    def products(self) -> list[ExactProduct]:
        return [ExactProduct(delta, self.files) for delta in self.job.deltas]

    @cached_property
    def _biases(self) -> list[torch.Tensor]:
        return [
            torch.from_numpy(read_float32(t.info, self.files)).mul_(t.scale)
            for t in self.job.biases
        ]

    def _prepare(self) -> None:
        """Load what the blocks share, by one thread."""
        with self._lock:
            _ = self.products, self._biases

    def predict(self, low: int, high: int, data: Bytes) -> Bytes:
        """The predicted base bytes of elements `[low, high)`, from their output bytes.

        They lie in this thread's scratch, until the next call.
        """
        self._prepare()
        back = scratch.get("back", high - low, self.work)
        back.copy_(torch.from_numpy(data).view(TORCH[self.job.dtype]))
        for bias in self._biases:
            back -= bias[low:high]
        first, last = low // self.columns, high // self.columns
        matrix = back.view(-1, self.columns)
        for product, gain in zip(reversed(self.products), reversed(self.gains), strict=True):
            if gain is not None:
                part = gain.view(1, -1) if product.transposed else gain[first:last, None]
                usable = torch.isfinite(part) & (part != 0)
                matrix /= torch.where(usable, part, torch.ones_like(part))
            matrix -= product.rows(first, last, self.work)
        if any(gain is not None for gain in self.gains):
            back.nan_to_num_()  # the sign of a NaN from ∞ - ∞ depends on the processor
        predicted = scratch.get("predicted", high - low, self.base_dtype)
        predicted.copy_(back)
        return predicted.view(torch.uint8).numpy()


class ExactProduct:
    """`scale·B·A` of one delta on a grid on which every sum is exact."""

    def __init__(self, delta: Delta, files: FilePool) -> None:
        b, a = delta.module.factors(files)
        bits = (53 - math.ceil(math.log2(max(1, a.shape[0])))) // 2
        self.transposed = delta.transposed
        self.b = torch.from_numpy(on_grid(b.astype(np.float64) * delta.scale, bits, axis=1))
        self.a = torch.from_numpy(on_grid(a.astype(np.float64), bits, axis=0))

    def rows(self, first: int, last: int, work: torch.dtype) -> torch.Tensor:
        """The product for stored rows `[first, last)`, rounded once to `work`; scratch."""
        b, a = (self.b, self.a[:, first:last]) if self.transposed else (self.b[first:last], self.a)
        shape = (len(b), a.shape[1])
        exact = scratch.get("exact", shape[0] * shape[1], torch.float64).view(shape)
        torch.mm(b, a, out=exact)
        exact += 0.0  # the sign of a zero is the only thing that still depends on the BLAS
        if work == torch.float32:
            rounded = scratch.get("product", shape[0] * shape[1], work).view(shape)
            exact = rounded.copy_(exact)
        return exact.T if self.transposed else exact


def on_grid(factor: Factor, bits: int, axis: int) -> Factor:
    """Multiples of a power of two, one along `axis`, that need at most `bits` bits."""
    largest = np.abs(factor).max(axis=axis, keepdims=True, initial=0)
    exponent = np.frexp(largest)[1] - bits
    on: Factor = np.ldexp(np.rint(np.ldexp(factor, -exponent)), exponent)
    return on

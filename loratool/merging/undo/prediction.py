"""Predict a base tensor from the merged one: take the deltas away and round to the base's dtype.

The prediction must come out the same, bit for bit, when the base is restored on another machine
with another number of threads. Sums of floats depend on their order, and every BLAS has its own. So
the products are taken on a grid on which every sum is exact (`products.ExactProduct`). Everything
else is one IEEE operation per element.

What the grid cuts off only makes the prediction a little worse, and what it misses is stored.

Of a quantised weight that became plain the codes are predicted: those whose values, on the scales
that it had, are nearest to the predicted ones. Rounding to 16 bits is finer than that grid, so next
to nothing is missed, and what is stored of such a weight are its scales.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import torch

from loratool.merging.match import Delta
from loratool.merging.plan import Job
from loratool.merging.products import ExactProduct, Terms
from loratool.merging.rounding import TORCH
from loratool.models.quantised.encoding.snapping import Snap, snapping
from loratool.models.quantised.scheme import QuantisedTensor
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.values import read_float32
from loratool.streams.scratch import scratch


class Reversal:
    """Takes back what a job did, apart from rounding. Blocks in any order, by any thread.

    `gains` holds for each delta what DoRA multiplied rows or columns with, in the order of the
    deltas, and None for plain ones; while a merge runs they may still be filling up, row by row.
    `taken` is what was taken off the base before the deltas, and goes back onto it.
    """

    def __init__(
        self,
        job: Job,
        base_dtype: str,
        files: FilePool,
        gains: Sequence[torch.Tensor | None],
        taken: Sequence[Delta] = (),
    ) -> None:
        self.job = job
        self.files = files
        self.columns = job.columns
        self.gains = gains
        self.taken = taken
        self._lock = threading.Lock()
        self.base_dtype = TORCH[base_dtype]
        source = job.source
        self._snap: Snap | None = None
        if isinstance(source, QuantisedTensor):
            self._snap = snapping(source.stored_as, files)
        self.work = torch.float64 if base_dtype == "F64" else torch.float32

    @cached_property
    def products(self) -> Terms[ExactProduct]:
        return Terms(ExactProduct(d, self.job.source.shape, self.files) for d in self.job.deltas)

    @cached_property
    def _given_back(self) -> Terms[ExactProduct]:
        return Terms(ExactProduct(d, self.job.source.shape, self.files) for d in self.taken)

    @cached_property
    def _biases(self) -> list[torch.Tensor]:
        return [
            torch.from_numpy(read_float32(t.info, self.files)).mul_(t.scale)
            for t in self.job.biases
        ]

    def _prepare(self) -> None:
        """Load what the blocks share, by one thread."""
        with self._lock:
            _ = self.products, self._given_back, self._biases

    def predict(self, low: int, high: int, data: Bytes) -> Bytes:
        """The predicted base bytes of elements `[low, high)`, from their output bytes: those of the
        `Predicted`.

        They lie in this thread's scratch, until the next call.
        """
        values = self._predicted(low, high, data)
        if self._snap is None:
            return values.view(torch.uint8).numpy()
        rows = values.float().numpy().reshape(-1, self.columns)
        return self._snap(low // self.columns, rows)

    def _predicted(self, low: int, high: int, data: Bytes) -> torch.Tensor:
        self._prepare()
        back = scratch.get("back", high - low, self.work)
        back.copy_(torch.from_numpy(data).view(TORCH[self.job.dtype]))
        for bias in self._biases:
            back -= bias[low:high]
        first, last = low // self.columns, high // self.columns
        matrix = back.view(-1, self.columns)
        for number, product, window in reversed(list(self.products.meeting(first, last))):
            part, gain = window.of(matrix), self.gains[number]
            if gain is not None:
                by = gain.view(1, -1) if product.transposed else gain[window.out, None]
                usable = torch.isfinite(by) & (by != 0)
                part /= torch.where(usable, by, torch.ones_like(by))
            part -= product.product(window, self.work)
        for _, product, window in self._given_back.meeting(first, last):
            part = window.of(matrix)
            part += product.product(window, self.work)
        if any(gain is not None for gain in self.gains):
            back.nan_to_num_()  # the sign of a NaN from ∞ - ∞ depends on the processor
        predicted = scratch.get("predicted", high - low, self.base_dtype)
        return predicted.copy_(back)

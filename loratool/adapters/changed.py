"""A tensor whose rows are computed from the same rows of another one, a block of them at a time."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loratool.storage.composed import Composed
from loratool.storage.computed import read_wide
from loratool.storage.tensors import (
    Bytes,
    FilePool,
    TensorInfo,
    as_bytes,
    as_float32,
    block_elements,
    blocks,
)
from loratool.storage.values import Values, values_of

Float64 = npt.NDArray[np.float64]
#: From the number of the first row, and rows `[n, columns]` of the weight, the new rows.
Rows = Callable[[int, Float64], Float64]


def _unchanged() -> Rows:
    return lambda first, rows: rows


@dataclass(frozen=True)
class ChangedTensor(Composed):
    """What `made`, given the values of all parts but the first by `names`, makes of its rows.

    `step` rows belong together. What `gather`, if there is one, makes of rows is summed over all of
    them in a pass of its own, and given to `made` too. It is computed in float64.
    """

    names: tuple[str, ...] = ()
    made: Callable[..., Rows] = field(default=_unchanged, compare=False, repr=False)
    gather: Callable[..., Rows] | None = field(default=None, compare=False, repr=False)
    step: int = 1

    @property
    def before(self) -> TensorInfo:
        """The tensor that it is made of."""
        return self.parts[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def run(self) -> int:
        return max(1, self.step * self.columns)


class _Changed(Values):
    """Rows are computed when they are asked for; if all are computed together they are kept."""

    def __init__(self, info: ChangedTensor, files: FilePool) -> None:
        super().__init__(info)
        self._tensor, self._files = info, files
        self._before = values_of(info.before, files)
        self._lock = threading.RLock()
        self._rows: Rows | None = None
        self._whole: Bytes | None = None

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        if high <= low:
            return
        unit, size = self._tensor.run, self.info.itemsize
        first = low - low % unit
        last = min(self.info.numel, -(-high // unit) * unit)
        if unit >= self.info.numel:
            with self._lock:
                made = self._whole = self._made(first, last) if self._whole is None else self._whole
        else:
            made = self._made(first, last)
        raw[:] = made[(low - first) * size : (high - first) * size]

    def _made(self, first: int, last: int) -> Bytes:
        with self._lock:
            rows_of = self._rows = self._rows or self._loaded()
        return as_bytes(rows_of(first // self._width, self._read(first, last)), self.info.dtype)

    @property
    def _width(self) -> int:
        return max(1, self._tensor.columns)

    def _read(self, first: int, last: int) -> Float64:
        raw, dtype = self._before.bytes(first, last), self._before.info.dtype
        values = raw.view(np.float64) if dtype == "F64" else as_float32(raw, dtype)
        return values.astype(np.float64, copy=False).reshape(-1, self._width)

    def _loaded(self) -> Rows:
        parts = zip(self._tensor.names, self._tensor.parts[1:], strict=True)
        values = {name: read_wide(info, self._files) for name, info in parts}
        floats = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in values.items()}
        if self._tensor.gather is not None:
            floats["gathered"] = self._gathered(self._tensor.gather(**floats))
        return self._tensor.made(**floats)

    def _gathered(self, of_rows: Rows) -> Float64:
        width = self._width
        parts = (
            of_rows(first // width, self._read(first, last))
            for first, last in blocks(self.info.numel, block_elements(width))
        )
        return functools.reduce(np.add, parts)


@values_of.register
def _(info: ChangedTensor, files: FilePool) -> Values:
    return _Changed(info, files)

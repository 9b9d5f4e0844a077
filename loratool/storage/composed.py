"""Tensors that are in no file: others one after the other or in turns, and views of one.

They are read by range like any other, see `values`.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import Values, copy_range, extent_of, strided_view, values_of


@dataclass(frozen=True)
class Composed(TensorInfo):
    """A tensor whose elements are those of others. It is in no file."""

    parts: tuple[TensorInfo, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))

    @property
    def disk_bytes(self) -> int:
        return sum(part.disk_bytes for part in self.parts)


@dataclass(frozen=True)
class _View(Composed):
    """Some elements of its only part, from element `first` on, by strides counted in elements."""

    first: int = 0


class _Viewed(Values):
    """Elements of a view of what is in no file by itself: computed, or put together.

    Where they lie one after the other they are read so; otherwise all between the first and the
    last of them is read when one is asked for, and kept.
    """

    def __init__(self, info: _View, files: FilePool) -> None:
        super().__init__(info)
        self._whole = values_of(info.parts[0], files)
        self._first = info.first
        self._lock = threading.Lock()
        self._view: npt.NDArray[np.void] | None = None

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        if self.info.strides is None:
            self._whole.read_into(self._first + low, self._first + high, raw)
        elif high > low:
            with self._lock:
                if self._view is None:
                    extent = extent_of(self.info)
                    self._view = strided_view(
                        self.info, self._whole.bytes(self._first, self._first + extent)
                    )
            copy_range(self._view, low, high, raw.view(self._view.dtype))


def view(
    info: TensorInfo, shape: tuple[int, ...], first: int, strides: tuple[int, ...] | None
) -> TensorInfo:
    """Elements of a tensor as one of their own: from element `first` of its file's order on, by
    `strides` counted in elements, or one after the other."""
    if isinstance(info, _View):
        return replace(info, shape=shape, first=info.first + first, strides=strides)
    if isinstance(info, Composed):
        return _View(
            info.name, info.dtype, shape, info.file, info.start, strides, stamp=info.stamp,
            parts=(info,), first=first,
        )  # fmt: skip
    return replace(info, shape=shape, start=info.start + first * info.itemsize, strides=strides)


def transposed(info: TensorInfo) -> TensorInfo:
    """A matrix `[n, m]` as `[m, n]`."""
    rows, columns = info.strides or (info.shape[1], 1)
    return view(info, info.shape[::-1], 0, (columns, rows))


def member(info: TensorInfo, index: int) -> TensorInfo:
    """One of a stack: `info[index]`."""
    strides = info.strides or _row_major(info.shape)
    inner = strides[1:] if info.strides is not None else None
    return view(info, info.shape[1:], index * strides[0], inner)


def row_range(info: TensorInfo, rows: range) -> TensorInfo:
    """Some rows of a tensor: `info[rows.start:rows.stop:rows.step]`."""
    strides = info.strides or _row_major(info.shape)
    shape = (len(rows), *info.shape[1:])
    own = (strides[0] * rows.step, *strides[1:])
    dense = info.strides is None and rows.step == 1
    return view(info, shape, rows.start * strides[0], None if dense else own)


def rows_reordered(info: TensorInfo, split: tuple[int, int, int]) -> TensorInfo:
    """Rows seen as `[a, b, c]` in the order of `[a, c, b]`: `[a·b·c, …]` -> `[a·c·b, …]`.

    Rotary halves that lie in turns, `(heads, dim/2, 2)`, become one after the other, as Hugging
    Face has them; `(heads, 2, dim/2)` is the reverse.
    """
    a, b, c = split
    strides = info.strides or _row_major(info.shape)
    row = strides[0]
    apart = view(info, (a, c, b, *info.shape[1:]), 0, (b * c * row, row, c * row, *strides[1:]))
    return joined(info.name, info.shape, [apart])


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True)
class _JoinedTensor(Composed):
    """Those of the parts one after the other."""


class _Joined(Values):
    def __init__(self, info: _JoinedTensor, files: FilePool) -> None:
        super().__init__(info)
        self._parts = [values_of(part, files) for part in info.parts]
        self._ends = list(accumulate(part.length for part in self._parts))

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        size = self.info.itemsize
        done = 0
        while low < high:
            at = bisect_right(self._ends, low)
            start = self._ends[at] - self._parts[at].length
            stop = min(high, self._ends[at])
            count = (stop - low) * size
            self._parts[at].read_into(low - start, stop - start, raw[done : done + count])
            low, done = stop, done + count


@dataclass(frozen=True)
class _AlternatingTensor(Composed):
    """The rows of the parts in turns."""


class _Alternating(Values):
    def __init__(self, info: _AlternatingTensor, files: FilePool) -> None:
        super().__init__(info)
        self._parts = [values_of(part, files) for part in info.parts]
        self._row = math.prod(info.parts[0].shape[1:])

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        turns, row = len(self._parts), self._row
        first, last = low // row, -(-high // row)
        kind = f"V{self.info.itemsize}"
        rows = np.empty((last - first, row), kind)
        for turn, part in enumerate(self._parts):
            begin, end = (max(0, -((turn - at) // turns)) for at in (first, last))
            if begin < end:
                own = part.bytes(begin * row, end * row).view(kind)
                rows[turn + begin * turns - first :: turns] = own.reshape(-1, row)
        raw.view(kind)[:] = rows.reshape(-1)[low - first * row : high - first * row]


def joined(name: str, shape: Sequence[int], parts: Sequence[TensorInfo]) -> TensorInfo:
    """A tensor that holds the elements of `parts`, of one dtype, one after the other."""
    return _composed(_JoinedTensor, name, shape, parts)


def alternating(name: str, shape: Sequence[int], parts: Sequence[TensorInfo]) -> TensorInfo:
    """A tensor whose rows are those of `parts`, of one dtype and length, in turns."""
    return _composed(_AlternatingTensor, name, shape, parts)


def _composed(
    kind: type[Composed], name: str, shape: Sequence[int], parts: Sequence[TensorInfo]
) -> TensorInfo:
    first = parts[0]
    return kind(
        name, first.dtype, tuple(shape), first.file, first.start, stamp=first.stamp,
        parts=tuple(parts),
    )  # fmt: skip


@values_of.register
def _(info: _View, files: FilePool) -> Values:
    return _Viewed(info, files)


@values_of.register
def _(info: _AlternatingTensor, files: FilePool) -> Values:
    return _Alternating(info, files)


@values_of.register
def _(info: _JoinedTensor, files: FilePool) -> Values:
    return _Joined(info, files)

"""The values of a tensor by range, however they lie in its file.

Everything that goes through a tensor block by block asks here: where the elements lie one after the
other they are read by position; where a torch file has them strided they are gathered from the
bytes that they lie in, which are read once. What is stored in yet another way registers its own
kind of values with `values_of`.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import singledispatch

import numpy as np
import numpy.typing as npt

from loratool.storage.tensors import (
    Bytes,
    FilePool,
    TensorInfo,
    as_float32,
    block_elements,
    blocks,
)


class Values(ABC):
    """The elements of one tensor in row-major order, readable from any thread.

    Ranges count elements; of the packed dtypes, whose elements are less than a byte, bytes.
    """

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    @property
    def length(self) -> int:
        """How many elements there are."""
        return self.info.nbytes // self.info.itemsize

    @abstractmethod
    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        """Fill `raw` with the bytes of elements `[low, high)`."""

    def bytes(self, low: int, high: int) -> Bytes:
        """The bytes of elements `[low, high)`, in memory of their own."""
        raw = np.empty((high - low) * self.info.itemsize, np.uint8)
        self.read_into(low, high, raw)
        return raw

    def floats(self, low: int, high: int) -> npt.NDArray[np.float32]:
        """Elements `[low, high)` as float32, flat."""
        return as_float32(self.bytes(low, high), self.info.dtype)


class _Dense(Values):
    """Elements that lie one after the other."""

    def __init__(self, info: TensorInfo, files: FilePool) -> None:
        super().__init__(info)
        self._files = files

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        self._files.read_into(self.info, low * self.info.itemsize, raw.data)


class _Strided(Values):
    """Elements of a view that a torch file holds.

    All that lies between the first and the last of them is read when one is asked for, and kept:
    at most the storage that the view is of, however often the view repeats it.
    """

    def __init__(self, info: TensorInfo, files: FilePool) -> None:
        super().__init__(info)
        self._files = files
        # Blocks come from several threads; one reads.
        self._lock = threading.Lock()
        self._view: npt.NDArray[np.void] | None = None

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        if high > low:
            with self._lock:
                if self._view is None:
                    self._view = _viewed(self.info, self._files)
            copy_range(self._view, low, high, raw.view(self._view.dtype))


class _Grown(Values):
    """Elements that end in zeros, which are in no file."""

    def __init__(self, info: TensorInfo, stored: Values) -> None:
        super().__init__(info)
        self._stored = stored
        self._count = info.numel - info.zeros

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        known = max(0, min(high, self._count) - low) * self.info.itemsize
        if known:
            self._stored.read_into(low, min(high, self._count), raw[:known])
        raw[known:] = 0


@singledispatch
def values_of(info: TensorInfo, files: FilePool) -> Values:
    """The values of a tensor, read through `files` when they are asked for.

    A tensor that is stored otherwise has a subclass of TensorInfo, with the dtype and the shape of
    its values, and registers here how to read them: `@values_of.register`.
    """
    if info.zeros:
        return _Grown(info, values_of(info.stored, files))
    return _Dense(info, files) if info.strides is None else _Strided(info, files)


def _viewed(info: TensorInfo, files: FilePool) -> npt.NDArray[np.void]:
    """The elements of a strided tensor that is not empty, as a view of the bytes they lie in."""
    raw = np.empty(extent_of(info) * info.itemsize, np.uint8)
    files.read_into(info, 0, raw.data)
    return strided_view(info, raw)


def extent_of(info: TensorInfo) -> int:
    """Elements from the first to the last one of a strided tensor."""
    assert info.strides is not None
    return 1 + sum((n - 1) * s for n, s in zip(info.shape, info.strides, strict=True))


def strided_view(info: TensorInfo, raw: Bytes) -> npt.NDArray[np.void]:
    assert info.strides is not None
    axes = [(n, s) for n, s in zip(info.shape, info.strides, strict=True) if n > 1]
    size = info.itemsize
    shape, strides = [n for n, _ in axes], [s * size for _, s in axes]
    return np.lib.stride_tricks.as_strided(raw.view(f"V{size}"), shape, strides, writeable=False)


def copy_range(view: npt.NDArray[np.void], low: int, high: int, into: npt.NDArray[np.void]) -> None:
    """Copy elements `[low, high)` of a view, counted in row-major order; `high` is above `low`.

    A range is the end of one row, whole rows, and the beginning of another one.
    """
    if view.ndim < 2:
        into[:] = view.reshape(-1)[low:high]
        return
    row = math.prod(view.shape[1:])
    done = 0
    while low < high:
        first, begin = divmod(low, row)
        rows = (high - low) // row if begin == 0 else 0
        count = rows * row or min(row - begin, high - low)
        target = into[done : done + count]
        if rows:
            target.reshape(rows, *view.shape[1:])[:] = view[first : first + rows]
        else:
            copy_range(view[first], begin, begin + count, target)
        low, done = low + count, done + count


#: Elements at each end and in the middle of a tensor that a sample compares.
_SAMPLE = 1024

# --- whole tensors --------------------------------------------------------------------------------


def read_raw(info: TensorInfo, files: FilePool | None = None) -> Bytes:
    """All bytes of a tensor in row-major order, `[nbytes]` uint8."""
    if files is None:
        with FilePool() as own:
            return read_raw(info, own)
    values = values_of(info, files)
    return values.bytes(0, values.length)


def read_float32(info: TensorInfo, files: FilePool | None = None) -> npt.NDArray[np.float32]:
    """A whole tensor as float32 in its own shape."""
    return as_float32(read_raw(info, files), info.dtype).reshape(info.shape)


# --- block by block -------------------------------------------------------------------------------


def raw_blocks(info: TensorInfo, files: FilePool | None = None) -> Iterator[Bytes]:
    """The bytes of a tensor in row-major order, in blocks."""
    if files is None:
        with FilePool() as own:
            yield from raw_blocks(info, own)
        return
    values = values_of(info, files)
    for low, high in blocks(values.length, block_elements()):
        yield values.bytes(low, high)


def float_blocks(
    info: TensorInfo, files: FilePool | None = None
) -> Iterator[npt.NDArray[np.float32]]:
    """The elements of a tensor as float32, flat, block by block."""
    return (as_float32(raw, info.dtype) for raw in raw_blocks(info, files))


def squared_norm(info: TensorInfo, files: FilePool) -> float:
    """Sum of squares of a tensor's elements, read in blocks, summed in float64."""
    total = 0.0
    for block in float_blocks(info, files):
        values = block.astype(np.float64)
        total += float(np.dot(values, values))
    return total


def count_not_finite(info: TensorInfo, files: FilePool | None = None) -> int:
    """How many elements are NaN or infinite; 0 for dtypes that are no floats."""
    if not info.is_float:
        return 0
    return sum(int(x.size - np.count_nonzero(np.isfinite(x))) for x in float_blocks(info, files))


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same numbers, in whatever floating dtypes."""
    if one.shape != other.shape:
        return False
    if one.is_float and other.is_float:
        return _equal(float_blocks(one), float_blocks(other))
    return one.dtype == other.dtype and _equal(raw_blocks(one), raw_blocks(other))


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and _equal(raw_blocks(one), raw_blocks(other))


def same_sample(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors agree in dtype, shape and, as far as a few kB of each tell, in bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with FilePool() as files:
        a, b = values_of(one, files), values_of(other, files)
        size = min(a.length, _SAMPLE)
        starts = {0, (a.length - size) // 2, a.length - size}
        return all(np.array_equal(a.bytes(s, s + size), b.bytes(s, s + size)) for s in starts)


def _equal(
    one: Iterator[npt.NDArray[np.generic]], other: Iterator[npt.NDArray[np.generic]]
) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))

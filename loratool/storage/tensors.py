"""A tensor in a file: where its bytes are, and how to read them without torch.

Everything above this module names tensors by `TensorInfo`, whatever file kind they come from, and
reads only the elements it needs.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.dtypes import DTYPE_BITS, FLOAT_FORMATS
from loratool.errors import FileError, TruncatedError
from loratool.storage.stamps import Stamp, changed_file, stamp_of
from loratool.storage.system import open_to_read, read_at
from loratool.words import counted

#: The floating dtypes that NumPy has.
_NUMPY: dict[str, type[np.floating[Any]]] = {
    code: getattr(np, form.name) for code, form in FLOAT_FORMATS.items() if code != "BF16"
}

#: Raw bytes, `[n]` uint8.
Bytes = npt.NDArray[np.uint8]

#: Elements per block when a tensor is walked through: 2 MB of float32, so that a block and its
#: product stay in the second-level cache of one core.
BLOCK_ELEMENTS = 512 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """Name, type and place of one tensor; holds no data.

    `dtype` is the safetensors code ("F16", "BF16", …). `start` is the absolute byte offset in
    `file`. `strides` (in elements) is set only where the elements do not lie in row-major order,
    which torch files allow and safetensors files do not. `zeros` elements at the end are not in the
    file and zero (only plans make such tensors).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    strides: tuple[int, ...] | None = None
    zeros: int = 0
    #: What the file was when its header was read; None where that was read over the network.
    stamp: Stamp | None = field(default=None, compare=False, repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def itemsize(self) -> int:
        """Bytes per element (1 for the packed dtypes, which are only ever copied whole)."""
        return max(1, DTYPE_BITS[self.dtype] // 8)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_FORMATS

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that its elements are in."""
        return (self.file,)

    @property
    def disk_bytes(self) -> int:
        """How many bytes of its files its elements take."""
        return self.nbytes

    @property
    def run(self) -> int:
        """Elements that are best read together, as multiples of which blocks are made."""
        return 1

    def renamed(self, name: str) -> TensorInfo:
        return replace(self, name=name)

    def resized(self, rows: int) -> TensorInfo:
        """The same with so many rows: the first of its own, and zeros where it has fewer."""
        more = max(0, rows - self.shape[0]) * math.prod(self.shape[1:])
        return replace(self, shape=(rows, *self.shape[1:]), zeros=more)

    @property
    def stored(self) -> TensorInfo:
        """What the file has of it, without the zeros of `resized`."""
        row = math.prod(self.shape[1:])
        rows = (self.numel - self.zeros) // row if row else self.shape[0]
        return replace(self, shape=(rows, *self.shape[1:]), zeros=0)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


def odd_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a tensor, counted in elements; None where its elements lie in row-major order.

    The stride of an axis of length one, or of an empty tensor, says nothing.
    """
    step = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count != 1 and stride != step:
            return None if 0 in shape else strides
        step *= count
    return None


class FilePool:
    """Open files, kept open while in use and read by position from any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, Stamp]] = {}

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a tensor's data on.

        Raises FileError where the file ends early, and where it is not the one whose header was
        read: each piece is trusted only if the file still has its stamp afterwards.
        """
        path = info.file
        fd, stamp = self._open.get(path) or self._opened(path)
        done = 0
        while done < len(buffer):
            try:
                count = read_at(fd, buffer[done:], info.start + offset + done)
            except OSError as error:
                raise FileError(
                    f"{path}: it cannot be read ({error.strerror}).", "Check the disk it is on."
                ) from error
            if count == 0:
                raise TruncatedError(
                    f"{path}: the file ended {counted(len(buffer) - done, 'byte')} early while "
                    "being read.",
                    "It is truncated, or it was changed during the run. Fetch it again.",
                )
            done += count
        if stamp_of(fd) != stamp or info.stamp not in (None, stamp):
            raise changed_file(path)

    def _opened(self, path: Path) -> tuple[int, Stamp]:
        try:
            fd = open_to_read(path)
        except OSError as error:
            hint = "It was moved or removed during the run."
            if error.errno in (errno.EMFILE, errno.ENFILE):
                hint = "Allow more open files: ulimit -n 1024."
            raise FileError(
                f"{path}: it can no longer be read ({error.strerror}).", hint
            ) from error
        # Two threads may open the same file at once; the loser's descriptor is closed.
        kept = self._open.setdefault(path, (fd, stamp_of(fd)))
        if kept[0] != fd:
            os.close(fd)
        return kept

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __enter__(self) -> FilePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def as_float32(raw: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Raw bytes of a floating dtype as float32, flat. float64 is rounded, the others are exact."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        widened = raw.view(np.uint16).astype(np.uint32)
        widened <<= 16
        return widened.view(np.float32)
    if dtype not in _NUMPY:
        raise FileError(
            f"Values of dtype {dtype} cannot be read as numbers.",
            "Quantised tensors must be dequantised first.",
        )
    with np.errstate(over="ignore"):  # a float64 may be too large; it becomes infinite
        return raw.view(_NUMPY[dtype]).astype(np.float32, copy=False)


def as_bytes(values: npt.NDArray[Any], dtype: str) -> Bytes:
    """The bytes of `values` rounded to a floating dtype, in row-major order."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype in _NUMPY:
            return np.ascontiguousarray(values, _NUMPY[dtype]).reshape(-1).view(np.uint8)
        # BF16: the upper half of a float32, rounded to nearest, ties to even.
        bits = _odd_float32(np.ascontiguousarray(values)).reshape(-1).view(np.uint32)
        upper = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        upper[np.isnan(values).reshape(-1)] = 0x7FC0  # the addition may carry a NaN away
        return upper.view(np.uint8)


def _odd_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float64 as float32 such that rounding that to 16 bits equals rounding the float64 once.

    Truncated, with the last bit set where anything was cut off (Boldo and Melquiond, 2008).
    """
    narrow = values.astype(np.float32)
    if values.dtype == np.float64:
        bits = narrow.view(np.uint32)
        bits -= (np.abs(narrow.astype(np.float64)) > np.abs(values)).astype(np.uint32)
        bits |= (narrow.astype(np.float64) != values).astype(np.uint32)
    return narrow


def block_elements(columns: int = 1) -> int:
    """Elements of a block: about BLOCK_ELEMENTS of them in whole rows, at least one row."""
    return max(1, BLOCK_ELEMENTS // max(1, columns)) * max(1, columns)


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Split `range(total)` into `[lo, hi)` pieces of at most `size`."""
    for low in range(0, total, size):
        yield low, min(low + size, total)

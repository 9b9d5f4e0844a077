"""A tensor on its way into a file: what it is, and its bytes, read when their turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from loratool.dtypes import DTYPE_BITS
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import raw_blocks


class Outgoing(NamedTuple):
    """`read` gives the bytes in row-major order, piece by piece."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Bytes]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def pieces(self) -> Iterator[tuple[int, Bytes]]:
        """Each piece behind the number of bytes before it. Raises ValueError where they come to
        another length than the shape's, which would move all that lies behind."""
        position = 0
        for piece in self.read():
            yield position, piece
            position += piece.nbytes
        if position != self.nbytes:
            raise ValueError(f"{position} bytes for {self.dtype} {list(self.shape)}")


def copied(info: TensorInfo, files: FilePool) -> Outgoing:
    """A tensor as it is, read through `files`."""
    return Outgoing(info.dtype, info.shape, partial(raw_blocks, info, files))

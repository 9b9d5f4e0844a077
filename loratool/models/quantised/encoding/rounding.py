"""Values brought to codes of 8 bits and fewer, block by block, with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.grid import Grid
from loratool.models.quantised.numbers import scales_as_float32
from loratool.models.quantised.scheme import Floats
from loratool.storage.tensors import Bytes, as_bytes

Codes = npt.NDArray[Any]

#: The largest E4M3 number, and that of E2M1.
LARGEST_E4M3, LARGEST_E2M1 = 448, 6
#: What a power of two must bring the largest value of a block below: half way from the largest
#: number of a format to the one that would follow.
BELOW_E4M3, BELOW_E2M1 = 464, 7

#: Half way between magnitudes of E2M1, and whether the middle belongs to the upper one, whose code
#: is even.
_E2M1_BOUNDS = (
    (0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True),
    (5.0, False),
)  # fmt: skip


def to_e2m1(values: Floats) -> npt.NDArray[np.uint8]:
    """The E2M1 code of each value, ties to even; what is too large gets the largest."""
    magnitudes = np.abs(values)
    found: npt.NDArray[np.uint8] = np.signbit(values).view(np.uint8) << np.uint8(3)
    above = np.empty(values.shape, bool)
    for bound, is_upper in _E2M1_BOUNDS:
        (np.greater_equal if is_upper else np.greater)(magnitudes, np.float32(bound), out=above)
        found += above.view(np.uint8)
    return found


def largest(values: Floats) -> Floats:
    """The largest magnitude along the last axis."""
    found: Floats = np.maximum(values.max(-1), -values.min(-1))
    return found


def largest_of_blocks(values: Floats, first: int, grid: Grid) -> Floats:
    """The largest magnitude of each block of rows from `first` on, which begin and end with one:
    `[rows of blocks, across]`."""
    magnitudes: Floats = np.abs(values)
    columns, width = values.shape[1], grid.block[1]
    if grid.block[0] > 1:
        low, high, index = grid.of_rows(first, first + len(values))
        starts = np.searchsorted(index, np.arange(high - low))
        magnitudes = np.maximum.reduceat(magnitudes, starts, axis=0)
    if width >= columns:
        found: Floats = magnitudes.max(1, keepdims=True)
    elif columns % width == 0:
        found = magnitudes.reshape(len(magnitudes), -1, width).max(2)
    else:
        found = np.maximum.reduceat(magnitudes, np.arange(0, columns, width), axis=1)
    return found


def inverse(scales: Floats) -> Floats:
    """One divided by each scale; zero for a scale of zero, whose values are all zero."""
    found = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=found, where=scales != 0)
    return found


def scales_of(magnitudes: Floats, highest: float, dtype: str) -> tuple[Bytes, Floats]:
    """The scales that make `highest` of the largest magnitudes, as stored in this floating dtype,
    and as read again; 1 where all is zero."""
    scales = magnitudes / np.float32(highest)
    scales[magnitudes == 0] = 1
    raw = as_bytes(scales, dtype)
    read = scales_as_float32(raw, dtype).reshape(scales.shape)
    if not read.all():  # too small for the dtype
        scales[read == 0] = _SMALLEST[dtype]
        raw = as_bytes(scales, dtype)
        read = scales_as_float32(raw, dtype).reshape(scales.shape)
    return raw, read


_SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}


def powers_of(magnitudes: Floats, below: float) -> tuple[Bytes, Floats]:
    """The smallest powers of two that bring the largest magnitudes below a number, as E8M0 bytes,
    and as read again; 1 where all is zero."""
    exponents = np.frexp(magnitudes.astype(np.float64) / below)[1]
    exponents[magnitudes == 0] = 0
    raw = np.clip(exponents + 127, 0, 254).astype(np.uint8)
    return raw.reshape(-1), scales_as_float32(raw.reshape(-1), "F8_E8M0").reshape(raw.shape)


def packed(codes: npt.NDArray[np.uint8], bits: int, size: int) -> Bytes:
    """Codes of so many bits in `size` bytes a row, lowest bits first and without gaps:
    `[n, codes]` -> `[n, size]`."""
    rows = len(codes)
    if bits == 8:
        return _padded(codes, size)
    if bits in (1, 2, 4):
        each = 8 // bits
        digits = _padded(codes, size * each).reshape(rows, size, each)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        found: Bytes = np.bitwise_or.reduce(digits << shifts, axis=2)
        return found
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return _padded(np.packbits(stream.reshape(rows, -1), axis=-1, bitorder="little"), size)


def _padded(values: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Rows of so many bytes, the last of which are zero."""
    if values.shape[1] == size:
        return values
    found = np.zeros((len(values), size), np.uint8)
    found[:, : values.shape[1]] = values
    return found

"""Values brought to codes of 8 bits and fewer, block by block, with NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.models.quantised.grid import Grid
from loratool.models.quantised.numbers import encode_e4m3, scales_as_float32
from loratool.models.quantised.scheme import Floats
from loratool.storage.tensors import Bytes, as_bytes

Codes = npt.NDArray[Any]


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
    import torch  # several times as fast as NumPy

    found: Floats = torch.from_numpy(values).abs().amax(-1).numpy()
    return found


def largest_of_blocks(values: Floats, first: int, grid: Grid) -> Floats:
    """The largest magnitude of each block of rows from `first` on, which begin and end with one:
    `[rows of blocks, across]`."""
    if grid.block[0] > 1:
        low, high, index = grid.of_rows(first, first + len(values))
        starts = [*np.searchsorted(index, np.arange(high - low)), len(values)]
        rows = [largest(values[a:b].T) for a, b in pairwise(starts)]
        values = np.stack(rows)
    columns, width = values.shape[1], min(grid.block[1], values.shape[1])
    count = columns // width
    found = largest(values[:, : count * width].reshape(len(values), count, width))
    if count * width < columns:
        found = np.concatenate([found, largest(values[:, count * width :])[:, None]], axis=1)
    return found


def inverse(scales: Floats) -> Floats:
    """One divided by each scale; zero for a scale of zero, whose values are all zero."""
    found = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=found, where=scales != 0)
    return found


def rounded_scales(magnitudes: Floats, highest: float, dtype: str) -> Floats:
    """The scales, in a floating dtype, that make `highest` of the largest magnitudes; 1 where all
    is zero."""
    scales = magnitudes / np.float32(highest)
    scales[magnitudes == 0] = 1
    rounded = scales_as_float32(as_bytes(scales, dtype), dtype).reshape(scales.shape)
    found: Floats = np.maximum(rounded, np.float32(_SMALLEST[dtype]))
    return found


_SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}


def powers_of(magnitudes: Floats, old: Floats, below: float) -> Floats:
    """The smallest powers of two, of those that E8M0 has, that bring the largest magnitudes below a
    number; the old ones where all is zero. Codes lose nothing by a smaller power."""
    exponents = np.frexp(magnitudes.astype(np.float64) / below)[1]
    new: Floats = np.ldexp(np.float32(1), np.clip(exponents, -127, 127))
    return np.where(magnitudes == 0, old, new)


def scale_bytes(scales: Floats, dtype: str) -> Bytes:
    """Scales that a dtype has, as it stores them."""
    if dtype in ("U8", "F8_E8M0"):
        powers: Bytes = (np.frexp(scales)[1] + 126).astype(np.uint8)
        return powers.reshape(-1)
    return encode_e4m3(scales).reshape(-1) if dtype == "F8_E4M3" else as_bytes(scales, dtype)


@dataclass(frozen=True)
class Range:
    """How far the codes of a format reach: up to `largest`; what is `below` half way to where there
    is none any more rounds to that, and what is `above` half way from the one before."""

    largest: float
    below: float
    above: float


E4M3_RANGE = Range(448, 464, 432)
E2M1_RANGE = Range(6, 7, 5)


def calibrated_or(
    new: Floats, old: Floats, magnitudes: Floats, before: Floats, reach: Range
) -> Floats:
    """New scales, but the old ones where these were calibrated, and do for the new magnitudes.

    A scale that was made of the largest magnitude of its block makes the largest code of it.
    Another one was chosen for other reasons, and on a new grid all values would be rounded again.
    """
    keeps = (before <= np.float32(reach.above) * old) & (magnitudes < np.float32(reach.below) * old)
    return np.where(keeps, old, new)


def packed(codes: npt.NDArray[np.uint8], bits: int, size: int, straddling: bool = True) -> Bytes:
    """Codes of so many bits in `size` bytes a row, lowest bits first: `[n, codes]` -> `[n, size]`.

    Without gaps, or, where they are not `straddling` words of 32 bits, as many as fit into each.
    """
    rows = len(codes)
    if not straddling and 32 % bits:
        each, words = 32 // bits, size // 4
        places = np.arange(each, dtype=np.uint32) * np.uint32(bits)
        parted = _padded(codes, words * each).reshape(rows, words, each) << places
        joined: Bytes = np.bitwise_or.reduce(parted, axis=2).view(np.uint8)
        return joined
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

"""Codes of a few bits as numbers: tables and bit operations over whole blocks.

What is chosen here was measured on blocks of 512k values, one thread of a server with AVX-512, in
values a second. FP8: PyTorch's own conversion 0.19 G, a table by byte 0.8 G, one by pairs of bytes
(512 kB of it) 1.1–1.9 G, bits of a float16 that the processor widens 2.2–3.0 G. Two codes of 4 bits
a byte: a table of pairs by `take` 2.2 G, by PyTorch's `index_select` 2.4 G, one of four values by
two bytes 2.2 G. Scales of groups of 16 to 128: NumPy's broadcast 2.5 G, PyTorch's 7–10 G.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.storage.tensors import Bytes, as_float32

#: Numbers in whatever shape.
_Floats = npt.NDArray[np.float32]

#: Magnitudes and signs of the 16 codes of FP4 (E2M1).
E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)  # fmt: skip


#: float8_e4m3fn by byte; NaN has the two codes of all ones.
def _e4m3() -> npt.NDArray[np.float32]:
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    tiny = fraction / 8 * 2.0**-6
    usual = (1 + fraction / 8) * 2.0 ** (exponent - 7.0)
    values = np.where(exponent == 0, tiny, usual)
    values = np.where(byte & 127 == 127, np.nan, values)
    return (np.where(byte & 128, -1.0, 1.0) * values).astype(np.float32)


E4M3 = _e4m3()
E4M3_LARGEST = 448.0

#: Powers of two by their byte (E8M0): 2^(byte − 127); the last one is NaN.
E8M0 = np.append(2.0 ** (np.arange(255.0) - 127), np.nan).astype(np.float32)


def midpoints(values: _Floats, upper: bool) -> _Floats:
    """Half way from each of the values of codes to the next one below or above; beyond the last
    one infinity."""
    levels = np.unique(values)
    between = (levels[:-1] + levels[1:]) / 2
    ends = [*between, np.inf] if upper else [-np.inf, *between]
    found: _Floats = np.array(ends, np.float32)[np.searchsorted(levels, values)]
    return found


#: The lower and the upper ends of what E4M3 codes stand for, by byte.
E4M3_ENDS = tuple(
    np.where(np.isnan(E4M3), E4M3, midpoints(np.nan_to_num(E4M3), upper)) for upper in (False, True)
)

#: The largest buffer that a thread keeps, in bytes: several times what a block of a tensor takes.
_LARGEST_KEPT = 1 << 24


class _Kept(threading.local):
    """Buffers of one thread, kept from block to block: fresh memory costs more than the sums."""

    def __init__(self) -> None:
        self.buffers: dict[str, Bytes] = {}


_kept = _Kept()


def thread_buffer(name: str, count: int, dtype: Any = np.uint8) -> npt.NDArray[Any]:
    """A flat array of `count` numbers with arbitrary content, which is this thread's until it asks
    for one of this name again."""
    size = count * np.dtype(dtype).itemsize
    buffer = _kept.buffers.get(name)
    if buffer is None or len(buffer) < size:
        buffer = np.empty(size, np.uint8)
        if size <= _LARGEST_KEPT:
            _kept.buffers[name] = buffer
    return buffer[:size].view(dtype)


# --- codes ----------------------------------------------------------------------------------------


def pair_table(values: npt.NDArray[np.float32], high_first: bool) -> npt.NDArray[np.int64]:
    """What each byte of two 4-bit codes stands for: 256 pairs of float32, each as one int64.

    `values` are those of the 16 codes.
    """
    byte = np.arange(256)
    high, low = values[byte >> 4], values[byte & 15]
    pair = (high, low) if high_first else (low, high)
    return np.ascontiguousarray(np.stack(pair, -1)).view(np.int64).reshape(256)


def decode_pairs(table: npt.NDArray[np.int64], codes: Bytes, out: _Floats) -> None:
    """Fill `out`, flat, with the two values of each byte, by a `pair_table`."""
    table.take(codes, out=out.view(np.int64), mode="clip")


def decode_e4m3(codes: Bytes, out: _Floats) -> None:
    """Fill `out` with the values of E4M3 codes, flat both. Codes of NaN give any number.

    Shifted to where a float16 has its exponent and fraction, a code reads as 2⁻⁸ of its value,
    subnormal ones too. The sign is in two places after the shift; the lower one is cleared.
    """
    import torch

    half = thread_buffer("float16", len(codes), np.int16)
    np.multiply(codes.view(np.int8), np.int16(128), out=half, dtype=np.int16)
    np.bitwise_and(half, np.int16(~0x4000), out=half)
    torch.from_numpy(out).copy_(torch.from_numpy(half).view(torch.float16)).mul_(256.0)


def decode_columns(packed: npt.NDArray[np.uint8], low: int, high: int, out: _Floats) -> None:
    """Fill `out`, `[high - low, rows]`, with columns `[low, high)` of rows of FP4 codes, two a byte
    and the low one first.

    The bytes are turned round before they are decoded. A code gets the sign and the three last bits
    at the places where a float16 has sign, exponent and fraction, and then reads as 2⁻¹⁴ of its
    value.
    """
    import torch

    first, last = low // 2, -(-high // 2)
    codes = np.ascontiguousarray(np.ascontiguousarray(packed[:, first:last]).T)
    upper = thread_buffer("nibbles", codes.size).reshape(codes.shape)
    half = thread_buffer("float16", codes.size, np.int16).reshape(codes.shape)
    into = torch.from_numpy(out)
    for place in (0, 1):
        if place == 0:
            np.multiply(codes, np.uint8(16), out=upper)  # a shift takes ten times as long
        else:
            np.bitwise_and(codes, np.uint8(0xF0), out=upper)
        np.multiply(upper.view(np.int8), np.int16(32), out=half, dtype=np.int16)
        np.bitwise_and(half, np.int16(0x8E00 - 0x10000), out=half)
        # A range may begin with the second code of a byte, and end with the first one.
        skipped = int(2 * first + place < low)
        target = into[2 * (first + skipped) + place - low :: 2]
        values = torch.from_numpy(half).view(torch.float16)[skipped : skipped + len(target)]
        target.copy_(values)
    into.mul_(2.0**14)


def has_e4m3_nan(codes: Bytes) -> bool:
    """Whether NaN is among E4M3 codes."""
    return bool((codes & np.uint8(127)).max(initial=0) == 127)


def decode_integers(codes: npt.NDArray[Any], out: _Floats) -> None:
    """Fill `out` with whole numbers as they are, of the same shape."""
    import torch

    torch.from_numpy(out).copy_(torch.from_numpy(codes))


def unpacked(words: npt.NDArray[Any], bits: int, straddling: bool = True) -> npt.NDArray[np.uint8]:
    """The codes in 32-bit words along the last axis, lowest bits first.

    `[…, n]` int32 -> `[…, 32·n // bits]`: without gaps, so that a code may straddle two words; or
    otherwise `[…, n·(32 // bits)]`, with the last bits of a word unused.
    """
    if not straddling and 32 % bits:
        places = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
        parted = np.ascontiguousarray(words).view(np.uint32)[..., None] >> places
        parted &= np.uint32((1 << bits) - 1)
        apart: npt.NDArray[np.uint8] = parted.astype(np.uint8)
        return apart.reshape(*words.shape[:-1], -1)
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    mask = np.uint8((1 << bits) - 1)
    if bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        parts: npt.NDArray[np.uint8] = (octets[..., None] >> shifts) & mask
        return parts.reshape(*octets.shape[:-1], -1)
    # Eight codes take as many bytes as each has bits, and a code lies in two of them at most.
    size = octets.shape[-1]
    turns = -(-size // bits)
    padded = np.zeros((*octets.shape[:-1], turns * bits + 1), np.uint8)
    padded[..., :size] = octets
    made = np.empty((*octets.shape[:-1], turns, 8), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        low, high = (padded[..., at : at + turns * bits : bits] for at in (byte, byte + 1))
        code = low >> np.uint8(shift)
        if shift + bits > 8:
            code |= high << np.uint8(8 - shift)
        np.bitwise_and(code, mask, out=made[..., place])
    return made.reshape(*octets.shape[:-1], -1)[..., : 8 * size // bits]


@cache
def _codes_within(bits: int) -> _Floats:
    """The codes in a byte, for 3 bits in 12 bits, as numbers: a row for each content, the lowest
    first."""
    length = 12 if bits == 3 else 8
    shifts = np.arange(0, length, bits)
    return (np.arange(1 << length)[:, None] >> shifts & (1 << bits) - 1).astype(np.float32)


def decode_words(words: npt.NDArray[Any], bits: int, out: _Floats) -> None:
    """Fill `out`, `[n, codes]`, with the codes of 1, 2, 3, 4 or 8 bits in 32-bit words `[n, …]`,
    lowest bits first and without gaps. Both are in one piece; for 3 bits the number of words in a
    row is a multiple of three."""
    content: npt.NDArray[Any] = words.view(np.uint8)
    if bits == 8:
        decode_integers(content, out)
        return
    if bits == 3:
        three = content.reshape(-1, 3)
        content = thread_buffer("twelve bits", 2 * len(three), np.uint16).reshape(-1, 2)
        content[:, 0] = three[:, 0] | (three[:, 1] & 15).astype(np.uint16) << 8
        content[:, 1] = three[:, 1] >> 4 | three[:, 2].astype(np.uint16) << 4
    table = _codes_within(bits)
    rows = out.reshape(-1, table.shape[1])
    # No content is outside of the table; with "clip" NumPy writes without a buffer between.
    table.take(content.reshape(-1), axis=0, out=rows, mode="clip")


def nearest_levels(values: _Floats, levels: _Floats) -> Bytes:
    """The number of the level that is nearest to each value; of two as near, the lower one.

    There are at most 256 levels, and they ascend.
    """
    bounds = (levels[1:] + levels[:-1]) / np.float32(2)
    if len(levels) > 32:
        places: Bytes = np.searchsorted(bounds, values).astype(np.uint8)
        return places
    # Comparing with each bound is several times as fast as searching among few.
    found = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, bool)
    for bound in bounds:
        np.greater(values, bound, out=above)
        found += above.view(np.uint8)
    return found


def encode_e4m3(values: _Floats) -> Bytes:
    """The E4M3 code of each value, ties to even; what is too large gets the largest, NaN zero."""
    import torch

    bounded = torch.from_numpy(values).nan_to_num(0.0).clamp_(-E4M3_LARGEST, E4M3_LARGEST)
    codes: Bytes = bounded.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes


def encode_integers(values: _Floats, lowest: int, highest: int) -> npt.NDArray[np.int8]:
    """The whole numbers nearest to values, of 8 bits."""
    whole = np.rint(np.nan_to_num(values, nan=0.0))
    codes: npt.NDArray[np.int8] = whole.clip(lowest, highest).astype(np.int8)
    return codes


# --- scales ---------------------------------------------------------------------------------------


def scales_as_float32(raw: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """The numbers of scales, flat; where they are stored as bytes those are powers of two."""
    if dtype in ("U8", "F8_E8M0"):
        return E8M0.take(raw)
    return E4M3.take(raw) if dtype == "F8_E4M3" else as_float32(raw, dtype)


def integers_as_float32(raw: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """The numbers of zero points, flat."""
    kind = {"I8": np.int8, "U8": np.uint8, "I16": np.int16, "I32": np.int32}[dtype]
    return raw.view(kind).astype(np.float32)


def multiply_groups(values: _Floats, scales: _Floats, group: int) -> None:
    """Multiply `group` columns of `values`, `[rows, columns]`, by one of `scales` each, in place.

    `scales` is `[rows, groups]`; the last group may be short.
    """
    for part, one in _by_group(values, scales, group):
        part.mul_(one)


def divide_groups(values: _Floats, scales: _Floats, group: int) -> None:
    """Divide, as `multiply_groups` multiplies; by a scale of zero not at all."""
    for part, one in _by_group(values, np.where(scales == 0, np.float32(1), scales), group):
        part.div_(one)


def add_groups(values: _Floats, zeros: _Floats, group: int) -> None:
    """Add zero points of groups, as `multiply_groups` multiplies."""
    for part, one in _by_group(values, zeros, group):
        part.add_(one)


def subtract_groups(values: _Floats, zeros: _Floats, group: int) -> None:
    """Subtract zero points of groups, as `multiply_groups` multiplies."""
    for part, one in _by_group(values, zeros, group):
        part.sub_(one)


def _by_group(values: _Floats, ofs: _Floats, group: int) -> list[tuple[Any, Any]]:
    """The values of whole groups and of a short one, each with what is broadcast over it."""
    import torch

    matrix, numbers = torch.from_numpy(values), torch.from_numpy(ofs)
    columns = matrix.shape[1]
    if group == 1 or group >= columns:
        return [(matrix, numbers)]
    count = columns // group
    # A view, where the matrix is one.
    whole = matrix[:, : count * group].view(len(matrix), count, group)
    parts = [(whole, numbers[:, :count, None])]
    if count * group < columns:
        parts.append((matrix[:, count * group :], numbers[:, count:]))
    return parts

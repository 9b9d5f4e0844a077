"""Codes of a few bits as numbers: tables and bit operations, with NumPy, over whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

#: Magnitudes and signs of the 16 codes of FP4 (E2M1).
E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)  # fmt: skip


def pair_table(values: npt.NDArray[np.float32], high_first: bool) -> npt.NDArray[np.int64]:
    """What each byte of two 4-bit codes stands for: 256 pairs of float32, each as one int64.

    `values` are those of the 16 codes.
    """
    byte = np.arange(256)
    high, low = values[byte >> 4], values[byte & 15]
    pair = (high, low) if high_first else (low, high)
    return np.ascontiguousarray(np.stack(pair, -1)).view(np.int64).reshape(256)


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

#: Powers of two by their byte (E8M0): 2^(byte − 127); the last one is NaN.
E8M0 = np.append(2.0 ** (np.arange(255.0) - 127), np.nan).astype(np.float32)


def unpacked(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The codes in 32-bit words along the last axis, lowest bits first and without gaps: a code
    may straddle two words. `[…, n]` int32 -> `[…, 32·n // bits]`."""
    octets: npt.NDArray[np.uint8] = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    codes: npt.NDArray[np.uint8]
    if bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (octets[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return codes.reshape(*octets.shape[:-1], -1)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    digits = stream[..., : count * bits].reshape(*stream.shape[:-1], count, bits)
    codes = np.packbits(digits, axis=-1, bitorder="little")[..., 0]
    return codes

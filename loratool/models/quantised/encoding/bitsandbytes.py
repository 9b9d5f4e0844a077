"""bitsandbytes again: NF4 and FP4, with a new absmax for every block; int8, with one for each row.

Source: bitsandbytes/backends/default/ops.py (`quantize_4bit`, `quantize_blockwise`) and
bitsandbytes/functional.py, where an absmax is quantised less the mean of all of them. Here that
mean stays the file's: it only centres the codes, and a new one would change every absmax that
nothing else changes, and a description whose length is that of a number in decimals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from loratool.models.quantised.encoding.encoder import Encoder, LedEncoder
from loratool.models.quantised.encoding.rounding import Codes, inverse, largest
from loratool.models.quantised.formats.bitsandbytes import FourBit
from loratool.models.quantised.formats.llm_int8 import ONE_127TH, EightBit
from loratool.models.quantised.numbers import nearest_levels
from loratool.models.quantised.scheme import Floats, read_part
from loratool.storage.tensors import Bytes, FilePool, as_bytes, as_float32


class FourBitEncoder(Encoder):
    """The nearest of 16 levels, as a share of the largest magnitude of the block."""

    def __init__(self, scheme: FourBit) -> None:
        self._scheme = scheme
        self._block = scheme.blocksize
        self._is_nested = "nested_absmax" in scheme.parts
        columns = scheme.columns
        values = self._block * (scheme.nested_blocksize if self._is_nested else 1)
        self.group = self.strip = values // math.gcd(values, columns)
        size = self.group * columns
        itemsize = scheme.parts["absmax"].itemsize
        self.sizes = {"weight": size // 2, "absmax": size // self._block * itemsize}
        if self._is_nested:
            self.sizes["nested_absmax"] = size // values * 4
        if scheme.turned:  # blocks run across the rows
            self.group = self.strip = scheme.shape[0]
            self.sizes = {role: scheme.parts[role].nbytes for role in self.sizes}

    def open(self, files: FilePool) -> None:
        parts = self._scheme.parts
        self._levels, self._codes = _sorted(read_part(parts["quant_map"], files).view(np.float32))
        if self._is_nested:
            levels = read_part(parts["nested_quant_map"], files).view(np.float32)
            self._nested_levels, self._nested_codes = _sorted(levels)

    def encode(
        self,
        role: str,
        first: int,
        values: Floats,
        before: Floats,
        stand_for: Floats | None = None,
    ) -> Codes:
        blocks = _in_blocks(values.T if self._scheme.turned else values, self._block)
        absmax = largest(blocks)
        if not self._is_nested:
            raw = as_bytes(absmax, self._scheme.parts["absmax"].dtype)
            if role == "absmax":
                return raw
            absmax = read = as_float32(raw, self._scheme.parts["absmax"].dtype)
        elif role != "weight" or stand_for is not None:
            codes, scales, read = self._nested(absmax)
            if role != "weight":
                return codes if role == "absmax" else scales
        blocks = blocks * inverse(absmax)[:, None]
        numbers = nearest_levels(blocks, self._levels)
        if stand_for is not None:
            self._read_again(numbers, read, stand_for)
        pairs = self._codes.take(numbers).reshape(-1)[: values.size + values.size % 2]
        octets: Codes = pairs[::2] << 4 | pairs[1::2]
        return octets

    def _nested(self, absmax: Floats) -> tuple[Codes, Floats, Floats]:
        """The codes of an absmax of each block, their scales, and what is read of both."""
        offset = np.float32(self._scheme.nested_offset)
        blocks = _in_blocks(absmax - offset, self._scheme.nested_blocksize)
        scales = largest(blocks)
        numbers = nearest_levels(blocks * inverse(scales)[:, None], self._nested_levels)
        read = (self._nested_levels.take(numbers) * scales[:, None]).reshape(-1) + offset
        codes = self._nested_codes.take(numbers).reshape(-1)
        return codes[: len(absmax)], scales, read[: len(absmax)]

    def _read_again(self, numbers: Codes, absmax: Floats, out: Floats) -> None:
        values = self._levels.take(numbers)
        values *= absmax[:, None]
        flat = values.reshape(-1)[: out.size]
        rounded = as_float32(as_bytes(flat, self._scheme.dtype), self._scheme.dtype)
        out[:] = (
            rounded.reshape(out.shape[::-1]).T
            if self._scheme.turned
            else rounded.reshape(out.shape)
        )


class EightBitEncoder(LedEncoder):
    """round(w·127/s) with s = max|w| of the row."""

    def __init__(self, scheme: EightBit) -> None:
        self._scheme = scheme
        rows, columns = scheme.shape
        self._scale = scheme.parts["SCB"]
        self.group = self.strip = 1
        self.sizes = {"weight": columns, "SCB": self._scale.itemsize}
        if scheme.turned:  # the rows that have a scale are columns here
            self.strip, self.lead = rows, "SCB"
            self.sizes = {"weight": rows * columns, "SCB": self._scale.nbytes}

    def open(self, files: FilePool) -> None:
        self._led: Floats | None = None

    def encode(
        self,
        role: str,
        first: int,
        values: Floats,
        before: Floats,
        stand_for: Floats | None = None,
    ) -> Codes:
        if self.lead == role:
            return largest(values.T)
        scales = self._led
        if scales is None:
            raw = as_bytes(largest(values), self._scale.dtype)
            if role == "SCB":
                return raw
            scales = as_float32(raw, self._scale.dtype)[:, None]
        codes = np.rint(values * (np.float32(127) * inverse(scales)))
        np.clip(codes, -127, 127, out=codes)
        if stand_for is not None:
            np.multiply(codes, scales, out=stand_for)
            stand_for *= ONE_127TH
        found: Codes = codes.astype(np.int8)
        return found

    def joined(self, role: str, pieces: Iterable[Codes]) -> Bytes:
        if self.lead == role:
            found = np.zeros(self._scheme.columns, np.float32)
            for piece in pieces:
                np.maximum(found, piece, out=found)
            return as_bytes(found, self._scale.dtype)
        if self.lead is None:
            return super().joined(role, pieces)
        return np.ascontiguousarray(np.concatenate(list(pieces)).T).reshape(-1).view(np.uint8)

    def follow(self, raw: Bytes) -> None:
        self._led = as_float32(raw, self._scale.dtype)


def _sorted(levels: Floats) -> tuple[Floats, Codes]:
    """Levels as they ascend, and the code of each."""
    order = np.argsort(levels, kind="stable")
    return levels[order], order.astype(np.uint8)


def _in_blocks(values: Floats, size: int) -> Floats:
    """Values one after the other, in blocks; the last one is filled up with zeros."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if len(flat) % size:
        flat = np.append(flat, np.zeros(size - len(flat) % size, np.float32))
    return flat.reshape(-1, size)

"""Integers again, on the grid that they are on: scales and zero points were calibrated and stay.

What comes to lie beyond the last code of its group gets that code. Whether the codes are AWQ's,
GPTQ's or another's is only a matter of how they are packed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np

from loratool.models.quantised.encoding.encoder import Encoder
from loratool.models.quantised.encoding.rounding import Codes, packed
from loratool.models.quantised.formats.awq import Awq, in_words
from loratool.models.quantised.formats.fp8 import Scaled
from loratool.models.quantised.formats.gptq import Gptq
from loratool.models.quantised.formats.packed import PackedIntegers
from loratool.models.quantised.numbers import (
    add_groups,
    divide_groups,
    multiply_groups,
    subtract_groups,
)
from loratool.models.quantised.scheme import Floats, OnGrid
from loratool.storage.tensors import Bytes, FilePool


class GridEncoder(Encoder):
    """The nearest number of the grid: codes from `low` to `high` are value/scale + zero."""

    low: int
    high: int
    _grid: OnGrid

    def encode(
        self,
        role: str,
        first: int,
        values: Floats,
        before: Floats,
        stand_for: Floats | None = None,
    ) -> Codes:
        scales, zeros, group = self._grid.grid(first, first + len(values))
        numbers = values.copy()
        divide_groups(numbers, scales, group)
        np.rint(numbers, out=numbers)
        if zeros is not None:
            add_groups(numbers, zeros, group)
        np.clip(numbers, self.low, self.high, out=numbers)
        if stand_for is not None:
            stand_for[:] = numbers
            if zeros is not None:
                subtract_groups(stand_for, zeros, group)
            multiply_groups(stand_for, scales, group)
        return self._packed(numbers)

    @abstractmethod
    def _packed(self, numbers: Floats) -> Codes:
        """Codes of rows, whole numbers `[n, columns]`, as they are stored."""


class BytesEncoder(GridEncoder):
    """Codes of a byte each, as compressed-tensors' int-quantized has them."""

    low, high = -128, 127

    def __init__(self, scheme: Scaled) -> None:
        self._scheme = scheme
        self.group = self.strip = 1
        self.sizes = {"weight": scheme.columns}

    def open(self, files: FilePool) -> None:
        self._grid = self._scheme.opened(files)

    def _packed(self, numbers: Floats) -> Codes:
        return numbers.astype(np.int8)


class PackedEncoder(GridEncoder):
    """Codes in the words of a row, as compressed-tensors' pack-quantized has them."""

    def __init__(self, scheme: PackedIntegers) -> None:
        self._scheme = scheme
        self.group = self.strip = 1
        self.sizes = {"codes": 4 * scheme.main.shape[1]}
        self.low, self.high = -(1 << scheme.bits - 1), (1 << scheme.bits - 1) - 1

    def open(self, files: FilePool) -> None:
        self._grid = self._scheme.opened(files)

    def _packed(self, numbers: Floats) -> Codes:
        codes = (numbers - self.low).astype(np.uint8)
        packing = self._scheme.packing
        return packed(codes, packing.width, self.sizes["codes"], packing.straddling)


class GptqEncoder(GridEncoder):
    """Codes in words along the inputs, so that the rows of a weight are columns of words."""

    def __init__(self, scheme: Gptq) -> None:
        self._scheme = scheme
        self._words = scheme.main.shape[0]
        self.low, self.high = 0, (1 << scheme.width) - 1
        self.group, self.strip = 1, scheme.shape[0]
        self.sizes = {"qweight": scheme.main.nbytes}
        if scheme.turned:  # rows are inputs, and 32 of them a whole number of words
            self.group = self.strip = 32
            self.sizes = {"qweight": 4 * scheme.width * scheme.columns}

    def open(self, files: FilePool) -> None:
        self._grid = self._scheme.opened(files)

    def _packed(self, numbers: Floats) -> Codes:
        width, codes = self._scheme.width, numbers.astype(np.uint8)
        if self._scheme.turned:
            words = -(-len(codes) * width // 32)
            columns = packed(np.ascontiguousarray(codes.T), width, 4 * words)
            turned: Codes = columns.view("<i4").T
            return turned
        found: Codes = packed(codes, width, 4 * self._words).view("<i4")
        return found

    def joined(self, role: str, pieces: Iterable[Codes]) -> Bytes:
        if self._scheme.turned:
            return super().joined(role, pieces)
        whole = np.concatenate(list(pieces)).T
        return np.ascontiguousarray(whole).reshape(-1).view(np.uint8)


class AwqEncoder(GridEncoder):
    """Eight codes of neighbouring outputs in a word of each input, out of order."""

    low, high = 0, 15

    def __init__(self, scheme: Awq) -> None:
        self._scheme = scheme
        self.group, self.strip = 8, scheme.shape[0]
        self.sizes = {"qweight": scheme.main.nbytes}

    def open(self, files: FilePool) -> None:
        self._grid = self._scheme.opened(files)

    def _packed(self, numbers: Floats) -> Codes:
        return in_words(numbers)

    def joined(self, role: str, pieces: Iterable[Codes]) -> Bytes:
        whole = np.concatenate(list(pieces)).T
        return np.ascontiguousarray(whole).reshape(-1).view(np.uint8)

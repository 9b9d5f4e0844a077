"""FP8 again, with a new scale for every block: s = max|w|/448 in the dtype of scales, then w/s.

Sources: compressed_tensors/quantization/utils/helpers.py (`calculate_qparams`) and, for what it
calls `weight_scale_inv`, transformers/integrations/finegrained_fp8.py, where a scale is the inverse
of an inverse. Powers of two (E8M0) are the smallest ones that leave nothing out of range: a larger
one would only move bits from codes to scales.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from loratool.models.quantised.encoding.encoder import Encoder
from loratool.models.quantised.encoding.rounding import (
    BELOW_E4M3,
    LARGEST_E4M3,
    Codes,
    largest_of_blocks,
    powers_of,
    scales_of,
)
from loratool.models.quantised.formats.fp8 import Scaled
from loratool.models.quantised.numbers import (
    decode_e4m3,
    divide_groups,
    encode_e4m3,
    multiply_groups,
    scales_as_float32,
)
from loratool.models.quantised.scheme import Floats
from loratool.storage.tensors import Bytes, FilePool


class FP8Encoder(Encoder):
    """The nearest E4M3 number of w/s."""

    def __init__(self, scheme: Scaled) -> None:
        grid, scale = scheme.grid, scheme.parts["scale"]
        self._scheme, self._grid, self._scale = scheme, grid, scale
        self._rows = scale.numel // grid.across  # of scales
        height = min(grid.block[0], grid.height)
        if height > 1 and height == grid.height:
            # A block has all rows of a matrix: there are few, of very many rows.
            self.lead = "scale"
            height = 1
        elif grid.height % height and self._rows > grid.down:
            height = grid.height  # blocks begin anew in the next matrix of the stack
        self.group = self.strip = height
        down = -(-height // grid.block[0])
        self.sizes = {"weight": height * grid.columns, "scale": down * grid.across * scale.itemsize}
        if self.lead is not None:
            self.sizes["scale"] = scale.nbytes
        self._led: Floats | None = None

    def open(self, files: FilePool) -> None:
        pass

    def encode(
        self, role: str, first: int, values: Floats, stand_for: Floats | None = None
    ) -> Codes:
        grid, last = self._grid, first + len(values)
        low, high, index = grid.of_rows(first, last)
        if self._led is not None:
            scales = self._led[low:high]
        else:
            magnitudes = largest_of_blocks(values, first, grid)
            if role == self.lead:
                found = np.zeros((self._rows, grid.across), np.float32)
                found[low:high] = magnitudes
                return found
            raw, scales = self._scales(magnitudes)
            if role == "scale":
                return raw
        scales = scales.take(index, 0)
        quotients = values.copy()
        divide_groups(quotients, scales, grid.block[1])
        codes = encode_e4m3(quotients)
        if stand_for is not None:
            decode_e4m3(codes.reshape(-1), stand_for.reshape(-1))
            multiply_groups(stand_for, scales, grid.block[1])
        return codes

    def joined(self, role: str, pieces: Iterable[Codes]) -> Bytes:
        if role != self.lead:
            return super().joined(role, pieces)
        found = np.zeros((self._rows, self._grid.across), np.float32)
        for piece in pieces:
            np.maximum(found, piece, out=found)
        return self._scales(found)[0]

    def follow(self, raw: Bytes) -> None:
        found = scales_as_float32(raw, self._scale.dtype)
        self._led = found.reshape(self._rows, self._grid.across)

    def _scales(self, magnitudes: Floats) -> tuple[Bytes, Floats]:
        dtype = self._scale.dtype
        if dtype in ("U8", "F8_E8M0"):
            return powers_of(magnitudes, BELOW_E4M3)
        if dtype == "F32" and self._scale.name.endswith("_inv"):
            with np.errstate(divide="ignore", over="ignore"):
                twice = np.float32(1) / (np.float32(LARGEST_E4M3) / magnitudes)
            if np.isfinite(twice).all() and twice.all():
                return twice.reshape(-1).view(np.uint8), twice
        return scales_of(magnitudes, LARGEST_E4M3, dtype)

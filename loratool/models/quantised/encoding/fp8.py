"""FP8 again, with new scales of blocks: s = max|w|/448 in the dtype of scales, then w/s.

Scales that were calibrated stay where they do. Powers of two (E8M0) are the smallest ones that
leave nothing out of range: a larger one would only move bits from codes to scales.
Sources: compressed_tensors/quantization/utils/helpers.py (`calculate_qparams`) and, for what is
called `weight_scale_inv`, transformers/integrations/finegrained_fp8.py, where a scale is the
inverse of an inverse.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from loratool.models.quantised.encoding.encoder import LedEncoder
from loratool.models.quantised.encoding.rounding import (
    E4M3_RANGE,
    Codes,
    calibrated_or,
    largest_of_blocks,
    powers_of,
    rounded_scales,
    scale_bytes,
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
from loratool.storage.values import values_of


class FP8Encoder(LedEncoder):
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
        self._old = values_of(self._scale, files)

    def encode(
        self,
        role: str,
        first: int,
        values: Floats,
        before: Floats,
        stand_for: Floats | None = None,
    ) -> Codes:
        grid, last = self._grid, first + len(values)
        low, high, index = grid.of_rows(first, last)
        if self._led is not None:
            scales = self._led[low:high]
        else:
            both = [largest_of_blocks(some, first, grid) for some in (values, before)]
            if role == self.lead:
                found = np.zeros((2, self._rows, grid.across), np.float32)
                found[:, low:high] = both
                return found
            scales = self._scales(low, *both)
            if role == "scale":
                return scale_bytes(scales, self._scale.dtype)
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
        found = np.zeros((2, self._rows, self._grid.across), np.float32)
        for piece in pieces:
            np.maximum(found, piece, out=found)
        return scale_bytes(self._scales(0, *found), self._scale.dtype)

    def follow(self, raw: Bytes) -> None:
        self._led = self._as_rows(raw)

    def _scales(self, low: int, magnitudes: Floats, before: Floats) -> Floats:
        """Those of rows of blocks from `low` on."""
        dtype, across = self._scale.dtype, self._grid.across
        old = self._as_rows(self._old.bytes(low * across, (low + len(magnitudes)) * across))
        if dtype in ("U8", "F8_E8M0"):
            return powers_of(magnitudes, old, E4M3_RANGE.below)
        new = rounded_scales(magnitudes, E4M3_RANGE.largest, dtype)
        if dtype == "F32" and self._scale.name.endswith("_inv"):
            with np.errstate(divide="ignore", over="ignore"):
                twice = np.float32(1) / (np.float32(E4M3_RANGE.largest) / magnitudes)
            new = np.where((twice > 0) & (twice < np.inf), twice, new)
        return calibrated_or(new, old, magnitudes, before, E4M3_RANGE)

    def _as_rows(self, raw: Bytes) -> Floats:
        return scales_as_float32(raw, self._scale.dtype).reshape(-1, self._grid.across)

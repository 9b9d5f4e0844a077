"""FP4 (E2M1) again, with new scales of groups. The factor of a whole NVFP4 weight stays.

Programs that hold q, k and v as one matrix take one factor for all three, and tools that quantise
give them the same: a new one for some of them would spoil the others. The largest scale under the
old factor is 448, so a group may grow by 3.5 % beyond the largest one before it is cut off.
Source: compressed_tensors/quantization/utils/mxfp4_utils.py (`generate_mxfp4_scales`: the power of
two for which the largest value of a group rounds to 4 or 6) and helpers.py (`calculate_qparams`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from loratool.models.quantised.encoding.encoder import Encoder
from loratool.models.quantised.encoding.rounding import (
    E2M1_RANGE,
    Codes,
    calibrated_or,
    largest,
    largest_of_blocks,
    powers_of,
    rounded_scales,
    scale_bytes,
    to_e2m1,
)
from loratool.models.quantised.formats.fp4 import ExpertsMXFP4, GroupedFP4
from loratool.models.quantised.numbers import (
    E2M1,
    E4M3,
    divide_groups,
    encode_e4m3,
    multiply_groups,
    scales_as_float32,
)
from loratool.models.quantised.scheme import Floats, read_part
from loratool.storage.tensors import Bytes, FilePool, as_float32
from loratool.storage.values import values_of


class FP4Encoder(Encoder):
    """The nearest E2M1 number of w/s, two codes a byte, the low one first."""

    def __init__(self, scheme: GroupedFP4) -> None:
        self._scheme = scheme
        self._scale = scheme.parts["scale"]
        self.group = self.strip = 1
        self.sizes = {
            "codes": scheme.columns // 2, "scale": scheme.grid.across * self._scale.itemsize,
        }  # fmt: skip

    def open(self, files: FilePool) -> None:
        self._old = values_of(self._scale, files)
        self._factor = np.float32(1)
        if self._scheme.factor:
            info = self._scheme.parts["factor"]
            self._factor = as_float32(read_part(info, files), info.dtype)[0]

    def encode(
        self,
        role: str,
        first: int,
        values: Floats,
        before: Floats,
        stand_for: Floats | None = None,
    ) -> Codes:
        grid, dtype = self._scheme.grid, self._scale.dtype
        low, high = first * grid.across, (first + len(values)) * grid.across
        old = scales_as_float32(self._old.bytes(low, high), dtype).reshape(-1, grid.across)
        both = [largest_of_blocks(some, first, grid) for some in (values, before)]
        scales = self._scales(old, *both)
        if role == "scale":
            return scale_bytes(scales, dtype)
        scales = self._times_factor(scales)
        codes = _divided(values, scales, grid.block[1])
        if stand_for is not None:
            E2M1.take(codes, out=stand_for)
            multiply_groups(stand_for, scales, grid.block[1])
        return _in_pairs(codes)

    def _scales(self, old: Floats, magnitudes: Floats, before: Floats) -> Floats:
        """The scales of groups, as they are stored."""
        dtype = self._scale.dtype
        if dtype in ("U8", "F8_E8M0"):
            return powers_of(magnitudes, old, E2M1_RANGE.below)
        if dtype == "F8_E4M3":
            magnitudes, before = (some / self._times_factor(_ONE) for some in (magnitudes, before))
            codes = encode_e4m3(magnitudes / np.float32(E2M1_RANGE.largest))
            new = E4M3.take(np.maximum(codes, 1))  # no scale is zero
        else:
            new = rounded_scales(magnitudes, E2M1_RANGE.largest, dtype)
        return calibrated_or(new, old, magnitudes, before, E2M1_RANGE)

    def _times_factor(self, scales: Floats) -> Floats:
        """What values are multiplied with."""
        divides = self._scheme.factor == "divides"
        found: Floats = scales / self._factor if divides else scales * self._factor
        return found


_ONE = np.ones(1, np.float32)


def _in_pairs(codes: Codes) -> Codes:
    octets: Codes = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
    return octets


def _divided(values: Floats, scales: Floats, group: int) -> Codes:
    quotients = values.copy()
    divide_groups(quotients, scales, group)
    return to_e2m1(quotients)


class ExpertsEncoder(Encoder):
    """gpt-oss: rows of the plain model are inputs, 32 of which are a group of every output; an
    expert's codes are `[out, groups, 16]`."""

    def __init__(self, scheme: ExpertsMXFP4) -> None:
        _, depth, width = scheme.shape
        self.group, self.strip = 32, depth
        self.sizes = {"blocks": depth * width // 2, "scales": depth * width // 32}

    def open(self, files: FilePool) -> None:
        pass

    def encode(
        self,
        role: str,
        first: int,
        values: Floats,
        before: Floats,
        stand_for: Floats | None = None,
    ) -> Codes:
        turned = np.ascontiguousarray(values.T)  # [out, n]
        magnitudes = largest(turned.reshape(len(turned), -1, 32))
        scales = powers_of(magnitudes, np.ones_like(magnitudes), E2M1_RANGE.below)
        if role == "scales":
            return scale_bytes(scales, "F8_E8M0").reshape(scales.shape)
        codes = _divided(turned, scales, 32)
        if stand_for is not None:
            back = E2M1.take(codes)
            multiply_groups(back, scales, 32)
            stand_for[:] = back.T
        return _in_pairs(codes)

    def joined(self, role: str, pieces: Iterable[Codes]) -> Bytes:
        return np.concatenate(list(pieces), axis=1).reshape(-1)

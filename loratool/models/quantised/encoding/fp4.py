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
    BELOW_E2M1,
    LARGEST_E2M1,
    Codes,
    largest_of_blocks,
    powers_of,
    scales_of,
    to_e2m1,
)
from loratool.models.quantised.formats.fp4 import ExpertsMXFP4, GroupedFP4
from loratool.models.quantised.numbers import (
    E2M1,
    divide_groups,
    encode_e4m3,
    multiply_groups,
    scales_as_float32,
)
from loratool.models.quantised.scheme import Floats, read_part
from loratool.storage.tensors import Bytes, FilePool, as_float32


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
        self._factor = np.float32(1)
        if self._scheme.factor:
            info = self._scheme.parts["factor"]
            self._factor = as_float32(read_part(info, files), info.dtype)[0]

    def encode(
        self, role: str, first: int, values: Floats, stand_for: Floats | None = None
    ) -> Codes:
        raw, scales = self._scales(largest_of_blocks(values, first, self._scheme.grid))
        if role == "scale":
            return raw
        group = self._scheme.grid.block[1]
        codes = _divided(values, scales, group)
        if stand_for is not None:
            E2M1.take(codes, out=stand_for)
            multiply_groups(stand_for, scales, group)
        return _in_pairs(codes)

    def _scales(self, magnitudes: Floats) -> tuple[Codes, Floats]:
        """The scales as they are stored, and as what values are multiplied with."""
        kind, dtype = self._scheme.factor, self._scale.dtype
        if dtype in ("U8", "F8_E8M0"):
            return powers_of(magnitudes, BELOW_E2M1)
        if not kind:
            return scales_of(magnitudes, LARGEST_E2M1, dtype)
        wanted = magnitudes / np.float32(LARGEST_E2M1)
        codes = encode_e4m3(wanted * self._factor if kind == "divides" else wanted / self._factor)
        codes[(codes == 0) & (magnitudes > 0)] = 1
        read = scales_as_float32(codes.reshape(-1), dtype).reshape(codes.shape)
        return codes, read / self._factor if kind == "divides" else read * self._factor


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
        self.sizes = {"blocks": depth * width // 2, "scales": depth // 32 * width}

    def open(self, files: FilePool) -> None:
        pass

    def encode(
        self, role: str, first: int, values: Floats, stand_for: Floats | None = None
    ) -> Codes:
        turned = np.ascontiguousarray(values.T)  # [out, n]
        groups = turned.reshape(len(turned), -1, 32)
        raw, scales = powers_of(np.maximum(groups.max(2), -groups.min(2)), BELOW_E2M1)
        if role == "scales":
            return raw.reshape(scales.shape)
        codes = _divided(turned, scales, 32)
        if stand_for is not None:
            back = E2M1.take(codes)
            multiply_groups(back, scales, 32)
            stand_for[:] = back.T
        return _in_pairs(codes)

    def joined(self, role: str, pieces: Iterable[Codes]) -> Bytes:
        return np.concatenate(list(pieces), axis=1).reshape(-1)

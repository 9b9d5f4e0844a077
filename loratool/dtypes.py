"""Dtypes by their safetensors codes ("F16", "BF16", …): every table of them, and what follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Bits per element of every dtype that the safetensors format names.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class FloatFormat:
    """An IEEE format: sign, exponent, `fraction` bits; 2**`smallest` is its least normal number.

    `name` is what torch and the options call it.
    """

    name: str
    bits: int
    fraction: int
    smallest: int

    @property
    def magnitude_mask(self) -> int:
        """All bits but the sign. Magnitudes compare like these bits."""
        return (1 << (self.bits - 1)) - 1

    @property
    def infinity_bits(self) -> int:
        return self.magnitude_mask & -self.normal_bits

    @property
    def normal_bits(self) -> int:
        """The bits of the smallest normal number."""
        return 1 << self.fraction

    @property
    def rounding(self) -> float:
        """Half a unit in the last place, as a share of the number: what rounding takes at most."""
        return 2.0 ** -(self.fraction + 1)

    @property
    def overflow(self) -> float:
        """What is not below this rounds to infinity: half a unit beyond the largest number."""
        if self.bits == 64:
            return math.inf
        return (2 - 2.0 ** -(self.fraction + 1)) * 2.0 ** (1 - self.smallest)


#: The floating dtypes loratool computes with. Narrower ones are quantised storage.
FLOAT_FORMATS = {
    "F16": FloatFormat("float16", 16, 10, -14),
    "BF16": FloatFormat("bfloat16", 16, 7, -126),
    "F32": FloatFormat("float32", 32, 23, -126),
    "F64": FloatFormat("float64", 64, 52, -1022),
}

#: What `--dtype` may be where an adapter is written, and the code of it.
FACTOR_DTYPES = {FLOAT_FORMATS[code].name: code for code in ("F16", "BF16", "F32")}

#: What `--dtype` may be where a model is written; "base" keeps each tensor's own.
MODEL_DTYPES = {**FACTOR_DTYPES, "base": ""}


def dtype_name(code: str) -> str:
    """The name of a dtype that can be written: "float16" for "F16"; other codes as they are."""
    return next((name for name, known in FACTOR_DTYPES.items() if known == code), code)

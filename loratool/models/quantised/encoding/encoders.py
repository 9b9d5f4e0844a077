"""Which schemes can be written, and by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratool.models.quantised.encoding.bitsandbytes import EightBitEncoder, FourBitEncoder
from loratool.models.quantised.encoding.encoder import Encoder
from loratool.models.quantised.encoding.fp4 import ExpertsEncoder, FP4Encoder
from loratool.models.quantised.encoding.fp8 import FP8Encoder
from loratool.models.quantised.encoding.integers import (
    AwqEncoder,
    BytesEncoder,
    GptqEncoder,
    PackedEncoder,
)
from loratool.models.quantised.formats.awq import Awq
from loratool.models.quantised.formats.bitsandbytes import FourBit
from loratool.models.quantised.formats.fp4 import ExpertsMXFP4, GroupedFP4
from loratool.models.quantised.formats.fp8 import Scaled
from loratool.models.quantised.formats.gptq import Gptq
from loratool.models.quantised.formats.llm_int8 import EightBit
from loratool.models.quantised.formats.packed import PackedIntegers
from loratool.models.quantised.scheme import Scheme


def _scaled(scheme: Scaled) -> Encoder:
    return BytesEncoder(scheme) if scheme.main.dtype == "I8" else FP8Encoder(scheme)


#: What writes a scheme of each kind. The others are only read.
_ENCODERS: dict[type[Scheme], Callable[[Any], Encoder]] = {
    FourBit: FourBitEncoder, EightBit: EightBitEncoder, Scaled: _scaled, GroupedFP4: FP4Encoder,
    ExpertsMXFP4: ExpertsEncoder, PackedIntegers: PackedEncoder, Gptq: GptqEncoder, Awq: AwqEncoder,
}  # fmt: skip


def encoder_of(scheme: Scheme) -> Encoder | None:
    """The way back into a scheme; None where it is only read."""
    make = _ENCODERS.get(type(scheme))
    return make(scheme) if make is not None else None

"""Which schemes can be written, and by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratool.models.quantised.encoding.bitsandbytes import FourBitEncoder
from loratool.models.quantised.encoding.encoder import Encoder
from loratool.models.quantised.formats.bitsandbytes import FourBit
from loratool.models.quantised.scheme import Scheme

#: What writes a scheme of each kind, or None where one cannot be written.
_ENCODERS: dict[type[Scheme], Callable[[Any], Encoder | None]] = {FourBit: FourBitEncoder}


def encoder_of(scheme: Scheme) -> Encoder | None:
    """The way back into a scheme; None where it is only read."""
    make = _ENCODERS.get(type(scheme))
    return make(scheme) if make is not None else None

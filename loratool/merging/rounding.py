"""Rounding to the output's dtype."""

from __future__ import annotations

import math

import torch

from loratool.dtypes import FLOAT_FORMATS

TORCH: dict[str, torch.dtype] = {
    code: getattr(torch, form.name) for code, form in FLOAT_FORMATS.items()
}

#: Sums of squares in float32 below this have lost some of their parts.
_SMALLEST_SQUARE = 1e-30


def squared(values: torch.Tensor) -> float:
    """The sum of squares; in float64 where float32 does not hold it."""
    total = float(torch.dot(values, values))
    if _SMALLEST_SQUARE < total < math.inf:
        return total
    wide = values.double()
    return float(torch.dot(wide, wide))


def narrowed(values: torch.Tensor, out: torch.Tensor) -> None:
    """Round `values` once into `out`."""
    if values.dtype == torch.float64 and out.dtype in (torch.float16, torch.bfloat16):
        values = _rounded_to_odd(values)
    out.copy_(values)


def _rounded_to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 as float32 such that rounding that to 16 bits equals rounding the float64 once.

    torch narrows float64 to 16 bits by way of float32 and so rounds twice. Truncating the first
    time, with the last bit set where anything was cut off, keeps the second from seeing a false tie
    (Boldo and Melquiond, 2008, "Emulation of FMA and correctly rounded sums").
    """
    narrow = values.float()
    bits = narrow.view(torch.int32)
    bits -= (narrow.double().abs() > values.abs()).int()
    bits |= (narrow.double() != values).int()
    return narrow


def ulp(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at these float32 or float64 values."""
    form = FLOAT_FORMATS[dtype]
    own = FLOAT_FORMATS["F64" if values.dtype == torch.float64 else "F32"]
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    # With the fraction's bits cut off, what is left is a power of two, infinity, or zero.
    power = (values.abs().view(integer) >> own.fraction << own.fraction).view(values.dtype)
    return power.clamp_(min=math.ldexp(1.0, max(form.smallest, own.smallest))).mul_(
        math.ldexp(1.0, -form.fraction)
    )  # fmt: skip

"""Rounding to the output's dtype, and what that does to values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loratool.dtypes import FLOAT_FORMATS
from loratool.merging.counts import Counts
from loratool.storage.tensors import Bytes
from loratool.streams.scratch import scratch

TORCH: dict[str, torch.dtype] = {
    code: getattr(torch, form.name) for code, form in FLOAT_FORMATS.items()
}

#: The unsigned integers that the bits of each format are.
_UNSIGNED = {code: np.dtype(f"uint{form.bits}").type for code, form in FLOAT_FORMATS.items()}


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


def magnitudes_of(data: Bytes, dtype: str) -> tuple[npt.NDArray[Any], bool]:
    """The bits of |x|, and whether any is infinite or NaN."""
    kind, form = _UNSIGNED[dtype], FLOAT_FORMATS[dtype]
    values = data.view(kind)
    bits = scratch.get("bits", len(data), torch.uint8).numpy().view(kind)
    np.bitwise_and(values, kind(form.magnitude_mask), out=bits)
    return bits, bool(bits.size) and int(bits.max()) >= form.infinity_bits


def count_underflow(
    magnitudes: npt.NDArray[Any],
    values: torch.Tensor,
    raw: Bytes | None,
    dtype: str,
    counts: Counts,
) -> None:
    """Count values that became subnormal, and nonzero sums that rounding made zero.

    `raw` holds the source's bytes where it has the output's dtype: what was subnormal there did not
    become so here.
    """
    kind, form = _UNSIGNED[dtype], FLOAT_FORMATS[dtype]
    smallest_normal = form.normal_bits
    flags = scratch.get("flags", magnitudes.size, torch.bool).numpy()
    tiny = int(np.count_nonzero(np.less(magnitudes, smallest_normal, out=flags)))
    if not tiny:
        return
    zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
    if zeros:
        counts.zeroed += zeros - int(np.count_nonzero(np.equal(values.numpy(), 0, out=flags)))
    counts.subnormal += tiny - zeros
    if raw is not None:
        before = raw.view(kind) & kind(form.magnitude_mask)
        kept = (before > 0) & (before < smallest_normal)
        counts.subnormal -= int(
            np.count_nonzero(kept & (magnitudes > 0) & (magnitudes < smallest_normal))
        )


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

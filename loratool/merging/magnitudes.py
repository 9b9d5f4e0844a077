"""What rounding made of values, read from their bits: infinities, zeros and subnormal numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.dtypes import FLOAT_FORMATS
from loratool.merging.counts import Counts
from loratool.storage.tensors import Bytes
from loratool.streams.scratch import scratch

#: The unsigned integers that the bits of each format are.
_UNSIGNED = {code: np.dtype(f"uint{form.bits}").type for code, form in FLOAT_FORMATS.items()}


def magnitudes_of(data: Bytes, dtype: str) -> tuple[npt.NDArray[Any], bool]:
    """The bits of |x|, and whether any is infinite or NaN. They lie in this thread's scratch."""
    kind, form = _UNSIGNED[dtype], FLOAT_FORMATS[dtype]
    values = data.view(kind)
    bits = scratch.array("bits", len(values), kind)
    np.bitwise_and(values, kind(form.magnitude_mask), out=bits)
    return bits, bool(bits.size) and int(bits.max()) >= form.infinity_bits


def zeros_in(values: npt.NDArray[Any]) -> int:
    """How many of these numbers are zero."""
    flags = scratch.array("flags", values.size, np.bool_)
    return int(np.count_nonzero(np.equal(values, 0, out=flags)))


def count_underflow(
    magnitudes: npt.NDArray[Any],
    zeros_before: Callable[[], int],
    raw: Bytes | None,
    dtype: str,
    counts: Counts,
) -> None:
    """Count values that became subnormal, and nonzero sums that rounding made zero.

    `zeros_before` counts the values that were zero before they were rounded. `raw` holds the
    source's bytes where it has the output's dtype: what was subnormal there did not become so here.
    """
    kind, form = _UNSIGNED[dtype], FLOAT_FORMATS[dtype]
    smallest_normal = form.normal_bits
    flags = scratch.array("flags", magnitudes.size, np.bool_)
    tiny = int(np.count_nonzero(np.less(magnitudes, smallest_normal, out=flags)))
    if not tiny:
        return
    zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
    if zeros:
        counts.zeroed += zeros - zeros_before()
    counts.subnormal += tiny - zeros
    if raw is not None:
        before = raw.view(kind) & kind(form.magnitude_mask)
        kept = (before > 0) & (before < smallest_normal)
        counts.subnormal -= int(
            np.count_nonzero(kept & (magnitudes > 0) & (magnitudes < smallest_normal))
        )

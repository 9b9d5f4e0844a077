"""How much of a base's range an output dtype loses, estimated before a merge from a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.dtypes import FLOAT_FORMATS
from loratool.merging.plan import Plan
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import values_of

#: Elements that are read at the beginning, in the middle and at the end of a tensor.
_ELEMENTS = 4096


@dataclass(frozen=True)
class RangeLoss:
    """Shares of the values: `subnormal` lose digits, `zeroed` become zero, `overflowing` would stop
    the merge. `sampled` values were looked at."""

    subnormal: float
    zeroed: float
    overflowing: float
    sampled: int


def sample_range_loss(plan: Plan) -> RangeLoss | None:
    """What rounding the base to float16 would lose; None where its range is no smaller than that of
    the base, or the base is not on this disk."""
    form = FLOAT_FORMATS["F16"]
    normal = 2.0**form.smallest
    least = normal * 2.0**-form.fraction
    jobs = [
        job.source
        for job in plan.jobs
        if job.dtype == "F16" and job.source.is_float and job.source.dtype != "F16"
    ]
    if not jobs or not all(file.is_file() for info in jobs for file in info.files):
        return None
    total = subnormal = zeroed = over = 0.0
    seen = 0
    with FilePool() as files:
        for info in jobs:
            values = np.abs(_sample(info, files))
            size = values.size
            if not size:
                continue
            weight = info.numel / size
            seen += size
            total += info.numel
            nonzero = values > 0
            gone = nonzero & (values <= least / 2)
            zeroed += weight * int(np.count_nonzero(gone))
            tiny = nonzero & (values < normal) & ~gone
            subnormal += weight * int(np.count_nonzero(tiny))
            over += weight * int(np.count_nonzero(values >= form.overflow))
    return RangeLoss(subnormal / total, zeroed / total, over / total, seen) if total else None


def _sample(info: TensorInfo, files: FilePool) -> npt.NDArray[np.float32]:
    values = values_of(info, files)
    size = min(values.length, _ELEMENTS)
    if values.length < 3 * size:  # the three would overlap
        return values.floats(0, values.length)
    starts = (0, (values.length - size) // 2, values.length - size)
    return np.concatenate([values.floats(start, start + size) for start in starts])

"""Tensors that are computed from others as a whole when they are read: products, sums, expansions.

What is computed is small (factors), or asks for its parts block by block itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.dtypes import FLOAT_FORMATS
from loratool.errors import ValueRangeError
from loratool.storage.composed import Composed
from loratool.storage.tensors import Bytes, FilePool, TensorInfo, as_bytes
from loratool.storage.values import Values, read_float32, read_raw, values_of

Array = npt.NDArray[np.floating[Any]]
#: Makes the values of a tensor from those of its parts, in their shapes.
Formula = Callable[..., Array]


@dataclass(frozen=True)
class _Computed(Composed):
    """What `formula` makes of the parts, rounded to `dtype` once."""

    formula: Formula = field(default=np.asarray, compare=False, repr=False)


class _ComputedValues(Values):
    """Computed when the first of them is asked for, and kept."""

    def __init__(self, info: _Computed, files: FilePool) -> None:
        super().__init__(info)
        self._parts, self._formula, self._files = info.parts, info.formula, files
        self._lock = threading.Lock()
        self._raw: Bytes | None = None

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        with self._lock:
            if self._raw is None:
                result = self._formula(*(read_wide(part, self._files) for part in self._parts))
                if result.size != self.info.numel:
                    raise ValueError(f"{self.info.name}: {result.shape} for {self.info.shape}")
                _refuse_overflow(self.info, result)
                self._raw = as_bytes(result, self.info.dtype)
        size = self.info.itemsize
        raw[:] = self._raw[low * size : high * size]


def _refuse_overflow(info: TensorInfo, result: Array) -> None:
    """Raise ValueRangeError for a finite value that the dtype would make infinite."""
    form = FLOAT_FORMATS[info.dtype]
    largest = float(np.abs(result).max(initial=0.0, where=np.isfinite(result)))
    if largest >= form.overflow:
        raise ValueRangeError(
            f"{info.name} has values up to {largest:.3g}, too large for {form.name}.",
            "Write it in a wider dtype: --dtype float32.",
        )


def read_wide(info: TensorInfo, files: FilePool) -> Array:
    """A whole tensor in float32, or as it is where it is float64 or no floats."""
    kinds = {"F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}
    if info.dtype in kinds:
        return read_raw(info, files).view(kinds[info.dtype]).reshape(info.shape)
    return read_float32(info, files)


def computed_tensor(
    name: str,
    shape: Sequence[int],
    parts: Sequence[TensorInfo],
    formula: Formula,
    dtype: str = "F32",
) -> TensorInfo:
    """The tensor that `formula` makes of the values of `parts`, which it is given as arrays in
    their shapes: float32, and float64 of float64 ones. The result is rounded to `dtype`.

    Two such tensors are equal if their names, shapes and parts are: a name must say what is done.
    """
    first = parts[0]
    if dtype not in FLOAT_FORMATS:
        raise ValueError(f"{name}: {dtype} is no floating dtype")
    return _Computed(
        name, dtype, tuple(shape), first.file, first.start, stamp=first.stamp,
        parts=tuple(parts), formula=formula,
    )  # fmt: skip


@values_of.register
def _(info: _Computed, files: FilePool) -> Values:
    return _ComputedValues(info, files)

"""A factor that is computed of the weight that it is for: A·W of multiplicative LoRA."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.adapters.factors import Factors
from loratool.storage.composed import Composed
from loratool.storage.tensors import Bytes, FilePool, as_bytes, block_elements, blocks
from loratool.storage.values import Values, read_float32, values_of


@dataclass(frozen=True)
class TimesWeight(Composed):
    """A·W `[r, in]` of its parts A `[r, out]` and W, `[out, in]` or, if `turned`, `[in, out]`."""

    turned: bool = False


class _Product(Values):
    """Summed in float64 over blocks of W's rows, when the first element is asked for, and kept."""

    def __init__(self, info: TimesWeight, files: FilePool) -> None:
        super().__init__(info)
        self._turned, self._parts, self._files = info.turned, info.parts, files
        self._lock = threading.Lock()
        self._raw: Bytes | None = None

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        with self._lock:
            if self._raw is None:
                self._raw = as_bytes(self._product(), self.info.dtype)
        size = self.info.itemsize
        raw[:] = self._raw[low * size : high * size]

    def _product(self) -> npt.NDArray[np.float64]:
        a = read_float32(self._parts[0], self._files).astype(np.float64)
        weight = values_of(self._parts[1], self._files)
        columns = weight.info.shape[1]
        found: npt.NDArray[np.float64] = np.zeros(self.info.shape)
        for low, high in blocks(weight.length, block_elements(columns)):
            rows = weight.floats(low, high).reshape(-1, columns).astype(np.float64)
            own = slice(low // columns, high // columns)
            if self._turned:
                found[:, own] = a @ rows.T
            else:
                found += a[:, own] @ rows
        return found


@values_of.register
def _(info: TimesWeight, files: FilePool) -> Values:
    return _Product(info, files)


def is_of_weight(factors: Iterable[Factors]) -> bool:
    """Whether some of these factors are of one weight, and so no change of another one."""
    return any(isinstance(part, TimesWeight) for one in factors for part in one.parts.values())

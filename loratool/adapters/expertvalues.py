"""The values of a factor that holds many experts, expert by expert.

Where an expert's values lie together they are read when they are asked for. Elsewhere, as in PEFT's
B, each expert's are all over the tensor: it is read once, sorted by expert, and kept while other
experts of it are asked for.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from loratool.adapters.told import Packing
from loratool.storage.tensors import FilePool, TensorInfo, as_float32, block_elements, blocks
from loratool.storage.values import values_of

#: Bytes of sorted factors that are kept: both stacks of a layer, at the size of the largest models
#: in float32 (47 MB), for two threads; or those of several smaller adapters.
_KEPT = 192_000_000

#: Matrices of several experts, `[n, rows, columns]`.
Matrices = npt.NDArray[np.float32]

#: The stored values of a factor sorted by expert, `[E, rows, columns]`, in their own precision.
_Sorted = npt.NDArray[Any]


def of_experts(
    info: TensorInfo,
    experts: int,
    of_one: tuple[int, int],
    packing: Packing,
    shared: bool,
    low: int,
    high: int,
    files: FilePool,
) -> Matrices:
    """The factors of experts `[low, high)`, each of the shape `of_one`, in float32."""
    size = math.prod(of_one)
    if shared:
        values = values_of(info, files).floats(0, size).reshape(1, *of_one)
        return np.broadcast_to(values, (high - low, *of_one))
    if packing == "stacked" and info.strides is None:
        return values_of(info, files).floats(low * size, high * size).reshape(-1, *of_one)
    chosen = _kept_of(files).get(info, (experts, *of_one), packing, files)[low:high]
    return as_float32(chosen.reshape(-1).view(np.uint8), info.dtype).reshape(chosen.shape)


class _Entry:
    """One factor, sorted when it is asked for first; who comes meanwhile waits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: _Sorted | None = None


class _Kept:
    """Factors sorted by expert, the latest ones that were asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[TensorInfo, _Entry] = OrderedDict()

    def get(
        self, info: TensorInfo, shape: tuple[int, int, int], packing: Packing, files: FilePool
    ) -> _Sorted:
        with self._lock:
            entry = self._entries.setdefault(info, _Entry())
            self._entries.move_to_end(info)
            while len(self._entries) > 1 and sum(t.nbytes for t in self._entries) > _KEPT:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.values is None:
                entry.values = _sorted(info, shape, packing, files)
            return entry.values


#: What is kept of the files of a pool, as long as there is the pool.
_KEPT_OF: WeakKeyDictionary[FilePool, _Kept] = WeakKeyDictionary()
_KEPT_LOCK = threading.Lock()


def _kept_of(files: FilePool) -> _Kept:
    with _KEPT_LOCK:
        return _KEPT_OF.setdefault(files, _Kept())


def _sorted(
    info: TensorInfo, shape: tuple[int, int, int], packing: Packing, files: FilePool
) -> _Sorted:
    """The values of a factor as `[E, rows, columns]`, read in blocks."""
    experts, _, columns = shape
    values = values_of(info, files)
    bits = np.dtype(f"u{info.itemsize}")
    if packing == "stacked":
        return values.bytes(0, values.length).view(bits).reshape(shape)
    result = np.empty(shape, bits)
    row = columns * experts
    for low, high in blocks(info.numel, block_elements(row)):
        part = values.bytes(low, high).view(bits)
        here = result[:, low // row : high // row]
        if packing == "grouped":
            here[:] = part.reshape(-1, experts, columns).transpose(1, 0, 2)
        else:
            here[:] = part.reshape(-1, columns, experts).transpose(2, 0, 1)
    return result

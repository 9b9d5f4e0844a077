"""Buffers of a thread, kept from block to block."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


class _Scratch(threading.local):
    """Buffers of one thread, kept from block to block: fresh memory costs more than the sums.

    Views are kept too, because making one holds the interpreter's lock, which the threads share.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        self._arrays: dict[str, npt.NDArray[np.uint8]] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor of `count` elements with arbitrary content."""
        view = self._views.get((name, count, dtype))
        if view is None:
            import torch

            size = count * dtype.itemsize
            if name not in self._kept or self._kept[name].numel() < size:
                self._kept[name] = torch.empty(size, dtype=torch.uint8)
                self._views = {key: v for key, v in self._views.items() if key[0] != name}
            view = self._kept[name][:size].view(dtype)
            self._views[name, count, dtype] = view
        return view

    def array(self, name: str, count: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
        """The same for NumPy, which needs no torch; the names are others' than those of `get`."""
        size = count * np.dtype(dtype).itemsize
        kept = self._arrays.get(name)
        if kept is None or len(kept) < size:
            kept = self._arrays[name] = np.empty(size, np.uint8)
        return kept[:size].view(dtype)


scratch = _Scratch()

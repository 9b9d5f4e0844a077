"""Buffers of a thread, kept from block to block."""

from __future__ import annotations

import threading

import torch


class _Scratch(threading.local):
    """Buffers of one thread, kept from block to block: fresh memory costs more than the sums.

    Views are kept too, because making one holds the interpreter's lock, which the threads share.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor of `count` elements with arbitrary content."""
        view = self._views.get((name, count, dtype))
        if view is None:
            size = count * dtype.itemsize
            if name not in self._kept or self._kept[name].numel() < size:
                self._kept[name] = torch.empty(size, dtype=torch.uint8)
                self._views = {key: v for key, v in self._views.items() if key[0] != name}
            view = self._kept[name][:size].view(dtype)
            self._views[name, count, dtype] = view
        return view


scratch = _Scratch()

"""Adapters with NaN or infinity are refused before anything is written."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.errors import ValueRangeError, listed
from loratool.storage.tensors import FilePool
from loratool.storage.values import count_not_finite
from loratool.words import counted


def refuse_not_finite(adapter: Adapter) -> None:
    """Raise before anything is written if an adapter holds NaN or infinity."""
    broken = []
    with FilePool() as files:
        for name, info in adapter.tensors.items():
            count = 0 if name in adapter.inert else count_not_finite(info, files)
            if count:
                broken.append(f"{name}: {count} of {info.numel} values")
    if broken:
        raise ValueRangeError(
            f"{adapter.weights}: {counted(len(broken), 'tensor', 'holds')} NaN or infinity:\n"
            + listed(broken),
            "Training diverged or the file is damaged; use an earlier checkpoint.",
        )

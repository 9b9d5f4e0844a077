"""Adapters with NaN or infinity are refused before anything is written."""

from __future__ import annotations

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.errors import ValueRangeError, listed
from loratool.storage.tensors import FilePool, read_float32


def refuse_not_finite(adapter: Adapter) -> None:
    """Raise before anything is written if an adapter holds NaN or infinity."""
    broken = []
    with FilePool() as files:
        for name, info in adapter.tensors.items():
            if info.is_float and name not in adapter.inert:
                count = int((~np.isfinite(read_float32(info, files))).sum())
                if count:
                    broken.append(f"{name}: {count} of {info.numel} values")
    if broken:
        raise ValueRangeError(
            f"{adapter.weights}: {len(broken)} tensors hold NaN or infinity:\n{listed(broken)}",
            "Training diverged or the file is damaged; use an earlier checkpoint.",
        )

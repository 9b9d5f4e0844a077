"""Whether an adapter does anything, and whether two of them are the same."""

from __future__ import annotations

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.storage.tensors import FilePool
from loratool.storage.values import same_values


def same_adapter(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters hold the same; different ones differ in the first block read."""
    return (
        one.config == other.config
        and one.tensors.keys() == other.tensors.keys()
        and all(same_values(info, other.tensors[name]) for name, info in one.tensors.items())
    )


def idle_modules(adapter: Adapter) -> list[str]:
    """Paths of modules that change nothing: the scale is 0, or a factor is zero as before training.

    A module with a magnitude (DoRA) or a bias may change something all the same and is not listed.
    """
    found = []
    with FilePool() as files:
        for path, module in adapter.modules.items():
            if module.magnitude is not None or module.bias is not None or not module.adds:
                continue
            pair = module.left_right(files) if module.scale != 0 else None
            if module.scale == 0 or (pair is not None and not all(map(np.any, pair))):
                found.append(path)
    return found

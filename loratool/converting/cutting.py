"""Modules of a larger rank than a conversion may write, cut to it: the best of that rank.

The SVD of a product comes from its factors (`linalg.lowrank`), so nothing dense is built. What is
cut off is known before anything is written.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.drafting import low_rank
from loratool.adapters.dialects.writing import Asked, Draft, Fate
from loratool.adapters.factors import LowRank
from loratool.linalg.lowrank import decompose
from loratool.storage.computed import Array, computed_tensor
from loratool.storage.tensors import FilePool


def within_rank(adapter: Adapter, asked: Asked) -> tuple[Adapter, list[Fate]]:
    """The adapter with no module above `asked.max_rank`, and what became of those that were.

    Without `asked.allow_lossy` these are refused.
    """
    limit = asked.max_rank
    wide = [m for m in adapter.modules.values() if limit is not None and m.rank > limit]
    if limit is None or not wide:
        return adapter, []
    fates = []
    modules = dict(adapter.modules)
    with FilePool() as files:
        for module in wide:
            path, pair = module.path, low_rank(module)
            if pair is None or not asked.allow_lossy or len(pair.b.shape) > 2:
                why = f"it has rank {module.rank}; --allow-lossy cuts it to {limit}"
                if pair is None or len(pair.b.shape) > 2:
                    why = f"it has rank {module.rank}, and only linear layers can be cut"
                fates.append(Fate(path, "refused", why, module.rank))
                continue
            b, a = pair.left_right(files)
            found = decompose(b, a)
            kept = float(np.sum(found.values[:limit] ** 2))
            lost = math.sqrt(max(0.0, 1 - kept / found.energy)) if found.energy > 0 else 0.0
            modules[path] = _cut(pair, limit)
            fates.append(Fate(path, "cut", "", module.rank, limit, lost))
    return replace(adapter, modules=modules), fates


def _cut(pair: LowRank, rank: int) -> LowRank:
    out, width = pair.shape

    def left(b: Array, a: Array) -> Array:
        return _filled(decompose(b, a.reshape(len(a), -1)).factors(rank)[0], (out, rank))

    def right(b: Array, a: Array) -> Array:
        return _filled(decompose(b, a.reshape(len(a), -1)).factors(rank)[1], (rank, width))

    parts = [pair.b, pair.a]
    name = f"{pair.path} cut to rank {rank}"
    return replace(
        pair,
        a=computed_tensor(f"{name}: A", (rank, width), parts, right, pair.a.dtype),
        b=computed_tensor(f"{name}: B", (out, rank), parts, left, pair.b.dtype),
    )


def _filled(factor: Array, shape: tuple[int, int]) -> Array:
    """A factor with as many rows and columns, the new ones zero."""
    return np.pad(factor, [(0, n - m) for n, m in zip(shape, factor.shape, strict=True)])


def note_cuts(draft: Draft, cuts: list[Fate]) -> None:
    """Say of the modules of a draft that were cut before it was made what that did."""
    by_path = {fate.what: fate for fate in cuts}
    for fate in draft.fates:
        cut = by_path.pop(fate.what, None)
        if cut is not None and fate.outcome != "refused":
            fate.outcome = cut.outcome
            fate.detail = ", ".join(filter(None, [cut.detail, fate.detail]))
            fate.rank, fate.error = cut.rank, cut.error
    draft.fates += by_path.values()

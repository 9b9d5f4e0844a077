"""Pruning and sign election on arrays, as in PEFT 0.21 (`peft/utils/merge_utils.py`).

`x` is an array of any shape, `stack` one per adapter, all of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loratool.linalg.lowrank import Factor


def magnitude_pruned(x: Factor, density: float) -> Factor:
    """The `int(density·numel)` entries of largest magnitude; zero elsewhere."""
    kept = int(density * x.size)
    if kept >= x.size:
        return x
    if kept == 0:
        return np.zeros_like(x)
    sizes = np.abs(x).reshape(-1)
    threshold = np.partition(sizes, x.size - kept)[x.size - kept]
    chosen = sizes > threshold
    # Of those that are exactly at the threshold, the first.
    level = np.flatnonzero(sizes == threshold)
    chosen[level[: kept - int(np.count_nonzero(chosen))]] = True
    return np.asarray(np.where(chosen.reshape(x.shape), x, x.dtype.type(0)))


def randomly_pruned(x: Factor, density: float, random: np.random.Generator) -> Factor:
    """DARE (Yu et al., 2023, arXiv 2311.03099): each entry stays with probability `density`, and
    is then divided by it, which keeps the expected value."""
    if density >= 1:
        return x
    drawn = random.random(x.shape, dtype=np.float32) < density
    return np.asarray(np.where(drawn, x / x.dtype.type(density), x.dtype.type(0)))


def weighted_sum(stack: Sequence[Factor], weights: Sequence[float]) -> Factor:
    total = np.asarray(stack[0] * stack[0].dtype.type(weights[0]))
    for x, weight in zip(stack[1:], weights[1:], strict=True):
        total += x * x.dtype.type(weight)
    return total


def agreed(stack: Sequence[Factor], weights: Sequence[float], how: str) -> Factor:
    """TIES (Yadav et al., 2023, arXiv 2306.01708): elect a sign per entry, average what has it.

    The sign is that of the sum of the entries (`how` "total") or of their signs ("frequency"),
    without the weights; a tie is positive. The result is `Σ wᵢ·xᵢ / n` over the n entries that
    have that sign.
    """
    votes = [x if how == "total" else np.sign(x) for x in stack]
    positive = weighted_sum(votes, [1.0] * len(votes)) >= 0
    total = np.zeros_like(stack[0])
    count = np.zeros(stack[0].shape, np.int32)
    for x, weight in zip(stack, weights, strict=True):
        same = np.where(positive, x > 0, x < 0)
        total += np.where(same, x * x.dtype.type(weight), x.dtype.type(0))
        count += same
    return np.asarray(total / np.maximum(count, 1).astype(total.dtype))

"""Pruning and sign election on arrays, as in PEFT 0.21 (`peft/utils/merge_utils.py`).

`x` is an array of any shape, `stack` one per adapter, all of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loratool.linalg.lowrank import Factor

#: A sum of votes below this share of their sizes is what float32 products leave of a tie.
_TIED = 2.0**-20


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

    The sign is that of the sum of the entries (`how` "total") or of their signs ("frequency"); a
    tie is positive. The sizes of the weights have no vote, as in PEFT. Their signs have: an adapter
    of negative weight votes like the negated one, which PEFT counts as if it were added. The result
    is `Σ wᵢ·xᵢ / n` over the n entries that have that sign.
    """
    sides = _sides(stack, weights)
    positive = weighted_sum(_votes(sides, how), [1.0] * len(sides)) >= 0
    total = np.zeros_like(stack[0])
    count = np.zeros(stack[0].shape, np.int32)
    for x, side, weight in zip(stack, sides, weights, strict=True):
        same = np.where(positive, side > 0, side < 0)
        total += np.where(same, x * x.dtype.type(weight), x.dtype.type(0))
        count += same
    return np.asarray(total / np.maximum(count, 1).astype(total.dtype))


def tied_share(
    result: Factor, stack: Sequence[Factor], weights: Sequence[float], how: str
) -> float:
    """The share of ‖result‖² in entries of `agreed` whose vote is a tie, within rounding."""
    energy = float(np.sum(np.square(result, dtype=np.float64)))
    if len(stack) < 2 or not energy:
        return 0.0
    votes = _votes(_sides(stack, weights), how)
    ones = [1.0] * len(votes)
    size = weighted_sum([np.abs(vote) for vote in votes], ones)
    tied = np.abs(weighted_sum(votes, ones)) <= size * size.dtype.type(_TIED)
    return float(np.sum(np.square(result[tied], dtype=np.float64))) / energy


def _sides(stack: Sequence[Factor], weights: Sequence[float]) -> list[Factor]:
    """The entries as they vote: those of an adapter that is subtracted, negated."""
    return [-x if weight < 0 else x for x, weight in zip(stack, weights, strict=True)]


def _votes(sides: Sequence[Factor], how: str) -> list[Factor]:
    return list(sides) if how == "total" else [np.sign(x) for x in sides]

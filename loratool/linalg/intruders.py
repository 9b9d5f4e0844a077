"""Intruder dimensions: singular vectors of a tuned weight that the base weight does not have.

A left singular vector of `W + ΔW` among the `TOP` largest counts as an intruder if no left singular
vector of `W` comes near it: the largest |cosine| is below `NEAR`. Source: Shuttleworth et al.,
"LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, arXiv 2410.21228.

Everything comes from Gram matrices of the smaller side, in float64; that of the tuned weight is an
update of low rank of the base's.
"""

from __future__ import annotations

import numpy as np

from loratool.linalg.lowrank import Factor, Float64

TOP = 10
NEAR = 0.5

#: Squared singular values below this share of the largest are rounding of the Gram matrix.
_VISIBLE = 1e-12

#: Rows of W that are widened to float64 at a time.
_SLICE = 1024


class BaseDirections:
    """The left singular vectors of `weight [out, in]`, to hold tuned versions of it against."""

    def __init__(self, weight: Factor) -> None:
        self._weight = weight
        self._tall = weight.shape[0] >= weight.shape[1]
        side = weight if self._tall else weight.T  # rows are summed over
        gram = np.zeros((side.shape[1], side.shape[1]))
        for low in range(0, side.shape[0], _SLICE):
            rows = side[low : low + _SLICE].astype(np.float64)
            gram += rows.T @ rows
        self._gram = gram
        self._values, self._vectors = _singular(gram)

    def intruders(self, b: Factor, a: Factor) -> int:
        """How many of the first singular vectors of `weight + b·a` the weight does not have."""
        cosines = self._nearest(b, a)
        return int(np.count_nonzero(cosines < NEAR))

    def _nearest(self, b: Factor, a: Factor) -> Float64:
        """For each of the tuned weight's first left singular vectors the largest |cosine|."""
        b, a = b.astype(np.float64), a.astype(np.float64)
        outer, inner = (b, a) if self._tall else (a.T, b.T)
        across = self._apply(outer).T @ inner  # WᵀΔ, or W·Δᵀ
        gram = self._gram + across + across.T + inner.T @ (outer.T @ outer) @ inner
        values, vectors = _singular(gram)
        first, sizes = vectors[:, :TOP], values[:TOP]
        if not self._values.size:  # the weight is zero: every direction is new
            return np.zeros(sizes.size)
        if not self._tall:  # these are the left singular vectors
            return np.asarray(np.abs(self._vectors.T @ first).max(axis=0))
        # Left vectors are u = W·v/σ, so uᵀu' = vᵀ·(Wᵀ·(W + BA)·v')/(σ·σ').
        product = self._vectors.T @ ((self._gram + across) @ first)
        return np.asarray(np.abs(product / self._values[:, None] / sizes).max(axis=0))

    def _apply(self, outer: Float64) -> Float64:
        """`Wᵀ·outer` (or `W·outer` for a wide W), transposed: `[r, side]`."""
        side = self._weight if self._tall else self._weight.T
        total = np.zeros((outer.shape[1], side.shape[1]))
        for low in range(0, side.shape[0], _SLICE):
            part = slice(low, low + _SLICE)
            total += outer[part].T @ side[part].astype(np.float64)
        return total


def _singular(gram: Float64) -> tuple[Float64, Float64]:
    """Singular values, largest first, that a Gram matrix shows, and their vectors as columns."""
    squares, vectors = np.linalg.eigh(gram)
    kept = squares[::-1] > _VISIBLE * squares[-1]
    return np.sqrt(squares[::-1][kept]), vectors[:, ::-1][:, kept]

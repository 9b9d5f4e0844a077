"""How two products lie to each other: their inner product and the angles between their spaces.

Only r × r matrices are needed: the SVD `Δᵢ = Uᵢ·Σᵢ·Vᵢᵀ` comes as `Uᵢ = Bᵢ·Lᵢ`, so `U₁ᵀU₂ =
L₁ᵀ·(B₁ᵀB₂)·L₂`, whose singular values are the cosines of the principal angles; with `V₁ᵀV₂` alike,
`⟨Δ₁,Δ₂⟩ = Σ σ₁ᵢ·(U₁ᵀU₂)ᵢⱼ·(V₁ᵀV₂)ᵢⱼ·σ₂ⱼ`.
"""

from __future__ import annotations

import numpy as np

from loratool.linalg.lowrank import Decomposition, Float64, crossed


def angles_and_product(one: Decomposition, two: Decomposition) -> tuple[Float64, Float64, float]:
    """Squared cosines of the principal angles of columns and of rows, and the inner product."""
    size_one, size_two = np.sqrt(one.values), np.sqrt(two.values)
    columns = (one.left / size_one).T @ crossed(one.b, two.b) @ (two.left / size_two)
    rows = (one.right.T / size_one).T @ crossed(one.a.T, two.a.T) @ (two.right.T / size_two)
    product = float(one.values @ (columns * rows) @ two.values)
    return _cosines(columns), _cosines(rows), product


def _cosines(between: Float64) -> Float64:
    """Squared singular values of `U₁ᵀU₂`, at most 1."""
    if 0 in between.shape:
        return np.zeros(0)
    return np.asarray(np.minimum(np.linalg.svd(between, compute_uv=False), 1.0) ** 2)


def effective_rank(values: Float64) -> float:
    """e^H of the singular values' shares `σ/Σσ` (Roy and Vetterli, 2007): r if all are equal."""
    shares = values / values.sum() if values.size else values
    return float(np.exp(-np.sum(shares * np.log(shares)))) if values.size else 0.0

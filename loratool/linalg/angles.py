"""How two products lie to each other: their inner product and the angles between their spaces.

`⟨Δ₁,Δ₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ))` needs only r × r matrices, and so do the principal angles: the SVD
`Δᵢ = Uᵢ·Σᵢ·Vᵢᵀ` comes as `Uᵢ = Bᵢ·Lᵢ`, and `U₁ᵀU₂ = L₁ᵀ·(B₁ᵀB₂)·L₂`.
"""

from __future__ import annotations

import numpy as np

from loratool.linalg.lowrank import Decomposition, Float64


def angles_and_product(one: Decomposition, two: Decomposition) -> tuple[Float64, Float64, float]:
    """Squared cosines of the principal angles of columns and of rows, and the inner product."""
    b = one.b.astype(np.float64).T @ two.b.astype(np.float64)
    a = one.a.astype(np.float64) @ two.a.astype(np.float64).T
    columns = _cosines((one.left / np.sqrt(one.values)).T @ b @ (two.left / np.sqrt(two.values)))
    rows = _cosines((one.right.T / np.sqrt(one.values)).T @ a @ (two.right.T / np.sqrt(two.values)))
    return columns, rows, float(np.sum(b * a))


def _cosines(between: Float64) -> Float64:
    """Squared singular values of `U₁ᵀU₂`, at most 1."""
    if 0 in between.shape:
        return np.zeros(0)
    return np.asarray(np.minimum(np.linalg.svd(between, compute_uv=False), 1.0) ** 2)


def effective_rank(values: Float64) -> float:
    """e^H of the singular values' shares `σ/Σσ` (Roy and Vetterli, 2007): r if all are equal."""
    shares = values / values.sum() if values.size else values
    return float(np.exp(-np.sum(shares * np.log(shares)))) if values.size else 0.0

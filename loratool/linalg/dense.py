"""The largest singular values of a matrix that has no low-rank factors.

Only the methods that prune the dense delta need it, one module at a time.
"""

from __future__ import annotations

import numpy as np

from loratool.linalg.lowrank import NEGLIGIBLE, Factor, Float64

#: Singular values below this share of the largest drown in the Gram matrix's rounding.
_VISIBLE = max(NEGLIGIBLE, 1e-7)


def truncated_svd(dense: Factor, rank: int) -> tuple[Float64, Float64, float, Float64]:
    """The best approximation of at most this rank: `(U·√Σ [m, k], √Σ·Vᵀ [k, n], ‖dense‖², σ)`.

    The last are all the singular values, also those that were cut.

    By the eigenvectors of the smaller Gram matrix: its time does not depend on how fast the
    spectrum falls, and pruning leaves flat ones, on which a randomized SVD would need many passes.
    """
    tall = dense.shape[0] >= dense.shape[1]
    matrix = np.asarray(dense if tall else dense.T, np.float64)
    gram = matrix.T @ matrix
    energy = float(np.trace(gram))
    squares, vectors = np.linalg.eigh(gram)
    spectrum = np.sqrt(np.maximum(squares[::-1], 0.0))
    values, vectors = spectrum[:rank], vectors[:, ::-1][:, :rank]
    kept = values > _VISIBLE * float(values[0]) if values.size else np.zeros(0, bool)
    root = np.sqrt(values[kept])
    right = vectors[:, kept]
    left = (matrix @ right) / root
    right = (right * root).T
    return (left, right, energy, spectrum) if tall else (right.T, left.T, energy, spectrum)

"""Norm and singular values of `B·A` from its factors alone.

The squared singular values of `B·A` are the eigenvalues of `A·Aᵀ·BᵀB`, and so of the small
symmetric `Lᵀ·(A·Aᵀ)·L [r, r]` with any L for which `BᵀB = L·Lᵀ`. The Cholesky factor is such an L;
where B is rank-deficient and has none, `V·Λ^½` of the eigendecomposition `BᵀB = V·Λ·Vᵀ` is.

The Gram matrices are summed in float64, so singular values below about 1e-8 of the largest are
noise; half-precision factors carry no more than 1e-4 anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

#: Columns per slice when a Gram matrix is summed: the float64 copy stays in the cache.
_SLICE = 4096


def gram(matrix: npt.NDArray[np.floating[Any]]) -> Float64:
    """`M·Mᵀ [r, r]` in float64 of `M [r, n]`; not finite where M is not."""
    total = np.zeros((matrix.shape[0], matrix.shape[0]))
    for low in range(0, matrix.shape[1], _SLICE):
        part = matrix[:, low : low + _SLICE].astype(np.float64)
        with np.errstate(invalid="ignore"):
            total += part @ part.T
    return total


def singular_values(gram_b: Float64, gram_a: Float64) -> Float64:
    """Singular values of B·A, largest first, `[r]`, from `BᵀB` and `A·Aᵀ`, both `[r, r]`.

    Of several products at once, `[n, r]`, from their matrices `[n, r, r]`.
    """
    try:
        root = np.linalg.cholesky(gram_b)
    except np.linalg.LinAlgError:
        if gram_b.ndim > 2:  # one that has no such factor is no reason to do without for the others
            return np.stack([singular_values(*one) for one in zip(gram_b, gram_a, strict=True)])
        values, vectors = np.linalg.eigh(gram_b)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
    squares = np.linalg.eigvalsh(root.swapaxes(-1, -2) @ gram_a @ root)
    # Rounding can push a zero slightly below zero.
    return np.asarray(np.sqrt(np.maximum(squares[..., ::-1], 0.0)))

"""Norm and singular values of `s·B·A` from its factors alone.

With `B = Q_b·R_b` and `Aᵀ = Q_a·R_a`, the singular values of `B·A` are those of the small core
`R_b·R_aᵀ [r, r]`, because the Q's have orthonormal columns. The R's come from the Gram matrices:
any R with `RᵀR = BᵀB` differs from R_b only by a rotation, which changes no singular value, so
`R_b = Λ^½·Vᵀ` from the eigendecomposition `BᵀB = V·Λ·Vᵀ` does, also when B is rank-deficient.

The Gram matrices are summed in float64, so singular values below about 1e-8 of the largest are
noise; half-precision factors carry no more than 1e-4 anyway.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

#: Columns per slice when a Gram matrix is summed: the float64 copy stays in the cache.
_SLICE = 4096


def gram(matrix: npt.NDArray[np.float32]) -> Float64:
    """`M·Mᵀ [r, r]` in float64 of `M [r, n]`."""
    total = np.zeros((matrix.shape[0], matrix.shape[0]))
    for low in range(0, matrix.shape[1], _SLICE):
        part = matrix[:, low : low + _SLICE].astype(np.float64)
        total += part @ part.T
    return total


def singular_values(gram_b: Float64, gram_a: Float64) -> Float64:
    """Singular values of B·A, largest first, from `BᵀB` and `A·Aᵀ`; batched over leading axes.

    Both inputs are `[..., r, r]`; the result is `[..., r]`.
    """
    core = np.swapaxes(_root(gram_b), -1, -2) @ _root(gram_a)
    return np.asarray(np.linalg.svd(core, compute_uv=False))


def _root(gram_matrix: Float64) -> Float64:
    """`V·Λ^½` with `(V·Λ^½)·(V·Λ^½)ᵀ` = the Gram matrix."""
    values, vectors = np.linalg.eigh(gram_matrix)
    # Rounding can push a zero eigenvalue slightly below zero.
    roots = np.sqrt(np.maximum(values, 0.0))
    return np.asarray(vectors * roots[..., None, :])

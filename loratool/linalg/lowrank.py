"""The SVD of a product `B·A` from its factors alone, and its shortest factors.

With `B = Q_b·R_b` and `Aᵀ = Q_a·R_a` the product is `Q_b·(R_b·R_aᵀ)·Q_aᵀ`, so the SVD
`U·Σ·Vᵀ` of the small core `R_b·R_aᵀ [r, r]` gives its singular values, and its singular vectors
without either Q:

    Q_b·U·√Σ  = B·(R_aᵀ·V·Σ^-½)        √Σ·Vᵀ·Q_aᵀ = (Σ^-½·Uᵀ·R_b)·A

Exact for every rank, and optimal when cut (Eckart and Young, 1936): the error is the energy of the
singular values left out. The `[out, in]` matrix is never built. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Factor = npt.NDArray[Any]

#: Singular values below this share of the largest are less than float32 rounds off it.
NEGLIGIBLE = 2.0**-24

#: What float64 sums leave of a product that is zero, as a share of its factors' norms.
_NOISE = 1e-14

#: Up to this condition number the Cholesky factor of the Gram matrix is as good as Householder's
#: QR, at a tenth of its time.
_WELL_CONDITIONED = 1e4


@dataclass(frozen=True)
class Decomposition:
    """The SVD of `B·A`, as the `[r, k]` and `[k, r]` matrices that make its factors.

    `values [k]` are those singular values that are not negligible, largest first; `energy` is the
    sum of all squares, ‖B·A‖².
    """

    b: Factor
    a: Factor
    values: Float64
    left: Float64
    right: Float64
    energy: float

    def factors(self, rank: int | None = None) -> tuple[Float64, Float64]:
        """`(U·√Σ [out, k], √Σ·Vᵀ [k, in])`, cut to `rank`: balanced, and the best of that rank."""
        left, right = self.left[:, :rank], self.right[:rank]
        return self.b.astype(np.float64) @ left, right @ self.a.astype(np.float64)


def stacked(
    pairs: Sequence[tuple[Factor, Factor]], weights: Sequence[float]
) -> tuple[Factor, Factor]:
    """Factors of `Σ wᵢ·Bᵢ·Aᵢ`, of rank Σrᵢ: the Bᵢ side by side, the wᵢ·Aᵢ one above the other."""
    b = np.concatenate([b for b, _ in pairs], axis=1)
    a = np.concatenate([np.float64(w) * a for (_, a), w in zip(pairs, weights, strict=True)])
    return b, a


def decompose(b: Factor, a: Factor) -> Decomposition:
    """The SVD of `b·a`, `b [out, r]`, `a [r, in]`."""
    # Adapters filled up to a rank have zeros, which would only make the rest look dependent.
    alive = b.any(axis=0) & a.any(axis=1)
    if not alive.all():
        b, a = b[:, alive], a[alive]
    # The columns of b to length one: products of a large and a small factor are common, and the
    # noise of the core is measured by the factors.
    lengths = np.sqrt(np.einsum("ij,ij->j", b, b, dtype=np.float64))
    lengths[lengths == 0] = 1.0
    root_b = triangle(b, lengths)
    root_a = triangle(a.T) * lengths
    left, values, right = np.linalg.svd(root_b @ root_a.T, full_matrices=False)
    noise = _NOISE * float(np.linalg.norm(root_b) * np.linalg.norm(root_a))
    energy = float(np.sum(values[values > noise] ** 2))
    kept = values > max(noise, NEGLIGIBLE * float(values[0]) if values.size else 0.0)
    left, values, right = left[:, kept], values[kept], right[kept]
    scale = 1 / np.sqrt(values)
    return Decomposition(
        b, a, values,
        (root_a.T @ right.T) * scale / lengths[:, None],
        (scale[:, None] * (left.T @ root_b)) * lengths,
        energy,
    )  # fmt: skip


def triangle(tall: Factor, lengths: Float64 | None = None) -> Float64:
    """An `R [≤ r, r]` with `RᵀR = MᵀM`, of M = `tall [n, r]` with its columns over `lengths`."""
    columns = tall.astype(np.float64)
    if lengths is not None:
        columns /= lengths
    gram = columns.T @ columns
    sizes = np.sqrt(np.diagonal(gram))
    if sizes.all() and columns.shape[0] >= columns.shape[1]:
        try:
            root = np.linalg.cholesky(gram / np.outer(sizes, sizes)).T
            if np.linalg.cond(root) <= _WELL_CONDITIONED:
                return np.asarray(root * sizes)
        except np.linalg.LinAlgError:
            pass
    return np.asarray(np.linalg.qr(columns, mode="r"))


def inner(one: tuple[Factor, Factor], other: tuple[Factor, Factor]) -> float:
    """`⟨B₁A₁, B₂A₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ))`, the sum of products over all elements."""
    (b1, a1), (b2, a2) = one, other
    across = b1.astype(np.float64).T @ b2.astype(np.float64)
    return float(np.sum(across * (a1.astype(np.float64) @ a2.astype(np.float64).T)))

"""Exact identities by which structured matrices are products of two factors.

Each function makes one factor, so that the other need not be there. They compute in the dtype that
they are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]


def rows_multiplied(one: Array, other: Array) -> Array:
    """`[n, r]` and `[n, s]` -> `[n, r·s]`: the left factor of a Hadamard product.

    (B₁A₁) ∘ (B₂A₂) = (B₁ • B₂)(A₁ * A₂), with the face-splitting product • of rows and the
    Khatri-Rao product * of columns. Sources: V. Slyusar, "A family of face products of matrices",
    1999; FedPara (Hyeon-Woo, Ye-Bin, Oh, ICLR 2022), proposition 1.
    """
    return (one[:, :, None] * other[:, None, :]).reshape(len(one), -1)


def columns_multiplied(one: Array, other: Array) -> Array:
    """`[r, m]` and `[s, m]` -> `[r·s, m]`: the right factor that goes with `rows_multiplied`."""
    return (one[:, None, :] * other[None, :, :]).reshape(-1, one.shape[1])


def kronecker(one: Array, other: Array) -> Array:
    """`one ⊗ other`, for either factor of a Kronecker product of products.

    (B₁A₁) ⊗ (B₂A₂) = (B₁ ⊗ B₂)(A₁ ⊗ A₂), the mixed-product property; with B₁ = W, A₁ = I or the
    reverse it splits W ⊗ (BA). Source: C. Van Loan, "The ubiquitous Kronecker product", 2000.
    """
    return np.kron(one, other)


def tucker_right(core: Array, right: Array) -> Array:
    """`core [r, s, *kernel]` and `right [s, in]` -> `[r, in·kernel]`, kernels flattened.

    Of a kernel in Tucker-2 form, K[o, i, …] = Σₚ Σᵩ left[p, o]·core[p, q, …]·right[q, i], this is
    the right factor; the left one is `leftᵀ`. Source: Y.-D. Kim et al., "Compression of deep
    convolutional neural networks", ICLR 2016.
    """
    joined = np.tensordot(core, right, axes=([1], [0]))  # [r, *kernel, in]
    return np.moveaxis(joined, -1, 1).reshape(core.shape[0], -1)

"""Rotations from skew-symmetric matrices, exact and as a series, and the order of a butterfly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def skew(upper: Float64, size: int) -> Float64:
    """`[k, size·(size-1)/2]`, what lies above the diagonal row by row -> `[k, size, size]`."""
    rows, columns = np.triu_indices(size, 1)
    matrices: Float64 = np.zeros((len(upper), size, size))
    matrices[:, rows, columns] = upper
    matrices -= matrices.transpose(0, 2, 1).copy()
    return matrices


def projected(matrices: Float64, limit: float) -> Float64:
    """Matrices with a Frobenius norm of at most limit/√k: those that are longer are shortened.

    Source: constrained OFT (Qiu et al., "Controlling text-to-image diffusion by orthogonal
    finetuning", NeurIPS 2023).
    """
    longest = limit / np.sqrt(len(matrices))
    norms = np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    return np.where(norms <= longest, matrices, matrices * (longest / np.maximum(norms, 1e-300)))


def cayley(matrices: Float64) -> Float64:
    """`(I - S)(I + S)⁻¹` of skew-symmetric matrices `[k, n, n]`: rotations."""
    unit = np.eye(matrices.shape[-1])
    # X(I + S) = I - S, transposed: (I - S)·Xᵀ = I + S.
    turns: Float64 = np.linalg.solve(unit - matrices, unit + matrices).transpose(0, 2, 1)
    return turns


def cayley_series(matrices: Float64, terms: int, last_whole: bool) -> Float64:
    """The series I + 2S + 2S² + … that PEFT takes for `(I + S)(I - S)⁻¹`, as it ends it.

    Of three or more terms the last one is counted once, or twice with `last_whole`, as before
    PEFT 0.18. Source: peft/tuners/oft/layer.py (`_cayley_batch`).
    """
    turns = np.eye(matrices.shape[-1]) + np.zeros_like(matrices)
    if terms < 2:
        return turns
    turns += 2 * matrices
    if terms < 3:
        return turns
    power = matrices @ matrices
    turns += 2 * power
    for _ in range(3, terms if last_whole else terms - 1):
        power = power @ matrices
        turns += 2 * power
    return turns if last_whole else turns + power @ matrices


def butterfly_order(length: int, blocks: int, half: int, stages: int) -> npt.NDArray[np.intp]:
    """The order of columns in one stage of a butterfly: in each of `blocks` runs, the pieces of
    `half` columns with even numbers before the others; as they are where there is one stage.

    Source: Liu et al., "Parameter-efficient orthogonal finetuning via butterfly factorization",
    ICLR 2024; peft/tuners/boft/layer.py (`block_butterfly_perm`).
    """
    if stages == 1:
        return np.arange(length)
    pieces = np.arange(length).reshape(blocks, -1, half)
    return np.concatenate([pieces[:, 0::2], pieces[:, 1::2]], axis=1).reshape(-1)

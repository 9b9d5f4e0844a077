"""Orthonormal bases of wide stacks of factors, without their large Q."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loratool.linalg.lowrank import NEGLIGIBLE, Factor, Float64, triangle


@dataclass(frozen=True)
class Basis:
    """Left singular vectors U of `wide [n, r]`: `U = wide·into`, `wide = U·within`.

    `into [r, k]`, `within [k, r]`, `values [k]` the singular values that are not negligible.
    """

    into: Float64
    within: Float64
    values: Float64


def basis(wide: Factor) -> Basis:
    """The basis of the columns of `wide [n, r]`.

    The entry of each vector that is largest in magnitude is positive: a vote among signs that ends
    in a tie must not depend on the sign that LAPACK happened to choose.
    """
    _, values, rows = np.linalg.svd(triangle(wide), full_matrices=False)
    kept = visible(values)
    values, rows = values[kept], rows[kept]
    signs = signs_of(wide @ (rows.T / values))
    return Basis(rows.T * (signs / values), (signs * values)[:, None] * rows, values)


def visible(values: Float64) -> npt.NDArray[np.bool_]:
    return np.asarray(values > NEGLIGIBLE * values.max(initial=0.0))


def signs_of(columns: Float64) -> Float64:
    """The sign of the largest entry of each column."""
    largest = np.abs(columns).argmax(axis=0) if columns.size else np.zeros(0, int)
    return np.asarray(np.sign(np.take_along_axis(columns, largest[None], axis=0)[0]))


def nearest_orthogonal(columns: Float64) -> Float64:
    """The polar factor `X·(XᵀX)^-½ = X·W·S⁻¹·Wᵀ`; a direction that is there twice counts once."""
    _, values, rows = np.linalg.svd(triangle(columns), full_matrices=False)
    kept = visible(values)
    return np.asarray(columns @ (rows[kept].T / values[kept]) @ rows[kept])

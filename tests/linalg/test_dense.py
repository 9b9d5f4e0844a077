"""The truncated SVD of a dense matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.matrices import conditioned

from loratool.linalg.dense import truncated_svd


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_truncated_svd_is_the_best_of_its_rank(shape: tuple[int, int], dtype: Any) -> None:
    """Every rank, also one above the matrix's, gives Eckart and Young's error, balanced."""
    dense = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    wide = dense.astype(np.float64)
    values = np.linalg.svd(wide, compute_uv=False)
    for rank in (1, 3, min(shape), 100):
        left, right, energy, spectrum = truncated_svd(dense, rank)
        kept = min(rank, *shape)
        assert (left.shape, right.shape) == ((shape[0], kept), (kept, shape[1]))
        assert energy == pytest.approx(np.sum(wide**2), rel=1e-13)
        assert np.allclose(spectrum, values, rtol=0, atol=1e-7 * values[0])
        error = np.linalg.norm(wide - left @ right)
        # Squares of singular values are good to ε, relative to the largest.
        optimum = np.linalg.norm(values[rank:])
        assert error == pytest.approx(optimum, rel=1e-10, abs=1e-12 * values[0])
        for gram in (left.T @ left, right @ right.T):
            assert np.allclose(gram, np.diag(values[:kept]), rtol=0, atol=1e-11 * values[0])


def test_truncated_svd_leaves_out_what_drowns() -> None:
    """Singular values far below 1e-7 of the largest are rounding, and get no rank."""
    b, a = conditioned(40, 3, 10, 0), conditioned(30, 3, 10, 1).T
    noise = 1e-10 * np.random.default_rng(2).standard_normal((40, 30))
    left, right, *_ = truncated_svd(b @ a + noise, 20)
    assert left.shape[1] == right.shape[0] == 3
    assert np.abs(left @ right - b @ a).max() < 1e-9


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_truncated_svd_keeps_weak_directions(shape: tuple[int, int]) -> None:
    """Singular values down to 1e-6 of the largest are kept, and the product with them."""
    values = np.array([1.0, 1e-2, 1e-4, 1e-6])
    dense = conditioned(6, 4, 1.0, 0) * values @ conditioned(4, 4, 1.0, 1)
    dense = dense if shape == (6, 4) else dense.T
    left, right, *_ = truncated_svd(dense, 4)
    assert left.shape[1] == 4
    assert np.abs(left @ right - dense).max() <= 1e-14


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_truncated_svd_of_zero_is_empty(shape: tuple[int, int]) -> None:
    """A zero matrix, as pruning may leave, gives no columns and no warning."""
    with np.errstate(all="raise"):
        left, right, energy, spectrum = truncated_svd(np.zeros(shape, np.float32), 3)
    assert (left.shape, right.shape, energy) == ((shape[0], 0), (0, shape[1]), 0.0)
    assert not spectrum.any()

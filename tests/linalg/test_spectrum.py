"""Norms and singular values from factors, against the dense product."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.linalg.spectrum import gram, singular_values


def dense_values(b: np.ndarray, a: np.ndarray, rank: int) -> np.ndarray:
    values = np.linalg.svd(b.astype(np.float64) @ a.astype(np.float64), compute_uv=False)
    return np.pad(values, (0, max(0, rank - len(values))))[:rank]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1),
    st.floats(-6, 6),
)  # fmt: skip
def test_values_equal_the_dense_svd(
    out: int, width: int, rank: int, seed: int, exponent: float
) -> None:
    """Any shape, also a rank above the width, and any magnitude give the dense SVD's values."""
    rng = np.random.default_rng(seed)
    b = (rng.standard_normal((out, rank)) * 10**exponent).astype(np.float32)
    a = rng.standard_normal((rank, width)).astype(np.float32)
    found = singular_values(gram(b.T), gram(a))
    expected = dense_values(b, a, rank)
    # Gram matrices square the condition: absolute accuracy is sqrt(eps) of the largest value.
    assert np.allclose(found, expected, rtol=1e-6, atol=3e-7 * expected[0])


def test_wide_factors_are_summed_in_slices() -> None:
    """A factor wider than one slice gives the Gram matrix of the whole."""
    m = np.random.default_rng(0).standard_normal((3, 10_001)).astype(np.float32)
    assert np.allclose(gram(m), m.astype(np.float64) @ m.T.astype(np.float64), rtol=1e-12)


@pytest.mark.parametrize("zero", ["b", "a", "column"])
def test_rank_deficient_factors_give_zeros_not_nan(zero: str) -> None:
    """A zero factor, or a zero column in it, gives zero singular values."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((20, 4)), rng.standard_normal((4, 30))
    b[:, 1] = 0 if zero == "column" else b[:, 1]
    b, a = b * (zero != "b"), a * (zero != "a")
    values = singular_values(gram(b.T.astype(np.float32)), gram(a.astype(np.float32)))
    assert np.isfinite(values).all()
    assert np.allclose(values[-1], 0, atol=1e-6 * max(1, values[0]))
    assert (values[0] > 0) == (zero == "column")

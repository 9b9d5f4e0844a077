"""SVDs and sums of products from their factors, against dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.matrices import NEGLIGIBLE, SHAPES, conditioned, draw, product
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.linalg.lowrank import Decomposition, crossed, decompose, inner, stacked, triangle


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Factors of each kind of shape, and of each kind of values."""
    if name in SHAPES:
        return draw(*SHAPES[name])
    b, a = draw(30, 20, 6)
    if name == "float16":
        return b.astype(np.float16), a.astype(np.float16)
    if name == "zero-padded":
        b[:, 3:], a[4:] = 0, 0
    elif name == "zeros in both":  # different ones
        b[:, 1], a[4] = 0, 0
    elif name == "duplicated":
        b[:, 3:], a[3:] = b[:, :3], a[:3]
    elif name == "duplicated columns":  # the rows differ
        b[:, 3:] = b[:, :3]
    elif name == "small b, large a":
        b, a = b * np.float32(1e-3), a * np.float32(1e3)
    elif name == "columns far apart":  # one adapter's factors, rebalanced
        b[:, :2] *= np.float32(1e6)
        a[:2] *= np.float32(1e-6)
    elif name == "columns very far apart":
        b[:, :2] *= np.float32(1e15)
        a[:2] *= np.float32(1e-15)
    elif name == "tiny":
        b, a = b * np.float32(1e-18), a * np.float32(1e-18)
    elif name == "huge":
        b, a = b * np.float32(1e18), a * np.float32(1e18)
    return b, a


CASES = [
    *SHAPES, "float16", "zero-padded", "zeros in both", "duplicated", "duplicated columns",
    "small b, large a", "columns far apart", "columns very far apart", "tiny",
    "huge",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decomposition_is_the_dense_svd(name: str) -> None:
    """Singular values, their number, the energy and the product are those of the dense SVD."""
    b, a = inputs(name)
    dense = product(b, a)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a)
    # Of 30-term sums and conditions near 10, 1e-12 is a thousandfold of float64's rounding.
    size = expected[0]
    assert len(found.values) == np.count_nonzero(expected > NEGLIGIBLE * size)
    assert np.allclose(found.values, expected[: len(found.values)], rtol=0, atol=1e-12 * size)
    assert found.energy == pytest.approx(np.sum(dense**2), rel=1e-12, abs=0)
    new_b, new_a = found.factors()
    assert np.abs(new_b @ new_a - dense).max() <= 1e-12 * size


@pytest.mark.parametrize("name", CASES)
def test_factors_are_balanced_and_orthogonal(name: str) -> None:
    """Columns of b and rows of a are orthogonal, with √σ as their lengths."""
    found = decompose(*inputs(name))
    b, a = found.factors()
    wanted = np.diag(found.values)
    # Orthogonality is lost by ε·κ², and κ of these factors is below 100.
    assert np.abs(b.T @ b - wanted).max() <= 1e-11 * found.values[0]
    assert np.abs(a @ a.T - wanted).max() <= 1e-11 * found.values[0]


@pytest.mark.parametrize("name", CASES)
def test_every_cut_is_optimal(name: str) -> None:
    """Cut to rank k, the error is that of Eckart and Young, the singular values left out."""
    b, a = inputs(name)
    dense = product(b, a)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a)
    for rank in range(1, len(found.values) + 2):
        new_b, new_a = found.factors(rank)
        assert new_b.shape[1] == new_a.shape[0] == min(rank, len(found.values))
        error = np.linalg.norm(dense - new_b @ new_a)
        optimum = np.linalg.norm(expected[rank:])
        assert error == pytest.approx(optimum, rel=1e-10, abs=1e-12 * expected[0])


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1),
    st.floats(-6, 6), st.floats(-6, 6), st.booleans(),
)  # fmt: skip
def test_any_shape_and_size(
    out: int, width: int, rank: int, seed: int, size_b: float, size_a: float, sparse: bool
) -> None:
    """Any shape, sizes up to 1e12 apart and dead columns give the dense singular values."""
    b, a = draw(out, width, rank, seed)
    b, a = b * np.float32(10**size_b), a * np.float32(10**size_a)
    if sparse:
        b[:, ::2], a[::3] = 0, 0
    dense = product(b, a)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a)
    assert np.all(np.diff(found.values) <= 0)
    values = np.zeros(max(len(expected), len(found.values)))
    values[: len(found.values)] = found.values
    # A value may lie on the threshold of what is negligible: then it is left out on one side.
    atol = 1e-10 * np.linalg.norm(b) * np.linalg.norm(a)
    assert np.allclose(values[: len(expected)], expected, rtol=0, atol=atol)
    new_b, new_a = found.factors()
    assert np.abs(new_b @ new_a - dense).max() <= atol


@pytest.mark.parametrize("scale", [1.0, -2.5, 1e6, 1e-6, "each"])
def test_scales(scale: Any) -> None:
    """One scale for all ranks, or one for each, of either sign or zero, multiplies the product."""
    b, a = draw(20, 30, 5)
    factor = np.array([1.0, -3.0, 0.0, 1e3, 0.5]) if scale == "each" else scale
    dense = product(b, a, factor)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a, factor)
    new_b, new_a = found.factors()
    assert len(found.values) == (4 if scale == "each" else 5)
    kept = expected[: len(found.values)]
    assert np.allclose(found.values, kept, rtol=0, atol=1e-12 * expected[0])
    assert np.abs(new_b @ new_a - dense).max() <= 1e-12 * expected[0]


@pytest.mark.parametrize("zero", ["b", "a", "both", "scale", "no ranks"])
def test_zero_products_are_empty_without_warnings(zero: str) -> None:
    """A product that is zero has no singular values, factors without columns, and no NaN."""
    b, a = draw(20, 30, 0 if zero == "no ranks" else 4)
    b = b * (zero not in ("b", "both"))
    a = a * (zero not in ("a", "both"))
    with np.errstate(all="raise"):
        found = decompose(b, a, 0.0 if zero == "scale" else 1.0)
        new_b, new_a = found.factors()
    assert found.values.shape == (0,)
    assert found.energy == 0.0
    assert (new_b.shape, new_a.shape) == ((20, 0), (0, 30))


@pytest.mark.parametrize("size", [1.0, 1e6, 1e-12])
def test_exact_cancellation_is_zero(size: float) -> None:
    """Two adapters that cancel leave nothing, not float64's noise."""
    b, a = draw(50, 40, 8)
    b = b * np.float32(size)
    found = decompose(np.concatenate([b, b], 1), np.concatenate([a, -a]))
    assert found.values.shape == (0,)
    assert found.energy == 0.0


def test_what_a_cancellation_leaves_is_kept() -> None:
    """Beside two adapters that cancel, a third a thousand times smaller is found as it is."""
    b, a = draw(50, 40, 4)
    small_b, small_a = draw(50, 40, 3, seed=1)
    small_b = small_b * np.float32(1e-3)
    found = decompose(*stacked([(b, a), (b, -a), (small_b, small_a)]))
    expected = np.linalg.svd(product(small_b, small_a), compute_uv=False)[:3]
    # Rounding is that of the large adapters, a thousand times more here.
    assert np.allclose(found.values, expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("ratio", "kept"), [(2 * NEGLIGIBLE, 2), (NEGLIGIBLE / 2, 1), (1e-7, 2), (1e-8, 1)]
)
def test_negligible_values_count_as_energy_only(ratio: float, kept: int) -> None:
    """Singular values below 2⁻²⁴ of the largest are left out of `values`, but not of `energy`."""
    b, a = np.zeros((5, 2)), np.zeros((2, 6))
    b[0, 0] = b[1, 1] = a[0, 0] = 1.0
    a[1, 3] = ratio
    found = decompose(b, a)
    assert np.allclose(found.values, [1.0, ratio][:kept], rtol=1e-14)
    assert found.energy == pytest.approx(1 + ratio**2, rel=1e-15)


def test_many_negligible_values_add_up() -> None:
    """The energy is of all that is no noise: 200 values of 2⁻²⁵ make 200·2⁻⁵⁰ more."""
    b, a = np.eye(201), np.diag([1.0, *[2.0**-25] * 200])
    found = decompose(b, a)
    assert len(found.values) == 1
    assert found.energy - 1 == pytest.approx(200 * 2.0**-50, rel=1e-2, abs=0)


@pytest.mark.parametrize("condition", [1e1, 1e3, 5e3, 1e5, 1e7, 1e10])
@pytest.mark.parametrize("which", ["b", "a", "both"])
def test_ill_conditioned_factors(
    condition: float, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Cholesky or by QR, what is lost of the product is what is negligible in it."""
    calls: list[str] = []
    qr = np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda *args, **kw: calls.append("qr") or qr(*args, **kw))
    rng = np.random.default_rng(3)
    b, a = conditioned(60, 6, condition, 1), conditioned(50, 6, condition, 2).T
    b = b if which in ("b", "both") else rng.standard_normal((60, 6))
    a = a if which in ("a", "both") else rng.standard_normal((6, 50))
    calls.clear()
    found = decompose(b, a)
    assert bool(calls) == (condition > 1e4)
    assert len(calls) == (0 if condition < 1e4 else 2 if which == "both" else 1)
    dense = product(b, a)
    norm = float(np.linalg.norm(dense))
    expected = np.linalg.svd(dense, compute_uv=False)
    dropped = expected[expected <= NEGLIGIBLE * expected[0]]
    assert len(found.values) == len(expected) - len(dropped)
    new_b, new_a = found.factors()
    error = float(np.linalg.norm(new_b @ new_a - dense))
    assert error <= np.linalg.norm(dropped) + 1e-12 * norm
    kept = expected[: len(found.values)]
    assert np.allclose(found.values, kept, rtol=0, atol=1e-12 * norm)


@pytest.mark.parametrize("shape", [(40, 5), (5, 5), (4, 9), (1, 3), (2500, 3), (6, 0), (0, 4)])
@pytest.mark.parametrize("kind", ["random", "ill", "repeated", "zero columns", "zero"])
def test_triangle_has_the_gram_matrix(shape: tuple[int, int], kind: str) -> None:
    """RᵀR = MᵀM for any M, and R has no more rows than M has columns."""
    m = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if kind == "ill" and shape[1] > 1:
        m[:, 1] = m[:, 0] * np.float32(1 + 1e-6)
    elif kind == "repeated":
        m[:, 1:] = m[:, :1]
    elif kind == "zero columns":
        m[:, ::2] = 0
    elif kind == "zero":
        m[:] = 0
    root = triangle(m)
    wide = m.astype(np.float64)
    assert root.shape[1] == shape[1]
    assert root.shape[0] <= shape[1]
    gram = wide.T @ wide
    assert np.allclose(root.T @ root, gram, rtol=1e-12, atol=1e-13 * np.abs(gram).max(initial=0))


def test_stacked_factors_are_the_sum() -> None:
    """Side by side and above each other, in order, factors of the sum of the products."""
    pairs = [draw(9, 7, r, seed=r) for r in (1, 4, 2)]
    b, a = stacked(pairs)
    assert np.array_equal(b[:, 1:5], pairs[1][0])
    assert np.array_equal(a[1:5], pairs[1][1])
    wanted = sum(product(*p) for p in pairs)
    assert np.allclose(product(b, a), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SHAPES)
def test_inner_product_is_the_dense_one(name: str) -> None:
    """⟨B₁A₁, B₂A₂⟩ is the sum of products over the dense matrices, ranks unequal."""
    out, width, rank = SHAPES[name]
    one, two = draw(out, width, rank), draw(out, width, rank + 3, seed=1)
    wanted = float(np.sum(product(*one) * product(*two)))
    size = float(np.linalg.norm(product(*one)) * np.linalg.norm(product(*two)))
    assert inner(one, two) == pytest.approx(wanted, abs=1e-13 * size)
    assert inner(two, one) == pytest.approx(wanted, abs=1e-13 * size)
    between = one[0].astype(np.float64).T @ two[0].astype(np.float64)
    found = crossed(one[0], two[0])
    assert np.allclose(found, between, rtol=1e-12, atol=1e-13 * np.abs(between).max())


def test_a_decomposition_keeps_its_factors_untouched() -> None:
    """Inputs are not written to, neither by the SVD nor by taking factors."""
    b, a = draw(20, 30, 4)
    copies = b.copy(), a.copy()
    found = decompose(b, a, 3.0)
    assert isinstance(found, Decomposition)
    found.factors(2)
    assert np.array_equal(b, copies[0])
    assert np.array_equal(a, copies[1])

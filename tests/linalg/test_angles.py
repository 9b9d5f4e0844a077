"""Angles between the spaces of products, and effective ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.matrices import NEGLIGIBLE, SHAPES, conditioned, draw, product
from hypothesis import given
from hypothesis import strategies as st

from loratool.linalg.angles import angles_and_product, effective_rank
from loratool.linalg.lowrank import decompose


def orthonormal(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    kept = s > NEGLIGIBLE * s[0]
    return u[:, kept], vt[kept].T


def same(found: np.ndarray, wanted: np.ndarray, atol: float = 1e-11) -> bool:
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SHAPES)
def test_angles_are_those_of_the_dense_matrices(name: str) -> None:
    """cos² of the principal angles of columns and rows, and the inner product, ranks unequal."""
    out, width, rank = SHAPES[name]
    one, two = draw(out, width, rank), draw(out, width, rank + 2, seed=1)
    columns, rows, found = angles_and_product(decompose(*one, 2.0), decompose(*two, -0.5))
    dense_one, dense_two = 2.0 * product(*one), -0.5 * product(*two)
    (u1, v1), (u2, v2) = orthonormal(dense_one), orthonormal(dense_two)
    # Bases are good to ε·κ², and κ of these factors is below 100.
    assert same(columns, np.linalg.svd(u1.T @ u2, compute_uv=False) ** 2)
    assert same(rows, np.linalg.svd(v1.T @ v2, compute_uv=False) ** 2)
    size = float(np.linalg.norm(dense_one) * np.linalg.norm(dense_two))
    assert found == pytest.approx(float(np.sum(dense_one * dense_two)), abs=1e-13 * size)


def test_known_angles() -> None:
    """Vectors 60° apart have cos² = ¼, equal ones 1 and orthogonal ones 0."""
    b = np.array([[1.0], [0.0], [0.0]])
    turned = np.array([[0.5], [math.sqrt(0.75)], [0.0]])
    row = np.array([[3.0, 0.0]])
    columns, rows, found = angles_and_product(decompose(b, row), decompose(2 * turned, row))
    assert columns == pytest.approx([0.25], abs=1e-15)
    assert rows == pytest.approx([1.0], abs=1e-15)
    assert found == pytest.approx(9.0, rel=1e-14)
    columns, rows, found = angles_and_product(
        decompose(b, row), decompose(np.array([[0.0], [0.0], [1.0]]), row)
    )
    assert (columns[0], rows[0], found) == (0.0, pytest.approx(1.0), 0.0)


def test_equal_spaces_have_no_angle() -> None:
    """The cosines of a product with itself are 1, never above, and its product is the energy."""
    found = decompose(*draw(30, 20, 6))
    columns, rows, squared = angles_and_product(found, found)
    for cosines in (columns, rows):
        assert same(cosines, np.ones(6))
        assert cosines.max() <= 1.0
    assert squared == pytest.approx(found.energy, rel=1e-12)


def test_partly_shared_space() -> None:
    """Of two spaces that share two directions and nothing else, two cosines are 1, the rest 0."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))[0]
    a1, a2 = draw(1, 20, 4, 1)[1], draw(1, 20, 5, 2)[1]
    columns, _, _ = angles_and_product(decompose(q[:, :4], a1), decompose(q[:, 2:7], a2))
    assert same(columns, np.array([1.0, 1.0, 0.0, 0.0]))


def test_angles_do_not_depend_on_the_factors() -> None:
    """B·G and G⁻¹·A give what B and A do, with a G of condition 1000."""
    one, two = draw(30, 20, 5, dtype=np.float64), draw(30, 20, 4, 1, np.float64)
    g = conditioned(5, 5, 1000, 3)
    again = one[0] @ g, np.linalg.solve(g, one[1])
    plain = angles_and_product(decompose(*one), decompose(*two))
    other = angles_and_product(decompose(*again), decompose(*two))
    # ε·κ² of the factors; κ² = 1e6.
    assert same(other[0], plain[0], 1e-9)
    assert same(other[1], plain[1], 1e-9)
    size = float(np.linalg.norm(product(*one)) * np.linalg.norm(product(*two)))
    assert other[2] == pytest.approx(plain[2], abs=1e-9 * size)


def test_angles_with_a_zero_product() -> None:
    """A zero delta has no directions, so no angles, and the inner product is 0."""
    zero = decompose(np.zeros((9, 2)), np.zeros((2, 7)))
    other = decompose(*draw(9, 7, 3))
    for pair in ((zero, other), (other, zero), (zero, zero)):
        columns, rows, found = angles_and_product(*pair)
        assert (columns.shape, rows.shape, found) == ((0,), (0,), 0.0)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_effective_rank_is_the_exponential_of_the_entropy(values: list[float]) -> None:
    """e^H of the shares, summed one by one; between 1 and the number of values."""
    total = math.fsum(values)
    entropy = -math.fsum(v / total * math.log(v / total) for v in values)
    found = effective_rank(np.array(values))
    assert found == pytest.approx(math.exp(entropy), rel=1e-12)
    assert 1 - 1e-12 <= found <= len(values) * (1 + 1e-12)


def test_effective_rank_of_equal_values_and_of_none() -> None:
    """r equal values have effective rank r, none have 0."""
    assert effective_rank(np.full(7, 0.3)) == pytest.approx(7, rel=1e-14)
    assert effective_rank(np.zeros(0)) == 0.0

"""Identities of structured matrices, against the matrices themselves, in float64."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.linalg.identities import (
    columns_multiplied,
    kronecker,
    rows_multiplied,
    tucker_right,
)
from loratool.linalg.reproducible import reproducible_product
from loratool.linalg.rotations import butterfly_order, cayley, cayley_series, projected, skew

SIZE = st.integers(1, 6)
SEED = st.integers(0, 2**32 - 1)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to 1e-12 of the largest element."""
    assert one.shape == other.shape
    return bool(np.abs(one - other).max() <= 1e-12 * max(1.0, np.abs(other).max()))


@settings(max_examples=40, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE, SEED)
def test_a_hadamard_product_of_products_is_one_product(
    out: int, width: int, r: int, s: int, seed: int
) -> None:
    b1, a1, b2, a2 = draw(seed, (out, r), (r, width), (out, s), (s, width))
    found = rows_multiplied(b1, b2) @ columns_multiplied(a1, a2)
    assert same(found, (b1 @ a1) * (b2 @ a2))


@settings(max_examples=40, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE, SIZE, SEED)
def test_a_kronecker_product_of_products_is_one_product(
    rows: int, columns: int, out: int, width: int, r: int, seed: int
) -> None:
    w, b, a = draw(seed, (rows, columns), (out, r), (r, width))
    whole = np.kron(w, b @ a)
    assert same(kronecker(w, b) @ kronecker(np.eye(columns), a), whole)
    assert same(kronecker(np.eye(rows), b) @ kronecker(w, a), whole)


@settings(max_examples=40, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE, st.lists(st.integers(1, 3), min_size=1, max_size=3), SEED)
def test_a_tucker_kernel_is_a_product(
    out: int, width: int, r: int, s: int, kernel: list[int], seed: int
) -> None:
    core, left, right = draw(seed, (r, s, *kernel), (r, out), (s, width))
    flat = core.reshape(r, s, -1)
    whole = np.einsum("rsk,ro,si->oik", flat, left, right).reshape(out, -1)
    assert same(left.T @ tucker_right(core, right), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), SEED)
def test_a_reproducible_product_has_the_same_bits_in_any_part(rank: int, seed: int) -> None:
    """Which rows and columns are asked for together changes no element, and all are right."""
    b, a = draw(seed, (9, rank), (rank, 7))
    whole = reproducible_product(b, a)
    assert same(whole, b @ a)
    part = reproducible_product(b[3:5], a[:, 2:6])
    assert part.tobytes() == np.ascontiguousarray(whole[3:5, 2:6]).tobytes()
    backwards = reproducible_product(b[:, ::-1], a[::-1])
    assert np.array_equal(backwards, whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), SEED)
def test_cayley_makes_rotations(size: int, count: int, seed: int) -> None:
    """R·Rᵀ = 1, det R = 1, and a long series gives the inverse's transpose: the other sign."""
    (upper,) = draw(seed, (count, size * (size - 1) // 2))
    matrices = skew(upper * 0.1, size)
    turns = cayley(matrices)
    unit = np.broadcast_to(np.eye(size), turns.shape)
    assert same(turns @ turns.transpose(0, 2, 1), unit)
    assert np.allclose(np.linalg.det(turns), 1)
    assert same(turns @ (unit + matrices), unit - matrices)
    short = projected(matrices, 0.3)
    assert same(cayley_series(short, 60, False), cayley(short).transpose(0, 2, 1))


def test_projection_shortens_what_is_too_long_only() -> None:
    (upper,) = draw(1, (4, 3))
    upper[0] = 0
    upper[1] *= 1e-6
    matrices = skew(upper, 3)
    norms = np.linalg.norm(projected(matrices, 0.1), axis=(1, 2))
    assert np.allclose(norms[2:], 0.05)
    assert np.array_equal(projected(matrices, 0.1)[:2], matrices[:2])


def test_a_butterfly_puts_even_pieces_first() -> None:
    assert butterfly_order(8, 2, 1, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert butterfly_order(8, 1, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert butterfly_order(8, 4, 1, 1).tolist() == list(range(8))

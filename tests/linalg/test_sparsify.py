"""Random and magnitude pruning, sign election and weighted sums, entry by entry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.oracles import EPS32, PATH, elected, largest, product, terms_of
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.linalg.methods import METHODS, Settings, Term
from loratool.linalg.sparsify import agreed, magnitude_pruned, randomly_pruned, weighted_sum


def masks(name: str, terms: list[Term], chosen: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of A and of B stay, one adapter at a time."""
    found = METHODS[name](terms, chosen)
    return found.a != 0, found.b != 0


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_masks_are_fixed_by_seed_path_and_index(name: str) -> None:
    """The same three give the same mask; another seed, path, adapter or factor another one."""
    rng = np.random.default_rng(0)
    square = rng.standard_normal((40, 40)).astype(np.float32)
    term = Term(0, 1.0, 1.0, square.T, square)
    chosen = Settings(PATH, 2, density=0.5)
    a, b = masks(name, [term], chosen)
    again = masks(name, [term], replace(chosen))
    assert np.array_equal(a, again[0])
    assert np.array_equal(b, again[1])
    others = [
        masks(name, [term], replace(chosen, seed=1)),
        masks(name, [term], replace(chosen, path=PATH + "x")),
        masks(name, [replace(term, index=1)], chosen),
    ]
    found = [a, b.T, *(x for pair in others for x in (pair[0], pair[1].T))]
    # Independent masks of 1600 entries agree in half of them, give or take 20: here 6 of these.
    for i, one in enumerate(found):
        for two in found[:i]:
            assert abs(np.mean(one == two) - 0.5) < 6 * 20 / 1600
    heavier = masks(name, [replace(term, weight=3.0, scale=0.2)], chosen)
    assert np.array_equal(a, heavier[0])
    assert np.array_equal(b, heavier[1])


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("dare")])
def test_dare_is_reproducible_and_depends_on_the_seed(name: str) -> None:
    """Two runs are equal to the bit; another seed or path gives another product."""
    terms = terms_of("three adapters")
    chosen = Settings(PATH, 100, density=0.5, seed=7)
    one, two = METHODS[name](terms, chosen), METHODS[name](terms, chosen)
    assert np.array_equal(one.b, two.b)
    assert np.array_equal(one.a, two.a)
    for other in (replace(chosen, seed=8), replace(chosen, path="model.layers.1.q_proj")):
        assert np.abs(product(METHODS[name](terms, other)) - product(one)).max() > 0.01
    shifted = [replace(t, index=t.index + 1) for t in terms]
    assert np.abs(product(METHODS[name](shifted, chosen)) - product(one)).max() > 0.01


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_density_on_average_and_rescales(density: float) -> None:
    """A share of `density` stays, within 5 standard deviations, and is divided by it."""
    x = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    found = randomly_pruned(x, density, Settings(PATH, 1).random(0))
    assert found.dtype == np.float32
    stays = found != 0
    deviation = np.sqrt(density * (1 - density) / x.size)
    assert abs(stays.mean() - density) < 5 * deviation
    # Evenly over rows and columns too.
    assert abs(stays[:150].mean() - density) < 5 * deviation * np.sqrt(2)
    assert abs(stays[:, ::2].mean() - density) < 5 * deviation * np.sqrt(2)
    assert np.allclose(found[stays], x[stays] / density, rtol=2 * EPS32, atol=0)
    assert randomly_pruned(x, 1.0, Settings(PATH, 1).random(0)) is x


def test_dare_keeps_the_expected_value() -> None:
    """The mean over many seeds is the sum without dropping, to 5 standard errors."""
    terms = terms_of("rank 1")
    wanted = product(METHODS["sum"](terms, Settings(PATH, 2)))
    runs = [
        product(METHODS["dare_linear_core"](terms, Settings(PATH, 2, density=0.5, seed=s)))
        for s in range(400)
    ]
    error = np.std(runs, axis=0) / np.sqrt(len(runs))
    assert np.all(np.abs(np.mean(runs, axis=0) - wanted) <= 5 * error)


@settings(deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.floats(0.01, 1.0),
    st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_pruning_keeps_exactly_the_largest(
    numbers: list[int], density: float, dtype: type[np.floating]
) -> None:
    """int(density·n) entries stay as they are, with many of equal size too, the first of those."""
    x = np.array(numbers, dtype)
    for shaped in (x, x.reshape(1, -1), x.reshape(-1, 1)):
        found = magnitude_pruned(shaped, density)
        assert found.shape == shaped.shape
        assert found.dtype == dtype
        assert np.array_equal(found, largest(shaped, density))
    # With no zeros among them, their number can be seen.
    shifted = np.where(x >= 0, x + 1, x - 1).astype(dtype)
    pruned = magnitude_pruned(shifted, density)
    assert np.count_nonzero(pruned) == int(density * x.size)
    out = np.abs(shifted[pruned == 0])
    assert not out.size or not pruned.any() or np.abs(pruned[pruned != 0]).min() >= out.max()


def test_pruning_transposed_arrays() -> None:
    """Order among equals is that of the array's rows, however it lies in memory."""
    x = np.arange(12.0).reshape(3, 4) % 3 - 1
    for density in (0.1, 0.3, 0.5, 0.9):
        assert np.array_equal(magnitude_pruned(x.T, density), largest(x.T, density))


SMALL = st.lists(
    st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=5
)  # fmt: skip


@settings(deadline=None)
@given(SMALL, st.lists(st.sampled_from([1.0, -1.0, 0.5, 2.0]), min_size=5, max_size=5))
def test_election_with_ties_and_zeros(numbers: list[list[int]], weights: list[float]) -> None:
    """Entry by entry: a tie is positive, zeros do not count, of weights only the sign counts."""
    stack = [np.array(row, np.float64).reshape(2, 2) for row in numbers]
    weights = weights[: len(stack)]
    for how in ("total", "frequency"):
        wanted = elected(stack, weights, how)
        assert np.allclose(agreed(stack, weights, how), wanted, rtol=1e-15, atol=0)


def test_election_by_hand() -> None:
    """One large negative outweighs two small positives in total, but not in number."""
    stack = [np.array([x], np.float32) for x in (1.0, 2.0, -9.0)]
    weights = [1.0, 0.5, -2.0]
    assert agreed(stack, [1.0, 0.5, 2.0], "total") == -18.0
    assert agreed(stack, [1.0, 0.5, 2.0], "frequency") == 1.0  # (1 + 1) / 2
    # Subtracted, the -9 is a 9 among others, and agrees.
    assert agreed(stack, weights, "total") == agreed(stack, weights, "frequency") == 20 / 3
    tied = [np.array([x], np.float32) for x in (3.0, -3.0)]
    assert agreed(tied, [1.0, 5.0], "total") == agreed(tied, [1.0, 5.0], "frequency") == 3.0


def test_weighted_sum_keeps_the_dtype() -> None:
    """float32 stays float32, float64 stays float64, and the sum is Σ wᵢxᵢ."""
    for dtype, rtol in ((np.float32, 4 * EPS32), (np.float64, 1e-15)):
        stack = [np.array([[1.0, 3.0]], dtype), np.array([[2.0, 7.0]], dtype)]
        found = weighted_sum(stack, [0.1, -0.3])
        assert found.dtype == dtype
        assert np.allclose(found, [[-0.5, -1.8]], rtol=rtol, atol=0)

"""The best approximation of a large matrix and its bounds, against NumPy's full SVD in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.truncating import (
    OVER_NOISE,
    SHAPES,
    SPECTRA,
    Blocks,
    Dense,
    approximation,
    directed,
    fixed,
    known,
    matrix,
    true_cut,
)

from loratool.linalg import truncation
from loratool.linalg.krylov import through
from loratool.linalg.ranks import Criterion
from loratool.linalg.truncation import ChooseRank, truncated

RANKS = (4, 16, 64)

KINDS = [*SPECTRA, *OVER_NOISE]


each_matrix = pytest.mark.parametrize(
    ("kind", "shape"), list(itertools.product(KINDS, SHAPES.values())), ids=str
)


@each_matrix
def test_error_is_the_best_possible(kind: str, shape: tuple[int, int]) -> None:
    """At every rank the error is within a thousandth of Eckart and Young's."""
    dense = matrix(kind, shape)
    norm = math.sqrt(dense.energy)
    for rank in RANKS:
        found = approximation(kind, shape, rank)
        kept = found.left.shape[1]
        assert found.left.shape == (shape[0], kept)
        assert found.right.shape == (shape[1], kept)
        assert found.left.dtype == found.right.dtype == torch.float32
        assert kept == rank or (kind == "low rank" and 10 <= kept < rank)
        error = math.sqrt(true_cut(dense, found))
        assert error <= 1.001 * math.sqrt(dense.least(rank)) + 1e-6 * norm


def test_both_methods_are_taken() -> None:
    """Low ranks go through a Krylov space, and ranks that are a large part of the matrix do not."""
    for kind, shape in itertools.product(KINDS, SHAPES.values()):
        assert approximation(kind, shape, 4).passes >= 3
        assert approximation(kind, shape, 64).passes == 0
    krylov = [approximation(k, s, 16).passes > 0 for k in KINDS for s in SHAPES.values()]
    assert sum(krylov) > len(krylov) / 2


@pytest.mark.parametrize("kind", ["flat", "step"])
def test_high_rank_of_a_larger_matrix(kind: str) -> None:
    """Rank 64 by a Krylov space is as good as lower ranks are."""
    shape = (700, 720)
    dense, found = matrix(kind, shape), approximation(kind, shape, 64)
    assert found.passes >= 3
    best, error = math.sqrt(dense.least(64)), math.sqrt(true_cut(dense, found))
    assert error <= 1.001 * best + 1e-6 * math.sqrt(dense.energy)
    assert found.least <= dense.least(64) * (1 + 1e-9)


@each_matrix
def test_cut_is_the_error_of_the_factors(kind: str, shape: tuple[int, int]) -> None:
    """`cut` is ‖D - left·rightᵀ‖² of the float32 factors that are handed out."""
    dense = matrix(kind, shape)
    norm = math.sqrt(dense.energy)
    for rank in RANKS:
        found = approximation(kind, shape, rank)
        # Where more than 1e-4 of the energy is left, `cut` is a difference of sums that are good to
        # a few 1e-8: 2e-4 of the error at most. Where less is left it is measured, from elements
        # with a rounding of 2⁻²⁵. The full decomposition knows the Gram matrix to 1e-15, and not
        # what rounding the factors to float32 adds: errors to 2⁻²⁴ of the norm.
        error = math.sqrt(true_cut(dense, found))
        assert abs(math.sqrt(found.cut) - error) <= 2e-4 * error + 2.0**-24 * norm
        assert found.energy == pytest.approx(dense.energy, rel=1e-12, abs=0)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5])
def test_cut_is_right_where_it_is_tiny(size: float) -> None:
    """Of low rank but for noise that is far below float32's sums of squares, `cut` is the noise."""
    shape = (400, 300)
    noise = np.random.default_rng(2).standard_normal(shape) / 20
    dense = known((directed([3.0, 2.0, 1.0], *shape) + size * noise).astype(np.float32))
    found = dense.truncated(4)
    assert found.passes > 0
    assert found.cut == pytest.approx(true_cut(dense, found), rel=1e-3, abs=0)
    assert math.sqrt(found.cut) <= 1.002 * math.sqrt(dense.least(4))


@each_matrix
def test_least_is_a_bound(kind: str, shape: tuple[int, int]) -> None:
    """`least` is never more than what the best approximation leaves."""
    dense = matrix(kind, shape)
    for rank in RANKS:
        found = approximation(kind, shape, rank)
        # Float64 sums of 1e5 squares are good to 1e-14 of the energy.
        assert 0 <= found.least <= dense.least(rank) * (1 + 1e-9) + 1e-14 * dense.energy
        assert found.least <= found.cut


@pytest.mark.parametrize("kind", KINDS)
def test_least_is_a_bound_for_any_seed(kind: str) -> None:
    """Neither directions nor probes of another seed make `least` too high."""
    dense = matrix(kind, (300, 520))
    for seed in range(4):
        assert dense.truncated(8, seed=seed).least <= dense.least(8) * (1 + 1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize(
    ("kind", "ratio"),
    [("power 0.5", 1.02), ("power 1", 1.02), ("power 2", 1.02), ("flat", 1.05), ("gaussian", 1.05),
     ("outlier 1e3", 1.05), ("slowly falling", 1.05), ("low rank and noise", 1.05)],
)  # fmt: skip
def test_least_is_close(kind: str, ratio: float, rank: int, shape: tuple[int, int]) -> None:
    """The bound is a few per cent below the error where more than 1e-7 of the energy is left."""
    found = approximation(kind, shape, rank)
    assert math.sqrt(found.cut / found.least) <= ratio


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_least_is_close_for_steep_spectra(shape: tuple[int, int]) -> None:
    """Of σ ~ k⁻³ at rank 4, where 1e-4 of the energy is left, too."""
    found = approximation("power 3", shape, 4)
    assert math.sqrt(found.cut / found.least) <= 1.02


@each_matrix
def test_factors_are_balanced(kind: str, shape: tuple[int, int]) -> None:
    """Columns of both factors are orthogonal and √σ long, σ falling."""
    for rank in RANKS:
        found = approximation(kind, shape, rank)
        assert len(found.values) == found.left.shape[1]
        assert np.all(np.diff(found.values) <= 0)
        for factor in (found.left, found.right):
            gram = factor.double().numpy().T @ factor.double().numpy()
            kept = found.values > 1e-5 * found.values[0]  # of others, 1e-7 of the norm is much
            lengths = np.sqrt(np.diagonal(gram))[kept]
            assert np.allclose(lengths, np.sqrt(found.values[kept]), rtol=1e-3)
            cosines = gram[np.ix_(kept, kept)] / np.outer(lengths, lengths)
            assert np.abs(cosines - np.eye(len(lengths))).max() <= 2e-2


@pytest.mark.parametrize("kind", ["power 0.5", "power 1", "power 2", "low rank", "step"])
@pytest.mark.parametrize("rank", [4, 64])
def test_values_are_the_singular_values(kind: str, rank: int) -> None:
    """Where they lie apart, `values` are those of the SVD; `following` goes on, never above it."""
    for shape in SHAPES.values():
        dense, found = matrix(kind, shape), approximation(kind, shape, rank)
        together = np.concatenate([found.values, found.following])
        assert np.all(np.diff(together) <= 0)
        assert len(together) > rank or kind == "low rank"
        true = dense.values[: len(together)]
        # A sum of squares is good to 1e-7 of the largest square in the one, 1e-15 in the other.
        slack = (1e-7 if found.passes else 1e-14) * dense.values[0] ** 2
        assert np.all(together**2 <= true**2 * (1 + 1e-6) + slack)
        distance = np.abs(found.values**2 - true[: len(found.values)] ** 2)
        assert np.all(distance <= 2e-3 * true[: len(found.values)] ** 2 + slack)


def test_exact_is_the_full_decomposition() -> None:
    """With `exact` no Krylov space is built, and the error is Eckart and Young's."""
    for kind in ("gaussian", "power 1"):
        for shape in SHAPES.values():
            dense = matrix(kind, shape)
            found = dense.truncated(4, exact=True)
            assert found.passes == 0
            assert true_cut(dense, found) == pytest.approx(dense.least(4), rel=1e-8, abs=0)
            assert found.cut == pytest.approx(dense.least(4), rel=1e-10, abs=0)
            assert found.least == pytest.approx(dense.least(4), rel=1e-10, abs=0)


def test_seeds() -> None:
    """The same seed gives the same bytes; another gives others, and the same error to 1e-3."""
    dense = matrix("gaussian", SHAPES["wide"])
    one, again, other = (dense.truncated(16, seed=seed) for seed in (5, 5, 6))
    assert one.passes > 0
    assert torch.equal(one.left, again.left)
    assert torch.equal(one.right, again.right)
    assert (one.cut, one.least) == (again.cut, again.least)
    assert not torch.equal(one.left, other.left)
    assert math.sqrt(one.cut) == pytest.approx(math.sqrt(other.cut), rel=1e-3, abs=0)


@pytest.mark.parametrize("scale", [1e-25, 1e-22, 1e-20, 1e-18, 1e-12, 1e12, 1e17])
def test_any_scale(scale: float) -> None:
    """Differences of any size are approximated as well; the bound holds."""
    dense = known((matrix("power 0.5", (300, 300)).matrix * scale).astype(np.float32))
    found = dense.truncated(8)
    best = math.sqrt(dense.least(8))
    assert math.sqrt(true_cut(dense, found)) <= 1.001 * best
    assert math.sqrt(found.cut) == pytest.approx(math.sqrt(true_cut(dense, found)), rel=1e-6, abs=0)
    assert found.least <= dense.least(8) * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 300), (300, 3), (5, 5)])
def test_small_matrices(shape: tuple[int, int]) -> None:
    """Matrices of any small shape get the best approximation, and no rank beyond their own."""
    dense = known(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    for rank in (1, 2, 40):
        found = dense.truncated(rank)
        assert found.left.shape[1] == min(rank, *shape)
        error = math.sqrt(true_cut(dense, found))
        assert error <= math.sqrt(dense.least(rank)) * (1 + 1e-6) + 1e-6 * math.sqrt(dense.energy)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_blocks_of_any_size(shape: tuple[int, int], exact: bool) -> None:
    """How the rows are cut into blocks changes nothing but rounding."""
    dense = matrix("power 0.5", shape)
    wanted = dense.truncated(4, rows=64, exact=exact)
    for rows in (1, 77, 10_000):
        found = dense.truncated(4, rows=rows, exact=exact)
        assert found.passes == wanted.passes
        assert found.cut == pytest.approx(wanted.cut, rel=1e-6, abs=0)
        assert np.allclose(found.values, wanted.values, rtol=1e-5)
        product = (wanted.left @ wanted.right.T).numpy()
        assert np.abs((found.left @ found.right.T).numpy() - product).max() <= 1e-4


@pytest.mark.parametrize("kind", ["power 0.5", "power 3", "gaussian", "low rank"])
def test_passes_are_counted(kind: str) -> None:
    """`passes` are those of the Krylov space; bound and measured error take four more at most."""
    dense = matrix(kind, SHAPES["tall"])
    reader = Blocks(dense.matrix)
    found = truncated(reader, dense.energy, fixed(4), 4)
    assert 3 <= found.passes <= 16
    assert found.passes <= reader.reads <= found.passes + 4


def test_long_matrices_are_summed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices that are widened at a time do not change the result."""
    dense = matrix("power 1", SHAPES["tall"])
    wide = matrix("power 1", SHAPES["wide"])
    whole, exact = dense.truncated(4), wide.truncated(4, exact=True)
    monkeypatch.setattr("loratool.linalg.krylov._SLICE", 37)
    monkeypatch.setattr(truncation, "_COLUMNS", 37)
    assert dense.truncated(4).cut == pytest.approx(whole.cut, rel=1e-9, abs=0)
    found = wide.truncated(4, exact=True)
    assert found.cut == pytest.approx(exact.cut, rel=1e-9, abs=0)
    assert true_cut(wide, found) == pytest.approx(true_cut(wide, exact), rel=1e-6, abs=0)


def test_through_is_both_products() -> None:
    """One pass gives D·V and DᵀD·V."""
    dense = matrix("gaussian", SHAPES["tall"])
    right = torch.randn(dense.matrix.shape[1], 5, generator=torch.Generator().manual_seed(0))
    image, back = through(Blocks(dense.matrix, 33), right)
    wanted = dense.matrix.astype(np.float64) @ right.double().numpy()
    assert np.allclose(image.numpy(), wanted, rtol=0, atol=1e-5)
    assert np.allclose(back.numpy(), dense.matrix.T.astype(np.float64) @ wanted, rtol=0, atol=1e-5)


SHARES = (0.3, 0.8, 0.95)
FALLING: dict[str, Callable[[int], Any]] = {
    "power 0.8": lambda n: np.arange(1, n + 1) ** -0.8,
    "power 1": lambda n: np.arange(1, n + 1) ** -1.0,
    "geometric": lambda n: 0.97 ** np.arange(n),
    "slowly geometric": lambda n: 0.985 ** np.arange(n),
    "slowly falling": lambda n: 1 - 0.5 * np.arange(n) / n,
}


@cache
def falling(kind: str) -> Dense:
    return known(directed(FALLING[kind](640), 640, 650).astype(np.float32))


def by_energy(share: float, cap: int | None = None) -> ChooseRank:
    criterion = Criterion(energy=share, max_rank=cap)
    return lambda values, energy: criterion.choose(values[values > 2.0**-24 * values[0]], energy)


def wanted_rank(dense: Dense, share: float) -> int:
    return int(np.searchsorted(np.cumsum(dense.values**2), share * dense.energy)) + 1


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", FALLING)
def test_energy_takes_the_smallest_rank(kind: str, share: float) -> None:
    """The rank is the first that reaches the share, and all that is returned is of that rank."""
    dense = falling(kind)
    found = truncated(Blocks(dense.matrix), dense.energy, by_energy(share))
    rank = found.left.shape[1]
    # The Krylov space never holds more than there is, and a thousandth of the rest less at most,
    # so that a share which the true rank just reaches may take one more.
    wanted = wanted_rank(dense, share)
    assert wanted <= rank <= wanted + (found.passes > 0)
    assert found.right.shape[1] == rank
    assert len(found.values) == rank
    assert np.allclose(found.values, dense.values[:rank], rtol=2e-2)
    assert 1 - true_cut(dense, found) / dense.energy >= share * (1 - 1e-6)
    assert found.least <= dense.least(rank) * (1 + 1e-9)


def test_energy_takes_both_methods() -> None:
    """Few ranks come from a Krylov space, and so do more than it began with; many do not."""
    dense = falling("slowly geometric")
    counts = {}
    for share in (0.3, 0.8, 0.95):
        found = truncated(Blocks(dense.matrix), dense.energy, by_energy(share))
        counts[found.left.shape[1]] = found.passes
    assert [passes > 0 for passes in counts.values()] == [True, True, False]
    assert sorted(counts)[1] > 40


@pytest.mark.parametrize("cap", [1, 20, 60])
@pytest.mark.parametrize("kind", FALLING)
def test_cap_is_respected(kind: str, cap: int) -> None:
    """With a cap the rank is the lower of the two, and the error the best at that rank."""
    dense = falling(kind)
    for share in (0.5, 0.95):
        found = truncated(Blocks(dense.matrix), dense.energy, by_energy(share, cap), cap)
        rank = found.left.shape[1]
        wanted = wanted_rank(dense, share)
        assert min(wanted, cap) <= rank <= min(wanted + (found.passes > 0), cap)
        assert len(found.values) == rank
        error = math.sqrt(true_cut(dense, found))
        assert error <= 1.001 * math.sqrt(dense.least(rank)) + 1e-6 * math.sqrt(dense.energy)

"""Which rank a criterion asks for, and how a budget is spread over matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import UsageError
from loratool.linalg.ranks import Criterion, spread


def fewest(shares: list[Fraction], wanted: float) -> int:
    """By trying one rank after the other: the first whose sum reaches this share of them all."""
    total = sum(shares)
    for rank in range(1, len(shares) + 1):
        if sum(shares[:rank]) >= total * Fraction(wanted) * (1 - Fraction(1, 10**12)):
            return rank
    return len(shares)


WHOLE = st.lists(st.integers(1, 60), min_size=1, max_size=20).map(lambda x: sorted(x)[::-1])
SHARE = st.one_of(st.floats(1e-3, 1), st.integers(1, 20).map(lambda n: n / 20))


@given(WHOLE, SHARE)
def test_energy_and_sv_fro_reach_their_share(numbers: list[int], share: float) -> None:
    """The fewest with that share of the squares; sv_fro means its square root."""
    values = np.array(numbers, np.float64)
    total = float(np.sum(values**2))
    squares = [Fraction(n * n) for n in numbers]
    assert Criterion(energy=share).choose(values, total) == fewest(squares, share)
    assert Criterion(sv_fro=share).choose(values, total) == fewest(squares, share**2)


@given(WHOLE, SHARE, st.floats(0, 1e3))
def test_sv_cumulative_reaches_its_share(numbers: list[int], share: float, more: float) -> None:
    """The fewest with that share of the sum of the values, whatever the energy."""
    values = np.array(numbers, np.float64)
    wanted = fewest([Fraction(n) for n in numbers], share)
    assert Criterion(sv_cumulative=share).choose(values, 1.0 + more) == wanted


@given(WHOLE, st.one_of(st.floats(1, 100), st.sampled_from([1.0, 2.0, 4.0, 8.0])))
def test_sv_ratio_counts_what_is_above(numbers: list[int], ratio: float) -> None:
    """Those strictly above σ₁/ratio, and at least the first."""
    values = np.array(numbers, np.float64)
    wanted = max(1, sum(1 for n in numbers if n > numbers[0] / ratio))
    assert Criterion(sv_ratio=ratio).choose(values, 1.0) == wanted


@given(WHOLE, SHARE, st.integers(1, 25), st.integers(1, 25))
def test_ranks_and_caps(numbers: list[int], share: float, rank: int, cap: int) -> None:
    """A rank is itself, or all there are; a cap lowers what a criterion asks for."""
    values = np.array(numbers, np.float64)
    total = float(np.sum(values**2))
    assert Criterion(rank=rank).choose(values, total) == min(rank, len(numbers))
    assert Criterion(max_rank=cap).choose(values, total) == min(cap, len(numbers))
    assert Criterion().choose(values, total) == len(numbers)
    for chosen in ({"energy": share}, {"sv_fro": share}, {"sv_cumulative": share}, {"sv_ratio": 3}):
        free = Criterion(**chosen).choose(values, total)
        assert Criterion(**chosen, max_rank=cap).choose(values, total) == min(free, cap)


def test_energy_counts_what_is_not_in_values() -> None:
    """The share is of the whole energy; where the values cannot reach it, all are kept."""
    values = np.array([2.0, 1.0, 1.0])
    assert Criterion(energy=0.5).choose(values, 6.0) == 1
    assert Criterion(energy=0.5).choose(values, 9.0) == 2
    assert Criterion(energy=1.0).choose(values, 9.0) == 3
    assert Criterion(sv_fro=1.0).choose(values, 9.0) == 3
    assert Criterion(sv_fro=0.5).choose(values, 20.0) == 2


def test_rounding_does_not_cost_a_rank() -> None:
    """The sum of all values reaches the share 1, though summed in another order."""
    values = np.sort(np.random.default_rng(0).random(300))[::-1]
    for energy in (np.sum(values**2), math.fsum(values**2)):
        assert Criterion(energy=1.0).choose(values, float(energy)) == 300
    tenths = np.full(10, 0.1)  # eight of them, one after the other, are 0.7999999999999999
    assert Criterion(sv_cumulative=0.8).choose(tenths, 1.0) == 8
    assert Criterion(energy=0.8).choose(np.sqrt(tenths), 1.0) == 8


@pytest.mark.parametrize("name", ["rank", "energy", "sv_ratio", "sv_fro", "sv_cumulative"])
def test_of_no_values_one_is_kept(name: str) -> None:
    """A module whose delta is zero still gets rank 1."""
    assert Criterion(**{name: 1}).choose(np.zeros(0), 0.0) == 1
    assert Criterion(max_rank=4).choose(np.zeros(0), 0.0) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"rank": -2}, "--rank -2"),
        ({"rank": 1.5}, "--rank 1.5"),
        ({"max_rank": 0}, "--max-rank 0"),
        ({"energy": 0.0}, "--energy 0"),
        ({"energy": 1.01}, "--energy 1.01"),
        ({"energy": -0.5}, "--energy -0.5"),
        ({"energy": math.nan}, "--energy nan"),
        ({"sv_fro": 0}, "--sv-fro 0"),
        ({"sv_fro": 2}, "--sv-fro 2"),
        ({"sv_cumulative": 0}, "--sv-cumulative 0"),
        ({"sv_cumulative": 1.5}, "--sv-cumulative 1.5"),
        ({"sv_ratio": 0.99}, "--sv-ratio 0.99"),
        ({"sv_ratio": math.inf}, "--sv-ratio inf"),
        ({"sv_ratio": math.nan}, "--sv-ratio nan"),
        ({"rank": 4, "energy": 0.9}, "--rank and --energy"),
        ({"energy": 0.9, "sv_fro": 0.9}, "--energy and --sv-fro"),
        ({"sv_ratio": 2, "sv_cumulative": 0.9}, "--sv-ratio and --sv-cumulative"),
        ({"rank": 4, "max_rank": 8}, "--rank and --max-rank"),
    ],
)
def test_refused_criteria(fields: dict[str, Any], words: str) -> None:
    """Values out of range and two criteria at once are refused by the names of their options."""
    with pytest.raises(UsageError, match=words):
        Criterion(**fields).check()


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"rank": 1}, {"energy": 1}, {"energy": 1e-9}, {"sv_fro": 1}, {"sv_cumulative": 1},
        {"sv_ratio": 1}, {"max_rank": 1}, {"energy": 0.5, "max_rank": 3},
    ],
)  # fmt: skip
def test_accepted_criteria(fields: dict[str, Any]) -> None:
    """The ends of the ranges are inside, and a cap goes with any criterion but a rank."""
    Criterion(**fields).check()
    assert Criterion(**fields).given == [name for name in fields if name != "max_rank"]


@st.composite
def several(draw: st.DrawFn, equal: bool = False) -> tuple[list[np.ndarray], list[int], int]:
    """Singular values of a few matrices, what one of each costs, and a budget."""
    count = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 50), min_size=0, max_size=4)
    values = [np.array(sorted(draw(sizes), reverse=True), float) for _ in range(count)]
    costs = [draw(st.integers(1, 9))] * count
    if not equal:
        costs = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return values, costs, draw(st.integers(0, 60))


def kept_energy(values: Sequence[np.ndarray], ranks: Sequence[int]) -> float:
    return sum(float(np.sum(own[:rank] ** 2)) for own, rank in zip(values, ranks, strict=True))


def all_ranks(
    values: Sequence[np.ndarray], costs: Sequence[int], budget: int
) -> Iterator[tuple[int, ...]]:
    for ranks in itertools.product(*(range(len(own) + 1) for own in values)):
        if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget:
            yield ranks


@settings(deadline=None, max_examples=150)
@given(several())
def test_spread_stays_in_the_budget(case: tuple[list[np.ndarray], list[int], int]) -> None:
    """The ranks cost no more than the budget, and it is not enough for one more of any matrix."""
    values, costs, budget = case
    ranks = spread(values, costs, budget)
    assert all(0 <= rank <= len(own) for rank, own in zip(ranks, values, strict=True))
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert spent <= budget
    # Greedy: what is kept is no less than the best, but for the one that did not fit.
    best = max(kept_energy(values, r) for r in all_ranks(values, costs, budget))
    largest = max((float(own[0]) ** 2 for own in values if len(own)), default=0.0)
    assert kept_energy(values, ranks) >= best - largest


@settings(deadline=None, max_examples=150)
@given(several(equal=True))
def test_spread_is_optimal_for_equal_costs(case: tuple[list[np.ndarray], list[int], int]) -> None:
    """No other ranks within the budget keep more."""
    values, costs, budget = case
    best = max(kept_energy(values, r) for r in all_ranks(values, costs, budget))
    assert kept_energy(values, spread(values, costs, budget)) == best


def test_spread_fills_what_is_left() -> None:
    """What does not fit closes its matrix only; a cheaper one takes the rest, largest first."""
    values = [np.array([10.0, 1.0]), np.array([3.0, 2.0, 1.0])]
    assert spread(values, [5, 1], 0) == [0, 0]
    assert spread(values, [5, 1], 4) == [0, 3]
    assert spread(values, [5, 1], 5) == [1, 0]
    assert spread(values, [5, 1], 7) == [1, 2]
    assert spread(values, [5, 1], 1000) == [2, 3]
    assert spread([], [], 10) == []


def test_spread_counts_energy_by_the_byte() -> None:
    """σ = 3 at a cost of 2 is less by the byte than σ = 2.5 at a cost of 1."""
    assert spread([np.array([3.0]), np.array([2.5])], [2, 1], 2) == [0, 1]

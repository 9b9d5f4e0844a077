"""Truncations at lower ranks, and the policies that choose them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.truncating import SHAPES, approximation, matrix, true_cut
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from loratool.errors import UsageError
from loratool.extracting.counterparts import Counterpart
from loratool.extracting.decomposed import Decomposed
from loratool.extracting.difference import Size
from loratool.extracting.policy import Policy
from loratool.linalg.ranks import Criterion
from loratool.models.layouts.place import Place
from loratool.storage.tensors import TensorInfo


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As the workers compute; and tests that run beside each other do not slow each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, "blas"):
        yield
    torch.set_num_threads(before)


def found_of(values: Any, following: Any = (), cut: float = 0.0, least: float = 0.0) -> Decomposed:
    info = TensorInfo("m.weight", "F32", (8, 8), Path("x"), 0)
    part = Counterpart("m.weight", "m.weight", info, info, "linears", "factors")
    size = Size(1.0, 1.0, True, 0.0)
    own = np.array(values, float), np.array(following, float)
    return Decomposed(part, size, *own, cut=cut, least=least)


def test_found_at_lower_ranks() -> None:
    """Each singular value that is left out adds its square to `cut` and to `least`."""
    found = found_of([4, 2, 1], [0.5], cut=0.5, least=0.25)
    assert found.at(3) == found.at(9) == (0.5, 0.25)
    assert found.at(2) == (1.5, 1.25)
    assert found.at(1) == (5.5, 5.25)
    assert found.at(0) == (21.5, 21.25)


def test_found_at_is_true_of_a_truncation() -> None:
    """`cut` at a lower rank is that of the first columns, and `least` still a bound."""
    for kind, shape in (("power 0.5", SHAPES["tall"]), ("gaussian", SHAPES["wide"])):
        dense, result = matrix(kind, shape), approximation(kind, shape, 16)
        found = found_of(result.values, result.following, result.cut, result.least)
        for rank in (15, 7, 1):
            cut, least = found.at(rank)
            shorter: Any = SimpleNamespace(left=result.left[:, :rank], right=result.right[:, :rank])
            assert cut == pytest.approx(true_cut(dense, shorter), rel=1e-5, abs=0)
            assert least <= dense.least(rank) * (1 + 1e-9)


def policy(criterion: Criterion, budget: int | None = None, uniform: bool = False) -> Policy:
    """One rank of a module of n × n costs n bytes, and the file has a header of ten."""

    def cost(part: Counterpart) -> int:
        return part.tuned.shape[0]

    def size(parts: Any, ranks: Any) -> int:
        return 10 + sum(cost(part) * rank for part, rank in zip(parts, ranks, strict=True))

    return Policy(criterion, cost, size, budget, uniform)


def part_of(number: int, width: int) -> Counterpart:
    info = TensorInfo(f"{number}.weight", "F32", (width, width), Path("x"), 0)
    return Counterpart(info.name, Place(info.name), info, info, "linears", "factors")


@settings(deadline=None, max_examples=60)
@given(
    budget=st.integers(0, 500),
    widths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    cap=st.integers(0, 12),
)
def test_even_budget(budget: int, widths: list[int], cap: int) -> None:
    """The one rank fits the budget, the cap and the largest module, and one more does not."""
    parts = [part_of(number, width) for number, width in enumerate(widths)]
    chosen = policy(Criterion(max_rank=cap or None), budget, uniform=True)
    if 10 + sum(widths) > budget:
        with pytest.raises(UsageError, match="too small"):
            chosen.even(parts)
        return
    rank = chosen.even(parts)
    limit = min(cap or max(widths), max(widths))
    assert 10 + rank * sum(widths) <= budget
    assert rank == limit or 10 + (rank + 1) * sum(widths) > budget
    assert 1 <= rank <= limit


def ranks_of(policy: Policy, found: list[Decomposed]) -> list[int]:
    ranks = policy.ranks(found)
    return [ranks[one.part.unit] for one in found]


def test_policies() -> None:
    """A fixed rank, a rank for each, the largest of them, one for a budget, or a budget's best."""
    found = [
        replace(found_of(values), part=part_of(number, 3))
        for number, values in enumerate(([3, 2], [5], [1, 1, 1]))
    ]
    energy = Criterion(energy=0.9)
    assert ranks_of(policy(Criterion(rank=2)), found) == [2, 2, 2]
    assert ranks_of(policy(Criterion(rank=7)), found) == [3, 3, 3]  # no matrix has more
    assert ranks_of(policy(energy), found) == [2, 1, 3]
    assert ranks_of(policy(energy, uniform=True), found) == [3, 3, 3]
    assert ranks_of(policy(energy, uniform=True), []) == []
    assert ranks_of(policy(Criterion(), budget=10 + 7 * 3, uniform=True), found) == [2, 2, 2]
    assert ranks_of(policy(Criterion(), budget=10 + 3 * 3), found) == [2, 1, 0]

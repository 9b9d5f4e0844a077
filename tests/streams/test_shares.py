"""Parts split over workers who do not talk to one another."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.streams.shares import share

SIZES = st.dictionaries(st.text(max_size=4), st.integers(0, 1 << 40), max_size=40)


def shares(sizes: dict[str, int], count: int) -> list[list[str]]:
    return [share(sizes, number, count) for number in range(1, count + 1)]


@given(SIZES, st.integers(1, 50))
def test_every_part_is_somebodys_and_only_one_has_it(sizes: dict[str, int], count: int) -> None:
    """The shares of all workers together are the parts, each once and in their order."""
    split = shares(sizes, count)
    assert sorted(name for own in split for name in own) == sorted(sizes)
    assert all(own == [name for name in sizes if name in own] for own in split)


@given(SIZES, st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_matter(
    sizes: dict[str, int], count: int, dice: random.Random
) -> None:
    """Two processes that list the same parts in other orders agree on who has which."""
    items = list(sizes.items())
    dice.shuffle(items)
    assert list(map(set, shares(sizes, count))) == list(map(set, shares(dict(items), count)))


@given(SIZES, st.integers(1, 8))
def test_no_worker_has_much_more_than_another(sizes: dict[str, int], count: int) -> None:
    """The fullest worker has, without the last part it got, no more than the emptiest one."""
    loads = [sorted(sizes[name] for name in own) for own in shares(sizes, count)]
    emptiest = min(map(sum, loads))
    assert all(sum(own[1:]) <= emptiest for own in loads)


def test_the_split_is_the_same_for_ever() -> None:
    """Largest first onto the lightest, ties by name and by the worker's number: as written down."""
    sizes = {"d": 4, "a": 7, "c": 5, "b": 5, "z": 0, "y": 0}
    assert shares(sizes, 2) == [["d", "a"], ["c", "b", "z", "y"]]
    assert shares(sizes, 3) == [["a"], ["d", "b"], ["c", "z", "y"]]


def test_parts_without_bytes_are_spread_too() -> None:
    """Parts that all have no bytes do not all go to the first worker."""
    assert [len(own) for own in shares(dict.fromkeys("abcdefgh", 0), 4)] == [2, 2, 2, 2]


@pytest.mark.parametrize(("number", "count"), [(0, 2), (3, 2), (1, 0), (-1, 2)])
def test_a_worker_that_is_not_there_has_no_share(number: int, count: int) -> None:
    """A number outside 1 to `count` is a mistake of the caller's."""
    with pytest.raises(ValueError, match=f"worker {number} of {count}"):
        share({"a": 1}, number, count)

"""Numbers in words: what counts must agree with its number."""

from __future__ import annotations

import pytest

from loratool.words import agreeing, counted


@pytest.mark.parametrize(
    ("count", "noun", "verb", "text"),
    [
        (1, "module", "", "1 module"),
        (0, "module", "", "0 modules"),
        (1, "module", "has", "1 module has"),
        (3, "module", "has", "3 modules have"),
        (2, "tensor", "is", "2 tensors are"),
        (2, "tensor", "was", "2 tensors were"),
        (2, "part", "does", "2 parts do"),
        (2, "file", "looks", "2 files look"),
        (1200, "value", "overflows", "1,200 values overflow"),
        (2, "entry", "", "2 entries"),
    ],
)
def test_nouns_and_verbs_agree_with_their_number(
    count: int, noun: str, verb: str, text: str
) -> None:
    """One of a thing is singular, any other number is plural, and so is the verb."""
    assert counted(count, noun, verb) == text


def test_a_verb_by_itself_agrees_too() -> None:
    """Where other words stand between the number and its verb."""
    assert [agreeing(n, "holds") for n in (1, 2)] == ["holds", "hold"]

"""Places: the part of a stored tensor that a delta is added to."""

from __future__ import annotations

import numpy as np
import pytest

from loratool.models.layouts.place import Place


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize(
    ("place", "stored", "wanted"),
    [
        (Place("w"), (6, 4), lambda w: w),
        (Place("w"), (6, 3, 2, 2), lambda w: w.reshape(6, 12)),
        (Place("w", transposed=True), (6, 4), lambda w: w.T),
        (Place("w", transposed=True), (4, 4), lambda w: w.T),
        (Place("w", rows=range(2, 5)), (6, 4), lambda w: w[2:5]),
        (Place("w", rows=range(1, 6, 2)), (6, 4), lambda w: w[1::2]),
        (Place("w", rows=(3, 4, 5, 0, 1, 2)), (6, 4), lambda w: w[[3, 4, 5, 0, 1, 2]]),
        (Place("w", rows=range(0, 2), transposed=True), (6, 4), lambda w: w[:, :2].T),
        (Place("w", expert=2), (3, 6, 4), lambda w: w[2]),
        (Place("w", expert=1, transposed=True), (3, 4, 4), lambda w: w[1].T),
        (Place("w", expert=1, rows=range(1, 6, 2), transposed=True), (3, 4, 6),
         lambda w: w[1][:, 1::2].T),
    ],
)  # fmt: skip
def test_a_place_is_these_elements(place: Place, stored: tuple[int, ...], wanted) -> None:
    """Each way in which models store a matrix is a view of the tensor, squares included."""
    values = numbered(*stored)
    part = place.part(values)
    assert np.array_equal(part, wanted(values))
    assert place.shape(stored) == part.shape
    assert place.fits(stored)


@pytest.mark.parametrize(
    ("place", "stored"),
    [
        (Place("w", expert=3), (3, 6, 4)),
        (Place("w", expert=0), (6,)),
        (Place("w", rows=range(4, 7)), (6, 4)),
        (Place("w", rows=(0, 6)), (6, 4)),
        (Place("w", rows=range(4), transposed=True), (6, 3)),
    ],
)
def test_a_place_outside_of_the_tensor_does_not_fit(place: Place, stored: tuple[int, ...]) -> None:
    """An expert or a row that the tensor lacks is seen before anything is read."""
    assert not place.fits(stored)

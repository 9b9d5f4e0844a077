"""Intruders: large directions that the base's weight lacks, against full SVDs."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.matrices import draw, product

from loratool.linalg import intruders
from loratool.linalg.intruders import BaseDirections

#: The last ones are longer than the slices in which rows are summed, and narrower than TOP.
WEIGHTS = {
    "square": (40, 40), "tall": (70, 30), "wide": (30, 70), "long": (1500, 20),
    "broad": (20, 1500), "narrow": (50, 6), "flat": (6, 50),
}  # fmt: skip


def best_cosines(weight: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """By full SVDs: for each of the ten first left singular vectors the nearest of the weight's."""
    plain = np.linalg.svd(weight, full_matrices=False)[0]
    tuned = np.linalg.svd(weight + delta, full_matrices=False)[0][:, :10]
    return np.abs(plain.T @ tuned).max(axis=0)


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("strength", [0.03, 0.3, 3.0])
def test_intruders_are_those_of_the_full_svds(
    shape: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every threshold as many vectors are far from the weight's as by dense SVDs."""
    out, width = WEIGHTS[shape]
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((out, width)).astype(np.float32)
    b, a = draw(out, width, 4, seed=6)
    b *= np.float32(strength)
    directions = BaseDirections(weight)
    wanted = best_cosines(weight.astype(np.float64), product(b, a))
    assert directions.intruders(b, a) == np.count_nonzero(wanted < 0.5)
    for near in np.linspace(0.02, 0.98, 49):
        monkeypatch.setattr(intruders, "NEAR", near)
        assert directions.intruders(b, a) == np.count_nonzero(wanted < near)


@pytest.mark.parametrize("shape", ["square", "tall", "wide"])
def test_planted_intruders_are_counted(shape: str) -> None:
    """Large deltas in random directions count one each, small ones and none at all nothing."""
    out, width = (4 * n for n in WEIGHTS[shape])
    weight = np.random.default_rng(0).standard_normal((out, width)).astype(np.float32)
    directions = BaseDirections(weight)
    b, a = draw(out, width, 3, seed=1)
    for count in (1, 2, 3):
        assert directions.intruders(b[:, :count], a[:count]) == count
    assert directions.intruders(b * np.float32(1e-5), a) == 0
    assert directions.intruders(b * 0, a) == 0
    assert directions.intruders(b[:, :0], a[:0]) == 0


@pytest.mark.parametrize("shape", ["square", "tall", "wide"])
@pytest.mark.parametrize("which", [0, 3, -1])
def test_rescaling_a_direction_is_no_intruder(shape: str, which: int) -> None:
    """A singular value made ten times as large, even the smallest, adds no direction."""
    weight = np.random.default_rng(0).standard_normal(WEIGHTS[shape])
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    b, a = 9 * s[which] * u[:, [which]], vt[[which]]
    assert BaseDirections(weight).intruders(b, a) == 0
    assert BaseDirections(weight).intruders(20 * u[:, [which]], a) == 0

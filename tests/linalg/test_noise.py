"""The noise edge: ranks planted in noise are found, and what the model does not fit is said."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loratool.linalg.lowrank import decompose
from loratool.linalg.noise import _edges, noise_edge

SHAPES = [(1024, 1024), (2048, 1024), (1100, 4000)]


def spectrum(out: int, width: int, rank: int, signals: int = 0, size: float = 3.0, seed: int = 0):
    """Singular values of a pair with noise in all directions but the `signals`, mixed."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((out, rank)), rng.standard_normal((rank, width))
    b[:, :signals] *= size * np.linspace(1.0, 1.5, signals)
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    return decompose(b @ turn, turn.T @ a).values


@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize(("rank", "signals"), [(16, 1), (16, 5), (32, 8), (64, 6), (64, 40)])
def test_a_planted_rank_is_recovered(out: int, width: int, rank: int, signals: int) -> None:
    """Signals of three times the noise's strength are all above the edge, and nothing else is."""
    found = [noise_edge(spectrum(out, width, rank, signals, seed=n), out, width) for n in range(5)]
    assert [edge.above for edge in found] == [signals] * 5
    assert all(edge.edge is not None for edge in found)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_a_signal_that_is_added_to_b_is_recovered(out: int, width: int) -> None:
    """A low-rank change of B over gradient noise, seen through a random A, is the planted rank."""
    rng = np.random.default_rng(1)
    a = rng.uniform(-1, 1, (32, width))
    strong = rng.standard_normal((out, 3)) @ rng.standard_normal((3, 32))
    values = decompose(strong + 0.2 * rng.standard_normal((out, 32)), a).values
    assert noise_edge(values, out, width).above == 3


def test_noise_alone_has_next_to_nothing_above_the_edge() -> None:
    """Of 300 pure noises at most one in fifty has a value above its edge, or no edge."""
    wrong = 0
    for seed in range(100):
        for out, width, rank in ((1024, 1024, 16), (2048, 512, 32), (1024, 512, 32)):
            edge = noise_edge(spectrum(out, width, rank, seed=seed), out, width)
            wrong += edge.above != 0
    assert wrong <= 6


def test_the_edges_are_those_of_one_law_where_one_side_is_endless() -> None:
    """With a width beyond all bounds the edges are Marchenko and Pastur's, (1 ± √(j/out))²."""
    low, high = _edges(64, 1000, 10**12)
    ratio = np.sqrt(np.arange(1, 65) / 1000)
    step = (1 + ratio) ** (4 / 3) * np.arange(1, 65) ** (-2 / 3) * ratio  # Johnstone, 2001
    np.testing.assert_allclose(high, (1 + ratio) ** 2 + 3.27 * step, rtol=1e-5)
    assert (low < (1 - ratio) ** 2).all()


def test_a_large_noise_ends_where_the_law_says() -> None:
    """The extreme squared singular values of large noise, over their mean, lie at the edges."""
    values = spectrum(2400, 1600, 400) ** 2
    low, high = (edges[-1] for edges in _edges(400, 2400, 1600))
    squares = values / values.mean()
    assert 0.92 * high < squares[0] < high
    assert low < squares[-1] < 1.2 * low


def test_the_strength_of_the_noise_makes_no_difference() -> None:
    """The same values times any factor, also a tiny one, have as many above."""
    values = spectrum(1024, 1024, 16, 3)
    for factor in (1e-12, 1.0, 1e12):
        edge = noise_edge(factor * values, 1024, 1024)
        assert edge.above == 3
        assert edge.edge == pytest.approx(
            factor * (noise_edge(values, 1024, 1024).edge or math.nan)
        )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.zeros(8), "zero"),
        (np.array([]), "zero"),
        (np.array([3.0, 2.0, 1.0]), "few"),
        (np.array([3.0, 2.0, 1.0, *np.zeros(9)]), "few"),
        (2.0 ** -np.arange(16.0), "falling"),
        (0.95 ** np.arange(16.0), "falling"),
        (0.95 ** np.arange(64.0), "falling"),
    ],
)
def test_where_the_model_does_not_apply_all_values_stay(values: np.ndarray, why: str) -> None:
    """Too few values, or a spectrum that falls to its end, have no edge, and that is said."""
    edge = noise_edge(values, 1000, 1000)
    assert (edge.edge, edge.why) == (None, why)
    assert edge.above == np.count_nonzero(values)


def test_a_rank_near_the_width_has_no_edge() -> None:
    """Where noise is as wide as any spectrum nothing is called noise."""
    assert noise_edge(spectrum(24, 24, 12), 24, 24).why == "wide"

"""SVDs of products from their factors, ranks, angles and intruders, against dense matrices."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapters.factorfile import encode
from loratool.errors import UsageError, ValueRangeError
from loratool.linalg import intruders
from loratool.linalg.angles import angles_and_product, effective_rank
from loratool.linalg.dense import truncated_svd
from loratool.linalg.intruders import BaseDirections
from loratool.linalg.lowrank import Decomposition, crossed, decompose, inner, stacked, triangle
from loratool.linalg.ranks import Criterion
from loratool.storage.tensors import as_bytes

#: What is cut off as negligible: half a unit in the last place of float32.
NEGLIGIBLE = 2.0**-24

#: out, in, rank. The last ones are longer than the slices in which rows are summed.
SHAPES = {
    "square": (24, 24, 4),
    "wide": (12, 40, 5),
    "tall": (40, 12, 5),
    "rank 1": (15, 20, 1),
    "rank above width": (20, 6, 9),
    "rank above both": (6, 9, 14),
    "one row": (1, 5, 3),
    "one column": (5, 1, 3),
    "long b": (2100, 7, 3),
    "long a": (7, 2100, 3),
}


def draw(out: int, width: int, rank: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((out, rank)).astype(dtype),
        rng.standard_normal((rank, width)).astype(dtype),
    )


def product(b: np.ndarray, a: np.ndarray, scale: Any = 1.0) -> np.ndarray:
    return (b.astype(np.float64) * scale) @ a.astype(np.float64)


def conditioned(rows: int, columns: int, condition: float, seed: int) -> np.ndarray:
    """A matrix with singular values from 1 down to 1/condition, in random directions."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    return (left * np.geomspace(1, 1 / condition, columns)) @ right.T


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Factors of each kind of shape, and of each kind of values."""
    if name in SHAPES:
        return draw(*SHAPES[name])
    b, a = draw(30, 20, 6)
    if name == "float16":
        return b.astype(np.float16), a.astype(np.float16)
    if name == "zero-padded":
        b[:, 3:], a[4:] = 0, 0
    elif name == "zeros in both":  # different ones
        b[:, 1], a[4] = 0, 0
    elif name == "duplicated":
        b[:, 3:], a[3:] = b[:, :3], a[:3]
    elif name == "duplicated columns":  # the rows differ
        b[:, 3:] = b[:, :3]
    elif name == "small b, large a":
        b, a = b * np.float32(1e-3), a * np.float32(1e3)
    elif name == "columns far apart":  # one adapter's factors, rebalanced
        b[:, :2] *= np.float32(1e6)
        a[:2] *= np.float32(1e-6)
    elif name == "columns very far apart":
        b[:, :2] *= np.float32(1e15)
        a[:2] *= np.float32(1e-15)
    elif name == "tiny":
        b, a = b * np.float32(1e-18), a * np.float32(1e-18)
    elif name == "huge":
        b, a = b * np.float32(1e18), a * np.float32(1e18)
    return b, a


CASES = [
    *SHAPES, "float16", "zero-padded", "zeros in both", "duplicated", "duplicated columns",
    "small b, large a", "columns far apart", "columns very far apart", "tiny",
    "huge",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decomposition_is_the_dense_svd(name: str) -> None:
    """Singular values, their number, the energy and the product are those of the dense SVD."""
    b, a = inputs(name)
    dense = product(b, a)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a)
    # Of 30-term sums and conditions near 10, 1e-12 is a thousandfold of float64's rounding.
    size = expected[0]
    assert len(found.values) == np.count_nonzero(expected > NEGLIGIBLE * size)
    assert np.allclose(found.values, expected[: len(found.values)], rtol=0, atol=1e-12 * size)
    assert found.energy == pytest.approx(np.sum(dense**2), rel=1e-12, abs=0)
    new_b, new_a = found.factors()
    assert np.abs(new_b @ new_a - dense).max() <= 1e-12 * size


@pytest.mark.parametrize("name", CASES)
def test_factors_are_balanced_and_orthogonal(name: str) -> None:
    """Columns of b and rows of a are orthogonal, with √σ as their lengths."""
    found = decompose(*inputs(name))
    b, a = found.factors()
    wanted = np.diag(found.values)
    # Orthogonality is lost by ε·κ², and κ of these factors is below 100.
    assert np.abs(b.T @ b - wanted).max() <= 1e-11 * found.values[0]
    assert np.abs(a @ a.T - wanted).max() <= 1e-11 * found.values[0]


@pytest.mark.parametrize("name", CASES)
def test_every_cut_is_optimal(name: str) -> None:
    """Cut to rank k, the error is that of Eckart and Young, the singular values left out."""
    b, a = inputs(name)
    dense = product(b, a)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a)
    for rank in range(1, len(found.values) + 2):
        new_b, new_a = found.factors(rank)
        assert new_b.shape[1] == new_a.shape[0] == min(rank, len(found.values))
        error = np.linalg.norm(dense - new_b @ new_a)
        optimum = np.linalg.norm(expected[rank:])
        assert error == pytest.approx(optimum, rel=1e-10, abs=1e-12 * expected[0])


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1),
    st.floats(-6, 6), st.floats(-6, 6), st.booleans(),
)  # fmt: skip
def test_any_shape_and_size(
    out: int, width: int, rank: int, seed: int, size_b: float, size_a: float, sparse: bool
) -> None:
    """Any shape, sizes up to 1e12 apart and dead columns give the dense singular values."""
    b, a = draw(out, width, rank, seed)
    b, a = b * np.float32(10**size_b), a * np.float32(10**size_a)
    if sparse:
        b[:, ::2], a[::3] = 0, 0
    dense = product(b, a)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a)
    assert np.all(np.diff(found.values) <= 0)
    values = np.zeros(max(len(expected), len(found.values)))
    values[: len(found.values)] = found.values
    # A value may lie on the threshold of what is negligible: then it is left out on one side.
    atol = 1e-10 * np.linalg.norm(b) * np.linalg.norm(a)
    assert np.allclose(values[: len(expected)], expected, rtol=0, atol=atol)
    new_b, new_a = found.factors()
    assert np.abs(new_b @ new_a - dense).max() <= atol


@pytest.mark.parametrize("scale", [1.0, -2.5, 1e6, 1e-6, "each"])
def test_scales(scale: Any) -> None:
    """One scale for all ranks, or one for each, of either sign or zero, multiplies the product."""
    b, a = draw(20, 30, 5)
    factor = np.array([1.0, -3.0, 0.0, 1e3, 0.5]) if scale == "each" else scale
    dense = product(b, a, factor)
    expected = np.linalg.svd(dense, compute_uv=False)
    found = decompose(b, a, factor)
    new_b, new_a = found.factors()
    assert len(found.values) == (4 if scale == "each" else 5)
    kept = expected[: len(found.values)]
    assert np.allclose(found.values, kept, rtol=0, atol=1e-12 * expected[0])
    assert np.abs(new_b @ new_a - dense).max() <= 1e-12 * expected[0]


@pytest.mark.parametrize("zero", ["b", "a", "both", "scale", "no ranks"])
def test_zero_products_are_empty_without_warnings(zero: str) -> None:
    """A product that is zero has no singular values, factors without columns, and no NaN."""
    b, a = draw(20, 30, 0 if zero == "no ranks" else 4)
    b = b * (zero not in ("b", "both"))
    a = a * (zero not in ("a", "both"))
    with np.errstate(all="raise"):
        found = decompose(b, a, 0.0 if zero == "scale" else 1.0)
        new_b, new_a = found.factors()
    assert found.values.shape == (0,)
    assert found.energy == 0.0
    assert (new_b.shape, new_a.shape) == ((20, 0), (0, 30))


@pytest.mark.parametrize("size", [1.0, 1e6, 1e-12])
def test_exact_cancellation_is_zero(size: float) -> None:
    """Two adapters that cancel leave nothing, not float64's noise."""
    b, a = draw(50, 40, 8)
    b = b * np.float32(size)
    found = decompose(np.concatenate([b, b], 1), np.concatenate([a, -a]))
    assert found.values.shape == (0,)
    assert found.energy == 0.0


def test_what_a_cancellation_leaves_is_kept() -> None:
    """Beside two adapters that cancel, a third a thousand times smaller is found as it is."""
    b, a = draw(50, 40, 4)
    small_b, small_a = draw(50, 40, 3, seed=1)
    small_b = small_b * np.float32(1e-3)
    found = decompose(*stacked([(b, a), (b, -a), (small_b, small_a)]))
    expected = np.linalg.svd(product(small_b, small_a), compute_uv=False)[:3]
    # Rounding is that of the large adapters, a thousand times more here.
    assert np.allclose(found.values, expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("ratio", "kept"), [(2 * NEGLIGIBLE, 2), (NEGLIGIBLE / 2, 1), (1e-7, 2), (1e-8, 1)]
)
def test_negligible_values_count_as_energy_only(ratio: float, kept: int) -> None:
    """Singular values below 2⁻²⁴ of the largest are left out of `values`, but not of `energy`."""
    b, a = np.zeros((5, 2)), np.zeros((2, 6))
    b[0, 0] = b[1, 1] = a[0, 0] = 1.0
    a[1, 3] = ratio
    found = decompose(b, a)
    assert np.allclose(found.values, [1.0, ratio][:kept], rtol=1e-14)
    assert found.energy == pytest.approx(1 + ratio**2, rel=1e-15)


def test_many_negligible_values_add_up() -> None:
    """The energy is of all that is no noise: 200 values of 2⁻²⁵ make 200·2⁻⁵⁰ more."""
    b, a = np.eye(201), np.diag([1.0, *[2.0**-25] * 200])
    found = decompose(b, a)
    assert len(found.values) == 1
    assert found.energy - 1 == pytest.approx(200 * 2.0**-50, rel=1e-2, abs=0)


@pytest.mark.parametrize("condition", [1e1, 1e3, 5e3, 1e5, 1e7, 1e10])
@pytest.mark.parametrize("which", ["b", "a", "both"])
def test_ill_conditioned_factors(
    condition: float, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Cholesky or by QR, what is lost of the product is what is negligible in it."""
    calls: list[str] = []
    qr = np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda *args, **kw: calls.append("qr") or qr(*args, **kw))
    rng = np.random.default_rng(3)
    b, a = conditioned(60, 6, condition, 1), conditioned(50, 6, condition, 2).T
    b = b if which in ("b", "both") else rng.standard_normal((60, 6))
    a = a if which in ("a", "both") else rng.standard_normal((6, 50))
    calls.clear()
    found = decompose(b, a)
    assert bool(calls) == (condition > 1e4)
    assert len(calls) == (0 if condition < 1e4 else 2 if which == "both" else 1)
    dense = product(b, a)
    norm = float(np.linalg.norm(dense))
    expected = np.linalg.svd(dense, compute_uv=False)
    dropped = expected[expected <= NEGLIGIBLE * expected[0]]
    assert len(found.values) == len(expected) - len(dropped)
    new_b, new_a = found.factors()
    error = float(np.linalg.norm(new_b @ new_a - dense))
    assert error <= np.linalg.norm(dropped) + 1e-12 * norm
    kept = expected[: len(found.values)]
    assert np.allclose(found.values, kept, rtol=0, atol=1e-12 * norm)


@pytest.mark.parametrize("shape", [(40, 5), (5, 5), (4, 9), (1, 3), (2500, 3), (6, 0), (0, 4)])
@pytest.mark.parametrize("kind", ["random", "ill", "repeated", "zero columns", "zero"])
def test_triangle_has_the_gram_matrix(shape: tuple[int, int], kind: str) -> None:
    """RᵀR = MᵀM for any M, and R has no more rows than M has columns."""
    m = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if kind == "ill" and shape[1] > 1:
        m[:, 1] = m[:, 0] * np.float32(1 + 1e-6)
    elif kind == "repeated":
        m[:, 1:] = m[:, :1]
    elif kind == "zero columns":
        m[:, ::2] = 0
    elif kind == "zero":
        m[:] = 0
    root = triangle(m)
    wide = m.astype(np.float64)
    assert root.shape[1] == shape[1]
    assert root.shape[0] <= shape[1]
    gram = wide.T @ wide
    assert np.allclose(root.T @ root, gram, rtol=1e-12, atol=1e-13 * np.abs(gram).max(initial=0))


def test_stacked_factors_are_the_sum() -> None:
    """Side by side and above each other, in order, factors of the sum of the products."""
    pairs = [draw(9, 7, r, seed=r) for r in (1, 4, 2)]
    b, a = stacked(pairs)
    assert np.array_equal(b[:, 1:5], pairs[1][0])
    assert np.array_equal(a[1:5], pairs[1][1])
    wanted = sum(product(*p) for p in pairs)
    assert np.allclose(product(b, a), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SHAPES)
def test_inner_product_is_the_dense_one(name: str) -> None:
    """⟨B₁A₁, B₂A₂⟩ is the sum of products over the dense matrices, ranks unequal."""
    out, width, rank = SHAPES[name]
    one, two = draw(out, width, rank), draw(out, width, rank + 3, seed=1)
    wanted = float(np.sum(product(*one) * product(*two)))
    size = float(np.linalg.norm(product(*one)) * np.linalg.norm(product(*two)))
    assert inner(one, two) == pytest.approx(wanted, abs=1e-13 * size)
    assert inner(two, one) == pytest.approx(wanted, abs=1e-13 * size)
    between = one[0].astype(np.float64).T @ two[0].astype(np.float64)
    found = crossed(one[0], two[0])
    assert np.allclose(found, between, rtol=1e-12, atol=1e-13 * np.abs(between).max())


# Dense matrices


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_truncated_svd_is_the_best_of_its_rank(shape: tuple[int, int], dtype: Any) -> None:
    """Every rank, also one above the matrix's, gives Eckart and Young's error, balanced."""
    dense = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    wide = dense.astype(np.float64)
    values = np.linalg.svd(wide, compute_uv=False)
    for rank in (1, 3, min(shape), 100):
        left, right, energy = truncated_svd(dense, rank)
        kept = min(rank, *shape)
        assert (left.shape, right.shape) == ((shape[0], kept), (kept, shape[1]))
        assert energy == pytest.approx(np.sum(wide**2), rel=1e-13)
        error = np.linalg.norm(wide - left @ right)
        # Squares of singular values are good to ε, relative to the largest.
        optimum = np.linalg.norm(values[rank:])
        assert error == pytest.approx(optimum, rel=1e-10, abs=1e-12 * values[0])
        for gram in (left.T @ left, right @ right.T):
            assert np.allclose(gram, np.diag(values[:kept]), rtol=0, atol=1e-11 * values[0])


def test_truncated_svd_leaves_out_what_drowns() -> None:
    """Singular values far below 1e-7 of the largest are rounding, and get no rank."""
    b, a = conditioned(40, 3, 10, 0), conditioned(30, 3, 10, 1).T
    noise = 1e-10 * np.random.default_rng(2).standard_normal((40, 30))
    left, right, _ = truncated_svd(b @ a + noise, 20)
    assert left.shape[1] == right.shape[0] == 3
    assert np.abs(left @ right - b @ a).max() < 1e-9


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_truncated_svd_keeps_weak_directions(shape: tuple[int, int]) -> None:
    """Singular values down to 1e-6 of the largest are kept, and the product with them."""
    values = np.array([1.0, 1e-2, 1e-4, 1e-6])
    dense = conditioned(6, 4, 1.0, 0) * values @ conditioned(4, 4, 1.0, 1)
    dense = dense if shape == (6, 4) else dense.T
    left, right, _ = truncated_svd(dense, 4)
    assert left.shape[1] == 4
    assert np.abs(left @ right - dense).max() <= 1e-14


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_truncated_svd_of_zero_is_empty(shape: tuple[int, int]) -> None:
    """A zero matrix, as pruning may leave, gives no columns and no warning."""
    with np.errstate(all="raise"):
        left, right, energy = truncated_svd(np.zeros(shape, np.float32), 3)
    assert (left.shape, right.shape, energy) == ((shape[0], 0), (0, shape[1]), 0.0)


# Ranks


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


# Angles


def orthonormal(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    kept = s > NEGLIGIBLE * s[0]
    return u[:, kept], vt[kept].T


def same(found: np.ndarray, wanted: np.ndarray, atol: float = 1e-11) -> bool:
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SHAPES)
def test_angles_are_those_of_the_dense_matrices(name: str) -> None:
    """cos² of the principal angles of columns and rows, and the inner product, ranks unequal."""
    out, width, rank = SHAPES[name]
    one, two = draw(out, width, rank), draw(out, width, rank + 2, seed=1)
    columns, rows, found = angles_and_product(decompose(*one, 2.0), decompose(*two, -0.5))
    dense_one, dense_two = 2.0 * product(*one), -0.5 * product(*two)
    (u1, v1), (u2, v2) = orthonormal(dense_one), orthonormal(dense_two)
    # Bases are good to ε·κ², and κ of these factors is below 100.
    assert same(columns, np.linalg.svd(u1.T @ u2, compute_uv=False) ** 2)
    assert same(rows, np.linalg.svd(v1.T @ v2, compute_uv=False) ** 2)
    size = float(np.linalg.norm(dense_one) * np.linalg.norm(dense_two))
    assert found == pytest.approx(float(np.sum(dense_one * dense_two)), abs=1e-13 * size)


def test_known_angles() -> None:
    """Vectors 60° apart have cos² = ¼, equal ones 1 and orthogonal ones 0."""
    b = np.array([[1.0], [0.0], [0.0]])
    turned = np.array([[0.5], [math.sqrt(0.75)], [0.0]])
    row = np.array([[3.0, 0.0]])
    columns, rows, found = angles_and_product(decompose(b, row), decompose(2 * turned, row))
    assert columns == pytest.approx([0.25], abs=1e-15)
    assert rows == pytest.approx([1.0], abs=1e-15)
    assert found == pytest.approx(9.0, rel=1e-14)
    columns, rows, found = angles_and_product(
        decompose(b, row), decompose(np.array([[0.0], [0.0], [1.0]]), row)
    )
    assert (columns[0], rows[0], found) == (0.0, pytest.approx(1.0), 0.0)


def test_equal_spaces_have_no_angle() -> None:
    """The cosines of a product with itself are 1, never above, and its product is the energy."""
    found = decompose(*draw(30, 20, 6))
    columns, rows, squared = angles_and_product(found, found)
    for cosines in (columns, rows):
        assert same(cosines, np.ones(6))
        assert cosines.max() <= 1.0
    assert squared == pytest.approx(found.energy, rel=1e-12)


def test_partly_shared_space() -> None:
    """Of two spaces that share two directions and nothing else, two cosines are 1, the rest 0."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))[0]
    a1, a2 = draw(1, 20, 4, 1)[1], draw(1, 20, 5, 2)[1]
    columns, _, _ = angles_and_product(decompose(q[:, :4], a1), decompose(q[:, 2:7], a2))
    assert same(columns, np.array([1.0, 1.0, 0.0, 0.0]))


def test_angles_do_not_depend_on_the_factors() -> None:
    """B·G and G⁻¹·A give what B and A do, with a G of condition 1000."""
    one, two = draw(30, 20, 5, dtype=np.float64), draw(30, 20, 4, 1, np.float64)
    g = conditioned(5, 5, 1000, 3)
    again = one[0] @ g, np.linalg.solve(g, one[1])
    plain = angles_and_product(decompose(*one), decompose(*two))
    other = angles_and_product(decompose(*again), decompose(*two))
    # ε·κ² of the factors; κ² = 1e6.
    assert same(other[0], plain[0], 1e-9)
    assert same(other[1], plain[1], 1e-9)
    size = float(np.linalg.norm(product(*one)) * np.linalg.norm(product(*two)))
    assert other[2] == pytest.approx(plain[2], abs=1e-9 * size)


def test_angles_with_a_zero_product() -> None:
    """A zero delta has no directions, so no angles, and the inner product is 0."""
    zero = decompose(np.zeros((9, 2)), np.zeros((2, 7)))
    other = decompose(*draw(9, 7, 3))
    for pair in ((zero, other), (other, zero), (zero, zero)):
        columns, rows, found = angles_and_product(*pair)
        assert (columns.shape, rows.shape, found) == ((0,), (0,), 0.0)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_effective_rank_is_the_exponential_of_the_entropy(values: list[float]) -> None:
    """e^H of the shares, summed one by one; between 1 and the number of values."""
    total = math.fsum(values)
    entropy = -math.fsum(v / total * math.log(v / total) for v in values)
    found = effective_rank(np.array(values))
    assert found == pytest.approx(math.exp(entropy), rel=1e-12)
    assert 1 - 1e-12 <= found <= len(values) * (1 + 1e-12)


def test_effective_rank_of_equal_values_and_of_none() -> None:
    """r equal values have effective rank r, none have 0."""
    assert effective_rank(np.full(7, 0.3)) == pytest.approx(7, rel=1e-14)
    assert effective_rank(np.zeros(0)) == 0.0


# Intruders

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


# Rounding to the dtypes of files

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def awkward() -> np.ndarray:
    """float32 numbers at and beside ties, at both ends of every range, and random bits."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    numbers = bits.view(np.float32)
    one = np.arange(0x3F80_0000, 0x3F84_0000, 0x40, np.uint32).view(np.float32)  # 1 … 1.03
    around = np.array([
        65504, 65519, 65519.996, 65520, 65521, 65536, 1e30, 3.3895314e38, 3.3961775e38,
        3.3961776e38, 3.4028235e38, np.inf, 0.0,
        2.0**-14, 2.0**-15, 2.0**-24, 2.0**-25, 2.0**-26, 3 * 2.0**-25, 5 * 2.0**-25, 2.0**-126,
        2.0**-127, 2.0**-133, 2.0**-134, 3 * 2.0**-134, 5 * 2.0**-134, 2.0**-149, 3 * 2.0**-149,
        1.0009766, 1.00048828125, 1.00146484375, 1.00390625, 1.01171875,
    ], np.float32)  # fmt: skip
    with np.errstate(over="ignore", under="ignore"):
        near = np.concatenate([around, np.nextafter(around, 0), np.nextafter(around, np.inf)])
    numbers = np.concatenate([numbers[np.isfinite(numbers)], one, near])
    return np.concatenate([numbers, -numbers])


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_rounding_is_that_of_torch(dtype: str) -> None:
    """To nearest, ties to even, with subnormals, signed zeros and overflow to infinity."""
    values = awkward()
    wanted = torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint8).numpy()
    with np.errstate(all="raise"):
        found = as_bytes(values, dtype)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_float64_and_strides(dtype: str) -> None:
    """float64 values, transposed, sliced or none at all, come in row-major order."""
    values = np.random.default_rng(0).standard_normal((5, 8))
    for array in (values, values.T, values[::2, ::-3], values[:0], values.astype(np.float16)):
        # torch's own way from float64 goes through float32 as well, but for F64.
        plain = torch.from_numpy(np.ascontiguousarray(array))
        wanted = plain.to(TORCH[dtype]).flatten().view(torch.uint8).numpy()
        assert np.array_equal(as_bytes(array, dtype), wanted)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_encoded_factors_are_rows(dtype: str) -> None:
    """`a` and then `b` transposed, so that each rank is a run of both."""
    b, a = draw(7, 5, 3, dtype=np.float64)
    wanted = [torch.from_numpy(x).to(TORCH[dtype]).flatten() for x in (a, b.T.copy())]
    found = encode("layer.q", b, a, dtype)
    assert np.array_equal(found, torch.cat(wanted).view(torch.uint8).numpy())
    assert encode("layer.q", b[:, :0], a[:0], dtype).size == 0


@pytest.mark.parametrize(
    ("dtype", "most", "less"),
    [("F16", 65520.0, 65519.9), ("BF16", 3.3962e38, 3.3961e38), ("F32", 3.41e38, 3.4028234e38)],
)
@pytest.mark.parametrize("half", ["A", "B"])
def test_overflow_is_refused_where_it_would_round_to_infinity(
    dtype: str, most: float, less: float, half: str
) -> None:
    """Values that still round to the largest number pass; larger ones and NaN are refused."""
    for value, fits in ((less, True), (-less, True), (most, False), (-most, False)):
        b, a = draw(7, 5, 3, dtype=np.float64)
        (a if half == "A" else b)[1, 2] = value
        if fits:
            raw = torch.from_numpy(encode("layer.q", b, a, dtype)).view(TORCH[dtype])
            assert torch.isfinite(raw).all()
        else:
            with pytest.raises(ValueRangeError, match=rf"layer\.q: lora_{half} has values up to"):
                encode("layer.q", b, a, dtype)
    b[:], a[:] = 1, 1
    (a if half == "A" else b)[0, 0] = np.nan
    with pytest.raises(ValueRangeError):
        encode("layer.q", b, a, dtype)


def test_a_decomposition_keeps_its_factors_untouched() -> None:
    """Inputs are not written to, neither by the SVD nor by taking factors."""
    b, a = draw(20, 30, 4)
    copies = b.copy(), a.copy()
    found = decompose(b, a, 3.0)
    assert isinstance(found, Decomposition)
    found.factors(2)
    assert np.array_equal(b, copies[0])
    assert np.array_equal(a, copies[1])

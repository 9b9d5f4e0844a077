"""Every way to combine adapters, against its definition on dense float64 matrices.

The oracles use numpy only, and full SVDs of `[out, in]` matrices. Bases are known up to signs, so
products are compared; where the methods keep PEFT's factors, those are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.linalg.methods import METHODS, Combined, Settings, Term
from loratool.linalg.sparsify import agreed, magnitude_pruned, randomly_pruned, weighted_sum

NEGLIGIBLE = 2.0**-24
EPS32 = 2.0**-23
PATH = "model.layers.0.q_proj"

#: out, in, and the ranks of the adapters.
SHAPES: dict[str, tuple[int, int, list[int]]] = {
    "square": (24, 24, [4, 4]),
    "wide": (12, 40, [4, 4]),
    "tall": (40, 12, [4, 4]),
    "rank 1": (15, 20, [1, 1]),
    "rank above width": (20, 6, [9, 9]),
    "rank above both": (6, 9, [10, 10]),
    "unequal ranks": (20, 30, [2, 6, 3]),
    "one adapter": (20, 18, [5]),
    "three adapters": (20, 18, [3, 3, 3]),
    "more adapters than rows": (3, 14, [1, 1, 1, 1, 1]),
    "long": (1100, 6, [2, 2]),
    "broad": (6, 1100, [2, 2]),
}
CASES = [
    *SHAPES, "negative weights", "all negative", "float16 values", "zero-padded",
    "repeated rows of a", "duplicated", "duplicated thrice", "columns far apart",
    "factors far apart", "adapters far apart",
]  # fmt: skip


def terms_of(case: str) -> list[Term]:
    """The adapters of a case, float32, with weights and scales that float32 must round."""
    out, width, ranks = SHAPES.get(case, (20, 16, [3, 3, 3]))
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    weights, scales = [0.7, 1.3, 0.4, 0.9, 1.1], [2.0, 0.3, 1.1, 0.7, 1.9]
    if case == "negative weights":
        weights = [0.7, -1.3, 0.4]
    elif case == "all negative":
        weights = [-0.7, -1.3, -0.4]
    terms = []
    for i, rank in enumerate(ranks):
        b = rng.standard_normal((out, rank)).astype(np.float32)
        a = rng.standard_normal((rank, width)).astype(np.float32)
        if case == "float16 values":
            b, a = (x.astype(np.float16).astype(np.float32) for x in (b, a))
        elif case == "zero-padded":
            b[:, 3 - i :], a[3 - i :] = 0, 0
        elif case == "repeated rows of a":  # B has more directions than the deltas
            a[2] = a[1]
        elif case == "columns far apart" and i == 1:
            b[:, 0] *= np.float32(1e6)
            a[0] *= np.float32(1e-6)
        elif case == "factors far apart":
            b, a = b * np.float32(1e-3), a * np.float32(1e3)
        elif case == "adapters far apart" and i == 1:
            b = b * np.float32(1e-4)
        elif case.startswith("duplicated") and i in ((1,) if case == "duplicated" else (1, 2)):
            b, a = terms[0].b.copy(), terms[0].a.copy()
        # Indices with gaps: adapters that lack the module or have weight 0 are left out.
        terms.append(Term(2 * i + 1, weights[i], scales[i], b, a))
    return terms


def delta(t: Term) -> np.ndarray:
    return t.scale * (t.b.astype(np.float64) @ t.a.astype(np.float64))


def product(found: Combined) -> np.ndarray:
    return found.b.astype(np.float64) @ found.a.astype(np.float64)


def size(terms: Sequence[Term]) -> float:
    """What rounding is relative to: Σ |wᵢsᵢ|·‖Bᵢ‖·‖Aᵢ‖, column by row."""
    total = 0.0
    for t in terms:
        lengths = np.linalg.norm(t.b.astype(np.float64), axis=0)
        lengths = lengths * np.linalg.norm(t.a.astype(np.float64), axis=1)
        total += abs(t.weight * t.scale) * float(lengths.sum())
    return total


# The definitions


def largest(x: np.ndarray, density: float) -> np.ndarray:
    """int(density·n) entries of largest magnitude, of equal ones the first."""
    kept = np.argsort(-np.abs(x), axis=None, kind="stable")[: int(density * x.size)]
    result = np.zeros_like(x)
    result.flat[kept] = x.flat[kept]
    return result


def dropped(x: np.ndarray, chosen: Settings, index: int, number: int) -> np.ndarray:
    """DARE with the documented stream of random numbers, which old results depend on."""
    if chosen.density >= 1:
        return x
    entropy = [chosen.seed, zlib.crc32(chosen.path.encode()), index, number]
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    mask = random.random(x.shape, dtype=np.float32) < chosen.density
    return np.where(mask, x / chosen.density, 0.0)


def elected(xs: Sequence[np.ndarray], weights: Sequence[float], how: str) -> np.ndarray:
    """TIES, entry by entry."""
    result = np.zeros_like(xs[0])
    for place in np.ndindex(xs[0].shape):
        entries = [x[place] for x in xs]
        vote = sum(entries) if how == "total" else sum(np.sign(e) for e in entries)
        sign = 1 if vote >= 0 else -1
        agreeing = [(w, e) for w, e in zip(weights, entries, strict=True) if e * sign > 0]
        result[place] = sum(w * e for w, e in agreeing) / max(1, len(agreeing))
    return result


def ruled(
    name: str, xs: Sequence[np.ndarray], weights: Sequence[float], terms: Sequence[Term],
    chosen: Settings, number: int = 0,
) -> np.ndarray:  # fmt: skip
    """The rule that the method's name says, on one array per adapter."""
    if name.startswith("dare"):
        xs = [dropped(x, chosen, t.index, number) for x, t in zip(xs, terms, strict=True)]
    elif "ties" in name or name.startswith("magnitude_prune"):
        xs = [largest(x, chosen.density) for x in xs]
    if "ties" in name:
        return elected(xs, weights, chosen.majority_sign_method)
    return np.sum([w * x for w, x in zip(weights, xs, strict=True)], axis=0)


def left_basis(matrix: np.ndarray) -> np.ndarray:
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    return u[:, s > NEGLIGIBLE * s[0]]


def core_oracle(name: str, terms: Sequence[Term], chosen: Settings) -> np.ndarray:
    u = left_basis(np.hstack([t.b for t in terms]).astype(np.float64))
    v = left_basis(np.vstack([t.a for t in terms]).T.astype(np.float64))
    cores = [u.T @ delta(t) @ v for t in terms]
    return u @ ruled(name, cores, [t.weight for t in terms], terms, chosen) @ v.T


def knots_oracle(terms: Sequence[Term], chosen: Settings) -> np.ndarray:
    u, s, vt = np.linalg.svd(np.hstack([delta(t) for t in terms]), full_matrices=False)
    kept = s > NEGLIGIBLE * s[0]
    parts = np.split(s[kept, None] * vt[kept], len(terms), axis=1)
    return u[:, kept] @ ruled("ties", parts, [t.weight for t in terms], terms, chosen)


def polar(x: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-6 * s[0]  # of exact copies it is 1e-16
    assert np.all(s[kept] > 1e-3 * s[0])
    return u[:, kept] @ vt[kept]


def tsv_oracle(terms: Sequence[Term]) -> np.ndarray:
    columns, sizes, rows = [], [], []
    for t in terms:
        u, s, vt = np.linalg.svd(t.weight * delta(t), full_matrices=False)
        share = max(1, min(len(u), len(vt[0])) // len(terms))
        share = min(share, int(np.count_nonzero(s > NEGLIGIBLE * s[0])))
        columns.append(u[:, :share])
        sizes.append(s[:share])
        rows.append(vt[:share].T)
    return polar(np.hstack(columns)) * np.concatenate(sizes) @ polar(np.hstack(rows)).T


def iso_oracle(terms: Sequence[Term]) -> np.ndarray:
    u, s, vt = np.linalg.svd(sum(t.weight * delta(t) for t in terms), full_matrices=False)
    kept = s > NEGLIGIBLE * s[0]
    return s[kept].mean() * u[:, kept] @ vt[kept]


# Every method on every case


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["sum", "svd", "cat"])
def test_exact_sums(name: str, case: str) -> None:
    """`Σ wᵢsᵢBᵢAᵢ` to float64's rounding, in factors of all the ranks together."""
    terms = terms_of(case)
    found = METHODS[name](terms, Settings(PATH, 2))
    wanted = sum(t.weight * delta(t) for t in terms)
    assert np.abs(product(found) - wanted).max() <= 1e-15 * size(terms)
    assert found.b.shape[1] == found.a.shape[0] == sum(t.a.shape[0] for t in terms)
    assert found.energy is None


def test_cat_is_the_factors_one_after_the_other() -> None:
    """B is the Bᵢ untouched, as in PEFT, and A the Aᵢ with all of the weight and the scale."""
    terms = terms_of("unequal ranks")
    found = METHODS["cat"](terms, Settings(PATH, 2))
    assert np.array_equal(found.b, np.hstack([t.b for t in terms]))
    rows = [np.float64(t.weight * t.scale) * t.a.astype(np.float64) for t in terms]
    assert np.array_equal(found.a, np.vstack(rows))


FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "total") for name in FACTORS), ("ties", "frequency"), ("dare_ties", "frequency")],
)
def test_rules_on_factors(name: str, how: str, case: str) -> None:
    """The rule on the A and on the B, with roots of weights and the sign on A, as in PEFT."""
    terms = terms_of(case)
    chosen = Settings(PATH, 2, density=0.55, majority_sign_method=how, seed=3)
    found = METHODS[name](terms, chosen)
    rank = max(t.a.shape[0] for t in terms)
    assert (found.b.shape[1], found.a.shape[0]) == (rank, rank)
    products = [t.weight * t.scale for t in terms]
    roots = np.sqrt(np.abs(products))
    for number, got in ((0, found.a), (1, found.b.T)):
        plain = [(t.b.T if number else t.a).astype(np.float64) for t in terms]
        weights = roots if number else roots * np.sign(products)
        # The rules but for padding: it comes after pruning, so that it does not count.
        if name.startswith("dare"):
            xs = [dropped(x, chosen, t.index, number) for x, t in zip(plain, terms, strict=True)]
        elif name == "linear":
            xs = plain
        else:
            xs = [largest(x, chosen.density) for x in plain]
        xs = [np.pad(x, [(0, rank - len(x)), (0, 0)]) for x in xs]
        wanted = sum(w * x for w, x in zip(weights, xs, strict=True))
        if "ties" in name:
            wanted = elected(xs, list(weights), how)
        # Each summand is rounded with its weight, the quotients, and each sum once.
        rounding = sum(abs(w * x) for w, x in zip(weights, xs, strict=True))
        assert np.all(np.abs(got - wanted) <= (len(terms) + 3) * EPS32 * rounding)


DENSE = ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("name", DENSE)
def test_rules_on_dense_deltas(name: str, density: float, case: str) -> None:
    """The best approximation of its rank to what the rule makes of the dense deltas."""
    terms = terms_of(case)
    chosen = Settings(PATH, 2, density=density, seed=3)
    weights = [t.weight for t in terms]
    wanted = ruled(name, [delta(t) for t in terms], weights, terms, chosen)
    values = np.linalg.svd(wanted, compute_uv=False)
    # Deltas are float32 products with sums of up to 10; DARE divides by the density.
    atol = 4 * EPS32 * size(terms) / density
    for rank in (1, 3, 100):
        found = METHODS[name](terms, replace(chosen, rank=rank))
        assert found.b.shape[1] == found.a.shape[0] <= min(rank, *wanted.shape)
        error = np.linalg.norm(wanted - product(found))
        assert abs(error - np.linalg.norm(values[rank:])) <= atol
        assert found.energy is not None
        assert abs(np.sqrt(found.energy) - np.linalg.norm(wanted)) <= atol


@pytest.mark.parametrize("name", ["ties_svd", "dare_ties_svd"])
def test_dense_election_by_frequency(name: str) -> None:
    """The sign that most of three adapters have wins, not that of the largest sum."""
    terms = terms_of("three adapters")
    chosen = Settings(PATH, 100, density=0.8, majority_sign_method="frequency")
    weights = [t.weight for t in terms]
    wanted = ruled(name, [delta(t) for t in terms], weights, terms, chosen)
    other = ruled(
        name, [delta(t) for t in terms], weights, terms,
        replace(chosen, majority_sign_method="total"),
    )  # fmt: skip
    found = product(METHODS[name](terms, chosen))
    atol = 4 * EPS32 * size(terms) / 0.8
    assert np.abs(found - wanted).max() <= atol
    assert np.abs(found - other).max() > 100 * atol


def rounding(terms: Sequence[Term]) -> float:
    """ε times the condition of the bases, relative to the largest delta; DARE may divide by 0.4."""
    conditions = []
    for stack in ([t.b for t in terms], [t.a.T for t in terms]):
        values = np.linalg.svd(np.hstack(stack).astype(np.float64), compute_uv=False)
        kept = values[values > NEGLIGIBLE * values[0]]
        conditions.append(kept[0] / kept[-1])
    return 100 * 2.0**-52 * max(conditions) * size(terms)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("name", ["ties_core", "dare_linear_core", "dare_ties_core"])
def test_rules_in_core_space(name: str, density: float, case: str) -> None:
    """U_B·rule(U_Bᵀ·(sᵢBᵢAᵢ)·V_A)·V_Aᵀ with the bases of the stacked factors."""
    terms = terms_of(case)
    chosen = Settings(PATH, 2, density=density, seed=3)
    found = METHODS[name](terms, chosen)
    wanted = core_oracle(name, terms, chosen)
    assert np.abs(product(found) - wanted).max() <= rounding(terms)
    assert found.energy is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_knots_ties(density: float, case: str) -> None:
    """U·TIES(Σ·Vᵢᵀ) with the SVD of the deltas side by side."""
    terms = terms_of(case)
    chosen = Settings(PATH, 2, density=density)
    found = METHODS["knots_ties"](terms, chosen)
    wanted = knots_oracle(terms, chosen)
    assert np.abs(product(found) - wanted).max() <= rounding(terms)


@pytest.mark.parametrize("name", ["ties_core", "dare_ties_core", "knots_ties"])
def test_election_by_frequency_in_a_basis(name: str) -> None:
    """Signs of three adapters without zeros have a majority in any basis, which wins."""
    terms = terms_of("three adapters")
    chosen = Settings(PATH, 2, density=1.0, majority_sign_method="frequency")
    total = replace(chosen, majority_sign_method="total")
    oracle = (
        (lambda s: knots_oracle(terms, s))
        if name == "knots_ties"
        else (lambda s: core_oracle(name, terms, s))
    )
    found = product(METHODS[name](terms, chosen))
    assert np.abs(found - oracle(chosen)).max() <= rounding(terms)
    assert np.abs(found - oracle(total)).max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_tsv_m(case: str) -> None:
    """Σ of all tasks between the polar factors of their singular vectors."""
    terms = terms_of(case)
    found = METHODS["tsv_m"](terms, Settings(PATH, 2))
    wanted = tsv_oracle(terms)
    # The Gram matrix of the vectors has the square of their condition, which is below 300 here.
    atol = 1e-10 if case in ("rank above width", "rank above both") else 1e-12
    assert np.abs(product(found) - wanted).max() <= atol * size(terms)


def test_tsv_m_of_orthogonal_tasks_is_their_sum() -> None:
    """Where the tasks share no direction there is nothing to make orthogonal."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    v = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    terms = [
        Term(i, 0.5 + i, 2.0, u[:, 4 * i : 4 * i + 4], v[:, 4 * i : 4 * i + 4].T * (1 + i))
        for i in range(3)
    ]
    found = METHODS["tsv_m"](terms, Settings(PATH, 2))
    wanted = sum(t.weight * delta(t) for t in terms)
    assert np.abs(product(found) - wanted).max() <= 1e-13 * size(terms)


@pytest.mark.parametrize("case", CASES)
def test_iso_c(case: str) -> None:
    """The sum with all of its singular values replaced by their mean."""
    terms = terms_of(case)
    found = METHODS["iso_c"](terms, Settings(PATH, 2))
    wanted = iso_oracle(terms)
    exact = np.linalg.svd(sum(t.weight * delta(t) for t in terms), compute_uv=False)
    kept = exact[exact > NEGLIGIBLE * exact[0]]
    # Each direction is as good as ε over its share; the product is then scaled to the mean.
    atol = 100 * 2.0**-52 * size(terms) * kept[0] / kept[-1]
    assert np.abs(product(found) - wanted).max() <= atol
    values = np.linalg.svd(product(found), compute_uv=False)[: len(kept)]
    assert np.allclose(values, kept.mean(), rtol=0, atol=atol)
    assert np.array_equal(found.b.shape, (wanted.shape[0], len(kept)))


def test_iso_c_of_a_sum_that_cancels() -> None:
    """A sum that is exactly zero has no singular values and gives no columns."""
    one = terms_of("one adapter")[0]
    found = METHODS["iso_c"]([one, replace(one, weight=-one.weight)], Settings(PATH, 2))
    assert (found.b.shape[1], found.a.shape[0]) == (0, 0)


# What holds for all of them


def test_all_methods_are_tested_here() -> None:
    """A new method needs an oracle; flags follow from the names."""
    core = {"ties_core", "dare_linear_core", "dare_ties_core"}
    known = {"sum", "svd", "cat", *FACTORS, *DENSE, *core, "tsv_m", "iso_c", "knots_ties"}
    assert set(METHODS) == known
    assert {n for n, m in METHODS.items() if m.exact_sum} == {"sum", "svd", "cat"}
    assert {n for n, m in METHODS.items() if m.keeps_factors} == {"cat", *FACTORS}
    assert {n for n, m in METHODS.items() if m.cuts} == {"svd", *DENSE}
    unpruned = {"sum", "svd", "cat", "linear", "tsv_m", "iso_c"}
    assert {n for n, m in METHODS.items() if m.prunes} == known - unpruned


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_not_written_to(name: str) -> None:
    """The factors of the adapters are as they were, also with weights and scales of 1."""
    terms = [replace(t, weight=1.0, scale=1.0) for t in terms_of("three adapters")]
    copies = [(t.b.copy(), t.a.copy()) for t in terms]
    for density in (0.5, 1.0):
        METHODS[name](terms, Settings(PATH, 2, density=density))
    for t, (b, a) in zip(terms, copies, strict=True):
        assert np.array_equal(t.b, b)
        assert np.array_equal(t.a, a)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"iso_c"}))
@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_one_adapter_without_pruning_is_itself(name: str, scale: float) -> None:
    """With one adapter, nothing pruned and its whole rank, every method gives its delta."""
    term = replace(terms_of("one adapter")[0], weight=0.5, scale=scale)
    found = METHODS[name]([term], Settings(PATH, 18))
    # float32 on factors and on dense deltas, float64 elsewhere.
    narrow = name in FACTORS or name in DENSE
    atol = (4 * EPS32 if narrow else 1e-13) * size([term])
    assert np.abs(product(found) - 0.5 * delta(term)).max() <= atol


@pytest.mark.parametrize("name", sorted(METHODS))
def test_order_and_splitting_of_the_scale_do_not_matter(name: str) -> None:
    """Adapters in another order, or α moved into the factor, give the same product."""
    terms = terms_of("three adapters")
    chosen = Settings(PATH, 100, density=0.6)
    plain = product(METHODS[name](terms, chosen))
    turned = product(METHODS[name](terms[::-1], chosen))
    atol = 4 * EPS32 * size(terms) / 0.6 if name in FACTORS or name in DENSE else rounding(terms)
    assert np.abs(plain - turned).max() <= atol
    if name not in FACTORS and not name.startswith("dare") and "core" not in name:
        moved = [replace(t, scale=t.scale / 4, b=t.b * np.float32(4)) for t in terms]
        assert np.abs(plain - product(METHODS[name](moved, chosen))).max() <= atol


# DARE


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


# Pruning and election on arrays


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
    """Entry by entry: a tie is positive, zeros do not count, weights have no vote."""
    stack = [np.array(row, np.float64).reshape(2, 2) for row in numbers]
    weights = weights[: len(stack)]
    for how in ("total", "frequency"):
        wanted = elected(stack, weights, how)
        assert np.allclose(agreed(stack, weights, how), wanted, rtol=1e-15, atol=0)


def test_election_by_hand() -> None:
    """One large negative outweighs two small positives in total, but not in number."""
    stack = [np.array([x], np.float32) for x in (1.0, 2.0, -9.0)]
    weights = [1.0, 0.5, -2.0]
    assert agreed(stack, weights, "total") == 18.0
    assert agreed(stack, weights, "frequency") == 1.0  # (1 + 1) / 2
    tied = [np.array([x], np.float32) for x in (3.0, -3.0)]
    assert agreed(tied, [1.0, 5.0], "total") == agreed(tied, [1.0, 5.0], "frequency") == 3.0


def test_weighted_sum_keeps_the_dtype() -> None:
    """float32 stays float32, float64 stays float64, and the sum is Σ wᵢxᵢ."""
    for dtype, rtol in ((np.float32, 4 * EPS32), (np.float64, 1e-15)):
        stack = [np.array([[1.0, 3.0]], dtype), np.array([[2.0, 7.0]], dtype)]
        found = weighted_sum(stack, [0.1, -0.3])
        assert found.dtype == dtype
        assert np.allclose(found, [[-0.5, -1.8]], rtol=rtol, atol=0)

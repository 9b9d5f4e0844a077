"""Every way to combine adapters, against its definition on dense float64 matrices."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers.oracles import EPS32, PATH, SHAPES, elected, largest, product, terms_of

from loratool.linalg.methods import METHODS, Settings, Term

NEGLIGIBLE = 2.0**-24

CASES = [
    *SHAPES, "negative weights", "all negative", "float16 values", "zero-padded",
    "repeated rows of a", "duplicated", "duplicated thrice", "columns far apart",
    "factors far apart", "adapters far apart",
]  # fmt: skip


def delta(t: Term) -> np.ndarray:
    return t.scale * (t.b.astype(np.float64) @ t.a.astype(np.float64))


def size(terms: Sequence[Term]) -> float:
    """What rounding is relative to: Σ |wᵢsᵢ|·‖Bᵢ‖·‖Aᵢ‖, column by row."""
    total = 0.0
    for t in terms:
        lengths = np.linalg.norm(t.b.astype(np.float64), axis=0)
        lengths = lengths * np.linalg.norm(t.a.astype(np.float64), axis=1)
        total += abs(t.weight * t.scale) * float(lengths.sum())
    return total


def dropped(x: np.ndarray, chosen: Settings, index: int, number: int) -> np.ndarray:
    """DARE with the documented stream of random numbers, which old results depend on."""
    if chosen.density >= 1:
        return x
    entropy = [chosen.seed, zlib.crc32(chosen.path.encode()), index, number]
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    mask = random.random(x.shape, dtype=np.float32) < chosen.density
    return np.where(mask, x / chosen.density, 0.0)


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
    parts = [np.linalg.svd(delta(t), full_matrices=False) for t in terms]
    # Balanced factors U·√Σ and √Σ·Vᵀ of each delta, without what it does not have.
    parts = [(u, np.where(s > NEGLIGIBLE * s[0], s, 0.0), v) for u, s, v in parts]
    u = left_basis(np.hstack([u * np.sqrt(s) for u, s, _ in parts]))
    v = left_basis(np.hstack([v.T * np.sqrt(s) for _, s, v in parts]))
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

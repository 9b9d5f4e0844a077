"""What a combination must not depend on: how factors are written, the order, where a sign is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers.oracles import PATH, elected, largest, product, terms_of

from loratool.linalg.lowrank import decompose
from loratool.linalg.methods import METHODS, Settings, Term
from loratool.linalg.ranks import Criterion

#: The rule of these is applied to A and B as they are written, as PEFT does.
FACTORS = {"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"}
OF_DELTAS = sorted(set(METHODS) - FACTORS)
SIGNS = ["total", "frequency"]
CASES = ["three adapters", "unequal ranks", "wide", "negative weights", "duplicated", "long"]


def double(terms: Sequence[Term]) -> list[Term]:
    return [replace(t, b=t.b.astype(np.float64), a=t.a.astype(np.float64)) for t in terms]


def refactored(terms: Sequence[Term], seed: int = 0) -> list[Term]:
    """The same deltas as other products: B·R and R⁻¹·A, with some of the scale in them."""
    rng = np.random.default_rng(seed)
    found = []
    for t in double(terms):
        r = rng.standard_normal((t.a.shape[0],) * 2) + 2 * np.eye(t.a.shape[0])
        part = float(rng.uniform(-3, 3))
        found.append(replace(t, b=t.b @ r, a=np.linalg.solve(r, t.a) * part, scale=t.scale / part))
    return found


def far(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def run(name: str, terms: Sequence[Term], how: str = "total", **more: object) -> np.ndarray:
    density = 0.55 if METHODS[name].prunes else 1.0
    chosen = Settings(PATH, 4, density=density, majority_sign_method=how, seed=3)
    return product(METHODS[name](terms, replace(chosen, **more)))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", SIGNS)
@pytest.mark.parametrize("name", OF_DELTAS)
def test_other_factors_of_the_same_deltas(name: str, how: str, case: str) -> None:
    """B·R and R⁻¹·A, and a scale that moved into them, give the same: random masks too."""
    terms = double(terms_of(case))
    # The dense methods compute in the dtype they are given.
    assert far(run(name, refactored(terms), how), run(name, terms, how)) < 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", SIGNS)
@pytest.mark.parametrize("name", METHODS)
def test_another_order_of_the_adapters(name: str, how: str, case: str) -> None:
    """Adapters in another order, their random numbers kept, give the same."""
    terms = double(terms_of(case))
    assert far(run(name, terms[::-1], how), run(name, terms, how)) < 1e-6
    assert far(run(name, [*terms[1:], terms[0]], how), run(name, terms, how)) < 1e-6


@pytest.mark.parametrize("name", ["ties_core", "dare_linear_core", "dare_ties_core"])
def test_padding_changes_nothing_in_core_space(name: str) -> None:
    """Zero columns, and a row of A that is there twice, are no directions."""
    terms = double(terms_of("three adapters"))
    wider = []
    for t in terms:
        b = np.hstack([t.b[:, :1] * 0.25, t.b[:, :1] * 0.75, t.b[:, 1:], 0 * t.b[:, :2]])
        a = np.vstack([t.a[:1], t.a[:1], t.a[1:], 0 * t.a[:2]])
        wider.append(replace(t, b=b, a=a))
    assert far(run(name, wider), run(name, terms)) < 1e-6


@pytest.mark.parametrize("case", ["three adapters", "unequal ranks", "wide"])
@pytest.mark.parametrize("how", SIGNS)
@pytest.mark.parametrize("name", METHODS)
def test_a_negative_weight_is_a_negated_adapter(name: str, how: str, case: str) -> None:
    """Weight −w is weight w on an adapter with the other sign, whatever the method."""
    terms = double(terms_of(case))
    below = [replace(t, weight=-t.weight) if i else t for i, t in enumerate(terms)]
    # PEFT's way puts the sign of a weight on A.
    negated = [replace(t, a=-t.a) if i else t for i, t in enumerate(terms)]
    assert far(run(name, below, how), run(name, negated, how)) < 1e-12
    scaled = [replace(t, scale=-t.scale) if i else t for i, t in enumerate(terms)]
    assert far(run(name, below, how), run(name, scaled, how)) < 1e-12


@pytest.mark.parametrize("case", ["three adapters", "unequal ranks", "negative weights"])
@pytest.mark.parametrize(
    "criterion", [Criterion(rank=1), Criterion(rank=4), Criterion(energy=0.6), Criterion(rank=99)]
)
def test_iso_c_cuts_the_sum_and_then_flattens_it(criterion: Criterion, case: str) -> None:
    """A cut keeps the sum's first directions with the mean of their singular values: the same as
    iso_c of the cut sum, in any order of the adapters."""
    terms = double(terms_of(case))
    total = sum(t.weight * t.scale * t.b @ t.a for t in terms)
    u, s, v = np.linalg.svd(total)
    s = s[s > 1e-10 * s[0]]
    kept = criterion.choose(s, float(np.sum(s**2)))
    wanted = s[:kept].mean() * u[:, :kept] @ v[:kept]
    found = METHODS["iso_c"](terms, Settings(PATH, 2, criterion=criterion))
    assert found.b.shape[1] == kept
    assert far(product(found), wanted) < 1e-10
    assert found.share == pytest.approx(np.sum(s[:kept] ** 2) / np.sum(s**2), rel=1e-12)
    assert far(run("iso_c", terms[::-1], criterion=criterion), wanted) < 1e-10
    assert far(run("iso_c", refactored(terms), criterion=criterion), wanted) < 1e-10
    b, a = decompose(
        *(METHODS["sum"](terms, Settings(PATH, 2)).b, METHODS["sum"](terms, Settings(PATH, 2)).a)
    ).factors(kept)
    first = [Term(0, 1.0, 1.0, b, a)]
    assert far(run("iso_c", first), wanted) < 1e-10


@pytest.mark.parametrize("case", ["three adapters", "unequal ranks", "tall"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_balanced_factors_give_what_the_paper_gives(density: float, case: str) -> None:
    """Of U·√Σ and √Σ·Vᵀ with scale 1 the bases are those of the factors as stored, as the authors
    of Core Space take them."""
    terms = []
    for t in double(terms_of(case)):
        b, a = decompose(t.b, t.a, t.scale).factors()
        terms.append(replace(t, scale=1.0, b=b, a=a))
    u = np.linalg.svd(np.hstack([t.b for t in terms]), full_matrices=False)[0]
    v = np.linalg.svd(np.vstack([t.a for t in terms]), full_matrices=False)[2]
    cores = [largest((u.T @ t.b) @ (t.a @ v.T), density) for t in terms]
    wanted = u @ elected(cores, [t.weight for t in terms], "total") @ v
    found = METHODS["ties_core"](refactored(terms), Settings(PATH, 4, density=density))
    assert far(product(found), wanted) < 1e-6

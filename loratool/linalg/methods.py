"""The ways to combine adapters, by name: a rule for numbers, in a space where it is applied.

Every method takes the modules of one path as `Term`s and gives factors `(b [out, r], a [r, in])` of
the combined delta. `wᵢ` is the weight somebody gave, `sᵢ` the scale of the adapter (α/r, α/√r).

| space | the rule is applied to | PEFT's names |
|---|---|---|
| stack | nothing: `Σ wᵢsᵢBᵢAᵢ` is exact in stacked factors | `svd`, `cat` |
| factors | the Aᵢ and the Bᵢ, each for themselves | `linear`, `ties`, … |
| dense | the deltas `sᵢBᵢAᵢ`, then the best approximation | `ties_svd`, … |
| core | the deltas in the basis of all the stacked factors | |
| aligned | the deltas in the left basis of all of them side by side | |
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratool.linalg.bases import basis, nearest_orthogonal, signs_of, visible
from loratool.linalg.chance import SINGLE, Spectrum
from loratool.linalg.dense import truncated_svd
from loratool.linalg.lowrank import Factor, Float64, decompose, stacked, triangle
from loratool.linalg.ranks import EVERYTHING, Criterion
from loratool.linalg.sparsify import (
    agreed,
    magnitude_pruned,
    randomly_pruned,
    tied_share,
    weighted_sum,
)


@dataclass(frozen=True)
class Term:
    """One adapter's part of a module: `weight·scale·b·a`; `index` counts the adapters.

    `rounding` is that of the factors as stored: half a unit in the last place, as a share.
    """

    index: int
    weight: float
    scale: float
    b: Factor
    a: Factor
    rounding: float = SINGLE


@dataclass(frozen=True)
class Settings:
    """What the methods can be told. `rank` is where the dense ones cut, `criterion` what of the sum
    a method keeps that changes its singular values; `path` the module's name, from which, with
    `seed`, its random numbers come."""

    path: str
    rank: int
    density: float = 1.0
    majority_sign_method: str = "total"
    seed: int = 0
    criterion: Criterion = EVERYTHING

    def random(self, *what: int) -> np.random.Generator:
        """Random numbers of their own for each module and adapter, whatever the order of work."""
        entropy = [self.seed, zlib.crc32(self.path.encode()), *what]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


@dataclass(frozen=True)
class Combined:
    """Factors of the combined delta, and what is known of them.

    `energy` is ‖·‖² of what they approximate, None if exact. Where the method itself cuts,
    `spectrum` has all the singular values it chose from, and `share` what of their energy it kept,
    unless that follows from `energy`. `tied` is the share of the energy that a tied vote on signs
    decided, `basis` the singular values of the directions that the result depends on one by one.
    """

    b: Factor
    a: Factor
    energy: float | None = None
    spectrum: Float64 | None = None
    share: float = 1.0
    tied: float = 0.0
    basis: tuple[Float64, ...] = ()


#: What a rule does with the arrays of the adapters: prune each, then add them up or elect signs.
Prune = Literal["", "magnitude", "random"]


@dataclass(frozen=True)
class Rule:
    prune: Prune = ""
    elect: bool = False

    def pruned(self, x: Factor, settings: Settings, *what: int) -> Factor:
        if self.prune == "magnitude":
            return magnitude_pruned(x, settings.density)
        if self.prune == "random":
            return randomly_pruned(x, settings.density, settings.random(*what))
        return x

    def merged(
        self, stack: Sequence[Factor], weights: Sequence[float], settings: Settings
    ) -> tuple[Factor, float]:
        """The arrays as one, and the share of its energy that a tied vote decided."""
        if not self.elect:
            return weighted_sum(stack, weights), 0.0
        how = settings.majority_sign_method
        result = agreed(stack, weights, how)
        return result, tied_share(result, stack, weights, how)

    def turns(self, settings: Settings) -> bool:
        """Whether the result depends on the basis that the arrays are written in."""
        return self.elect or (bool(self.prune) and settings.density < 1)


_SUM, _TIES = Rule(), Rule("magnitude", elect=True)
_PRUNE, _DARE, _DARE_TIES = Rule("magnitude"), Rule("random"), Rule("random", elect=True)


def stack(terms: Sequence[Term], rule: Rule, settings: Settings) -> Combined:
    """`Σ wᵢsᵢBᵢAᵢ`, exactly: `B = [Bᵢ]`, `A = [wᵢsᵢAᵢ]`, which is PEFT's `cat`."""
    return Combined(*stacked([(t.b, t.a.astype(np.float64) * (t.weight * t.scale)) for t in terms]))


def factors(terms: Sequence[Term], rule: Rule, settings: Settings) -> Combined:
    """PEFT's way: the rule on the Aᵢ with weights ±√|wᵢsᵢ|, and on the Bᵢ with √|wᵢsᵢ|.

    Cheap, but the product of two sums has cross terms BᵢAⱼ: `linear` is not `Σ wᵢsᵢBᵢAᵢ`. Factors
    of lower rank than the others, which PEFT refuses, are filled up with zeros.
    Source: peft/tuners/lora/model.py (`_generalized_task_arithmetic_weighted_adapter`).
    """
    roots = [math.sqrt(abs(t.weight * t.scale)) for t in terms]
    signs = [math.copysign(1.0, t.weight * t.scale) for t in terms]
    rank = max(t.a.shape[0] for t in terms)

    def side(parts: list[Factor], weights: list[float], number: int) -> tuple[Factor, float]:
        kept = [
            rule.pruned(x, settings, t.index, number) for x, t in zip(parts, terms, strict=True)
        ]
        full = [np.pad(x, [(0, rank - x.shape[0]), (0, 0)]) for x in kept]
        return rule.merged(full, weights, settings)

    a, tied_a = side([t.a for t in terms], [s * r for s, r in zip(signs, roots, strict=True)], 0)
    b, tied_b = side([t.b.T for t in terms], roots, 1)
    return Combined(b.T, a, tied=max(tied_a, tied_b))


def dense(terms: Sequence[Term], rule: Rule, settings: Settings) -> Combined:
    """PEFT's `*_svd`: the rule on the dense deltas, then their best approximation of a rank.

    The one place where `[out, in]` matrices are built, because pruning is defined on them.
    Source: peft/tuners/lora/model.py (`_svd_generalized_task_arithmetic_weighted_adapter`).
    """
    deltas = [rule.pruned(np.float32(t.scale) * (t.b @ t.a), settings, t.index, 0) for t in terms]
    merged, tied = rule.merged(deltas, [t.weight for t in terms], settings)
    return Combined(*truncated_svd(merged, settings.rank), tied=tied)


def core(terms: Sequence[Term], rule: Rule, settings: Settings) -> Combined:
    """Core Space: the rule on `Mᵢ = Uᵀ·(sᵢBᵢAᵢ)·V`, small and without loss of information.

    U are the left singular vectors of all Bᵢ side by side, V the right ones of all Aᵢ one above the
    other. The paper takes the factors as stored, so that other factors of the same deltas give
    another result. Here each Δᵢ = sᵢBᵢAᵢ is first written as `Uᵢ√Σᵢ·√ΣᵢVᵢᵀ`: then U diagonalises
    `Σᵢ (ΔᵢΔᵢᵀ)^½`, which depends on the deltas alone, in any order. Of factors that are balanced
    like this, with scale 1, it is what the paper takes.
    Source: Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", 2025,
    arXiv 2509.17786.
    """
    parts = [decompose(t.b, t.a, t.scale).factors() for t in terms]
    all_b, all_a = stacked(parts)
    left, right = basis(all_b), basis(all_a.T)
    cores, start = [], 0
    for t, (b, _) in zip(terms, parts, strict=True):
        own = slice(start, start + b.shape[1])
        start = own.stop
        small = left.within[:, own] @ right.within[:, own].T
        cores.append(rule.pruned(small, settings, t.index, 0))
    merged, tied = rule.merged(cores, [t.weight for t in terms], settings)
    return Combined(
        all_b @ (left.into @ merged), right.into.T @ all_a, tied=tied,
        basis=(left.values, right.values) if rule.turns(settings) else (),
    )  # fmt: skip


def aligned(terms: Sequence[Term], rule: Rule, settings: Settings) -> Combined:
    """KnOTS: the rule on the `Σ·Vᵢᵀ` of the SVD `[Δ₁ … Δₙ] = U·Σ·[V₁ᵀ … Vₙᵀ]`, put behind U.

    Source: Stoica et al., "Model merging with SVD to tie the KnOTS", 2024, arXiv 2410.19735.
    Pruning is by module; the authors prune over the whole model.
    """
    all_b = np.concatenate([t.b for t in terms], axis=1)
    left = basis(all_b)
    parts, cores, start = [], [], 0
    for t in terms:
        own = left.within[:, start : start + t.a.shape[0]] * t.scale
        start += t.a.shape[0]
        parts.append((own, t.a))
        cores.append(own @ triangle(t.a.T).T)
    turn, values, _ = np.linalg.svd(np.concatenate(cores, axis=1), full_matrices=False)
    kept = visible(values)
    turn = turn[:, kept]
    vectors = all_b @ (left.into @ turn)
    signs = signs_of(vectors)
    turn, vectors = turn * signs, vectors * signs
    rows = [
        rule.pruned(turn.T @ own @ a, settings, t.index, 0)
        for t, (own, a) in zip(terms, parts, strict=True)
    ]
    merged, tied = rule.merged(rows, [t.weight for t in terms], settings)
    used = (values[kept],) if rule.turns(settings) else ()
    return Combined(vectors, merged, tied=tied, basis=used)


def singular_vectors(terms: Sequence[Term], rule: Rule, settings: Settings) -> Combined:
    """TSV-M: the tasks' singular vectors, made orthogonal to each other by the nearest such set.

    Of each of n deltas the first min(out, in)/n singular vectors are kept, which is all of them
    unless the ranks are large. Source: Gargiulo et al., "Task Singular Vectors: Reducing Task
    Interference in Model Merging", 2024, arXiv 2412.00081.
    """
    shape = terms[0].b.shape[0], terms[0].a.shape[1]
    share = max(1, min(shape) // len(terms))
    columns, rows, sizes, parted = [], [], [], []
    for t in terms:
        found = decompose(t.b, t.a, t.weight * t.scale)
        if Spectrum(found.values, t.rounding).is_chance_at(share):
            parted.append(found.values)
        b, a = found.factors(share)
        root = np.sqrt(found.values[:share])
        columns.append(b / root)
        rows.append(a.T / root)
        sizes.append(found.values[:share])
    left = nearest_orthogonal(np.concatenate(columns, axis=1))
    right = nearest_orthogonal(np.concatenate(rows, axis=1))
    return Combined(left * np.concatenate(sizes), right.T, basis=tuple(parted))


def isotropic(terms: Sequence[Term], rule: Rule, settings: Settings) -> Combined:
    """Iso-C: the sum, with every singular value replaced by their mean.

    The mean is over the singular values that the sum has. A full matrix's other ones are zero, and
    their directions are arbitrary. A cut comes first, by the singular values of the sum, because
    among equal ones it would be chance; the mean is then over those that stay, so that it is the
    same as to cut the sum and flatten the result. Source: Marczak et al., "No Task Left Behind:
    Isotropic Model Merging with Common and Task-Specific Subspaces", 2025, arXiv 2502.04959.
    """
    total = stack(terms, rule, settings)
    found = decompose(total.b, total.a)
    rank = settings.criterion.choose(found.values, found.energy)
    b, a = found.factors(rank)
    values = found.values[:rank]
    scale = np.sqrt(values.mean() / values) if values.size else 1.0
    share = 1.0
    if values.size < found.values.size:
        share = float(np.sum(values**2)) / found.energy
    return Combined(b * scale, (a.T * scale).T, spectrum=found.values, share=share)


Space = Callable[[Sequence[Term], Rule, Settings], Combined]


@dataclass(frozen=True)
class Method:
    """`keeps_factors`: the factors are the result as PEFT would have it, unless a rank is asked.
    `cuts`: the rank is that of the largest adapter where none is given, as in PEFT. `selects`: it
    has kept what the criterion asks for itself."""

    space: Space
    rule: Rule = _SUM
    keeps_factors: bool = False
    cuts: bool = False

    @property
    def selects(self) -> bool:
        return self.space is isotropic

    def __call__(self, terms: Sequence[Term], settings: Settings) -> Combined:
        return self.space(terms, self.rule, settings)

    @property
    def prunes(self) -> bool:
        return bool(self.rule.prune)

    @property
    def is_dense(self) -> bool:
        return self.space is dense

    @property
    def exact_sum(self) -> bool:
        return self.space is stack


METHODS: dict[str, Method] = {
    "sum": Method(stack),
    "svd": Method(stack, cuts=True),
    "cat": Method(stack, keeps_factors=True),
    "linear": Method(factors, _SUM, keeps_factors=True),
    "ties": Method(factors, _TIES, keeps_factors=True),
    "dare_linear": Method(factors, _DARE, keeps_factors=True),
    "dare_ties": Method(factors, _DARE_TIES, keeps_factors=True),
    "magnitude_prune": Method(factors, _PRUNE, keeps_factors=True),
    "ties_svd": Method(dense, _TIES, cuts=True),
    "dare_linear_svd": Method(dense, _DARE, cuts=True),
    "dare_ties_svd": Method(dense, _DARE_TIES, cuts=True),
    "magnitude_prune_svd": Method(dense, _PRUNE, cuts=True),
    "ties_core": Method(core, _TIES),
    "dare_linear_core": Method(core, _DARE),
    "dare_ties_core": Method(core, _DARE_TIES),
    "tsv_m": Method(singular_vectors),
    "iso_c": Method(isotropic),
    "knots_ties": Method(aligned, _TIES),
}
